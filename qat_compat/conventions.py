"""How each framework writes a range down, and what scale and zero point it means: pure math, one table.

A quantizer's state is never just `scale` and `zero_point`: it is a largest magnitude, a threshold, its logarithm, or a
lowest value with a width. A number taken under another's convention is wrong by a factor of 127, 128/127 or 2.

Example:
    >>> import torch
    >>> scale, zero_point = CONVENTIONS["modelopt.int"].qparams({"_amax": torch.tensor(2.54)}, Grid(8))
    >>> round(float(scale), 6), int(zero_point)
    (0.02, 0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CONVENTIONS", "Convention", "Form", "Grid"]

Tensors = Mapping[str, Tensor]

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_NNCF_EPS = 1e-16


class Grid(NamedTuple):
    """The integers that values are rounded to.

    Example:
        >>> (Grid(8).low, Grid(8).high), (Grid(8, narrow=True).low, Grid(4, signed=False).high)
        ((-128, 127), (-127, 15))

    Args:
        bits: Width of an integer.
        signed: Whether it can be negative.
        narrow: Whether the lowest signed integer is left out.
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    @property
    def low(self) -> int:
        return -(1 << self.bits - 1) + int(self.narrow) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << self.bits - int(self.signed)) - 1


class Convention(NamedTuple):
    """One way to write a range down.

    Args:
        tensors: Names of the tensors that it is written in.
        qparams: (those tensors, the grid) -> (scale, zero point), in the dtype and shape of the first tensor.
        source: Where the framework says so.
        written: The inverse: (scale, zero point, the grid) -> those tensors; None where they cannot say every scale.
        is_magnitude: Whether its one tensor is the largest magnitude, which is a range whatever the grid is.
    """

    tensors: tuple[str, ...]
    qparams: Callable[[Tensors, Grid], tuple[Tensor, Tensor]]
    source: str
    written: Callable[[Tensor, Tensor, Grid], Tensors] | None = None
    is_magnitude: bool = False

    @property
    def is_affine(self) -> bool:
        """Whether a zero point can be another than 0."""
        return len(self.tensors) > 1


class Form(NamedTuple):
    """How a quantizer writes its range down, whatever the range is.

    Example:
        >>> import torch
        >>> form = Form("modelopt.int", Grid(8), {"_amax": "_amax"})
        >>> form.written(torch.tensor([0.5]), torch.tensor([0]))
        {'_amax': tensor([63.5000])}

    Args:
        convention: Name of a row of :data:`CONVENTIONS`.
        grid: The integers.
        leaves: Name of a tensor of the convention -> the quantizer's own name for it.
    """

    convention: str
    grid: Grid
    leaves: Mapping[str, str]

    def written(self, scale: Tensor, zero_point: Tensor) -> Tensors:
        """The tensors, by their names in the convention, that mean this scale and zero point on this grid."""
        written = CONVENTIONS[self.convention].written
        assert written is not None, self.convention
        return written(scale, zero_point, self.grid)


def _symmetric(scale: Tensor) -> tuple[Tensor, Tensor]:
    return scale, torch.zeros_like(scale)


# --- each convention, and its inverse ---------------------------------------------------------------------------------


def _amax(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    """The highest level is the largest magnitude, also where a level below its negative is used."""
    return _symmetric(tensors["_amax"] / grid.high)


def _as_amax(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensors:
    return {"_amax": scale * grid.high}


def _amax_e4m3(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    return _symmetric(tensors["_amax"] / E4M3_MAX)


def _nvfp4(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale of a block is itself rounded to E4M3, in units of a second scale of the whole tensor."""
    second = tensors["_global_amax"] / (E2M1_MAX * E4M3_MAX)
    block = tensors["_amax"] / (E2M1_MAX * second)
    block = torch.where(block == 0, torch.ones_like(block), block).clamp(max=E4M3_MAX)
    return _symmetric(block.to(torch.float8_e4m3fn).to(second.dtype) * second)


def _reach(grid: Grid) -> int:
    """The level that a threshold stands for: the magnitude of the lowest of signed levels, the highest of others."""
    return -grid.low if grid.signed else grid.high


def _threshold(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    return _symmetric(tensors["value"].abs() / _reach(grid))


def _as_threshold(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensors:
    return {"value": scale * _reach(grid)}


def _shifted_threshold(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    """With the magnitude of the lowest value beside it, which becomes the zero point."""
    scale, _ = _threshold(tensors, grid)
    return scale, (tensors["zero_point"].abs() / scale + grid.low).round().clamp(grid.low, grid.high)


def _as_shifted_threshold(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensors:
    return {"value": scale * _reach(grid), "zero_point": (zero_point - grid.low) * scale}


def _log_threshold(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    """The base-2 logarithm of a threshold."""
    return _symmetric(tensors["value"].exp2() / _reach(grid))


def _as_log_threshold(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensors:
    return {"value": (scale * _reach(grid)).log2()}


def _log2_threshold(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    """The threshold is a power of two, and so is the number of levels that it is divided by."""
    return _symmetric(tensors["value"].ceil().exp2() / (grid.high + 1))


def _scale(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    return _symmetric(tensors["scale"])


def _offset(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    """What is added to an integer that is counted from 0."""
    return tensors["scale"], grid.low - tensors["offset"]


def _nncf_symmetric(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    return _symmetric((tensors["scale"].abs() + _NNCF_EPS) / grid.high)


def _as_nncf_symmetric(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensors:
    return {"scale": scale * grid.high - _NNCF_EPS}


def _nncf_asymmetric(tensors: Tensors, grid: Grid) -> tuple[Tensor, Tensor]:
    """The end of the range that moves less is moved, outwards, until zero is a level; levels begin at `grid.low`."""
    steps = grid.high - grid.low
    low = tensors["input_low"].clamp(max=0)
    high = (tensors["input_low"] + tensors["input_range"].abs() + _NNCF_EPS).clamp(min=0)
    zero = (-low * steps / (high - low)).round()
    lowered = torch.where(zero < steps, zero / (zero - steps) * high, low)
    raised = torch.where(zero > 0, (zero - steps) / zero * low, high)
    move_low = (high - lowered) > (raised - low)
    low, high = torch.where(move_low, lowered, low), torch.where(move_low, high, raised)
    scale = (high - low) / steps
    return scale, (-low / scale).round() + grid.low


def _as_nncf_asymmetric(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensors:
    """Zero is a level of such a range already, so that no end is moved."""
    width = scale * (grid.high - grid.low)
    return {"input_low": (grid.low - zero_point) * scale, "input_range": width - _NNCF_EPS}


CONVENTIONS: Mapping[str, Convention] = {
    "modelopt.int":     Convention(("_amax",), _amax, "TensorQuantizer.step_size; modelopt 0.47", _as_amax, True),
    "modelopt.e4m3":    Convention(("_amax",), _amax_e4m3, "fp8_eager; modelopt 0.47"),
    "modelopt.nvfp4":   Convention(("_amax", "_global_amax"), _nvfp4, "NVFP4QTensor.quantize; modelopt 0.47"),
    "brevitas.int":     Convention(("value",), _threshold, "RescalingIntQuant, IntScaling; brevitas 0.13.4",
                                   _as_threshold, True),
    "brevitas.shifted": Convention(("value", "zero_point"), _shifted_threshold, "_ScaleShiftZeroPoint; brevitas 0.13.4",
                                   _as_shifted_threshold),
    "brevitas.log":     Convention(("value",), _log_threshold, "LogFloatRestrictValue; brevitas 0.13.4",
                                   _as_log_threshold),
    "brevitas.log2":    Convention(("value",), _log2_threshold, "PowerOfTwoRestrictValue; brevitas 0.13.4"),
    "aimet.symmetric": Convention(("scale",), _scale, "encoding specification 0.6.1 to 2.0.0; AIMET 2.42"),
    "aimet.affine":    Convention(("scale", "offset"), _offset, "encoding specification 0.6.1 to 2.0.0; AIMET 2.42"),
    "nncf.symmetric":   Convention(("scale",), _nncf_symmetric, "symmetric_quantize; nncf 3.4",
                                   _as_nncf_symmetric, True),
    "nncf.asymmetric":  Convention(("input_low", "input_range"), _nncf_asymmetric, "TuneRange; nncf 3.4",
                                   _as_nncf_asymmetric),
}  # fmt: skip
