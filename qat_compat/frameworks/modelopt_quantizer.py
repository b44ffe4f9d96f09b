"""One quantizer of NVIDIA ModelOpt: its settings, its `_amax`, and how it is driven.

What is known of the framework, and what that rests on, is in :mod:`qat_compat.frameworks.modelopt`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat_compat.conventions import Form, Grid
from qat_compat.errors import Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import Needs, Quantizer, Reduction
from qat_compat.ranges import magnitude

__all__ = ["TURNED", "AmaxQuantizer", "Settings", "amax_shape", "is_quantizer", "is_turned", "settings_from"]

_PLAIN_ALGORITHMS = ("max_calibrate", "_no_calibrate", "quantize")


class Settings(NamedTuple):
    """What a quantizer does with its `_amax`: read off a live quantizer or the state of one in a `mto.save` file.

    Args:
        bits: An integer's, or (exponent, mantissa) of a floating-point format.
        axis: Axes that keep their size in `_amax`; None for one range per tensor.
        unsigned: Whether zero is the lowest level.
        narrow_range: Whether the lowest level is minus the highest.
        block_sizes: Axis -> block size, with "type" ("static" or "dynamic") and "scale_bits"; None without blocks.
        dynamic: Whether ranges are made anew for every tensor.
        enabled: Whether it quantizes at all.
    """

    bits: int | tuple[int, int]
    axis: int | tuple[int, ...] | None
    unsigned: bool
    narrow_range: bool
    block_sizes: Mapping[Any, Any] | None
    dynamic: bool
    enabled: bool

    @property
    def blocks(self) -> Mapping[int, int]:
        """Axis -> size of blocks that have a range each."""
        sizes = self.block_sizes or {}
        if sizes.get("type") == "dynamic":
            return {}
        return {axis: size for axis, size in sizes.items() if isinstance(axis, int) and size is not None}


def settings_from(state: Mapping[str, Any]) -> Settings:
    """What a live quantizer's attributes say, or its state in a `mto.save` file."""
    bits, blocks = state["_num_bits"], state.get("_block_sizes")
    return Settings(
        tuple(bits) if isinstance(bits, (tuple, list)) else int(bits),
        state.get("_axis"),
        bool(state.get("_unsigned")),
        bool(state.get("_narrow_range")),
        dict(blocks) if blocks is not None else None,
        bool(state.get("_dynamic")),
        not state.get("_disabled"),
    )


def amax_shape(shape: tuple[int, ...], settings: Settings) -> tuple[int, ...]:
    """The shape of `_amax` of a tensor: reduced axes are kept with size 1, blocks are counted, one range is ().

    Example:
        >>> int4 = Settings(4, None, False, False, {-1: 128, "type": "static"}, False, True)
        >>> amax_shape((16, 256), int4), amax_shape((16, 256), int4._replace(block_sizes=None, axis=0))
        ((32, 1), (16, 1))

    Source: `TensorQuantizer._setup_for_blockquant` and `reduce_amax` of nvidia-modelopt 0.47.
    """
    blocks = {axis % len(shape): size for axis, size in settings.blocks.items()}
    if list(blocks) == [len(shape) - 1]:
        found = [math.prod(shape[:-1]) * math.ceil(shape[-1] / blocks[len(shape) - 1]), 1]
    elif blocks:
        found = [n for axis, size in enumerate(shape) for n in _split(size, blocks.get(axis))]
    else:
        axes = settings.axis if isinstance(settings.axis, (tuple, list)) else (settings.axis,)
        kept = {axis % len(shape) for axis in axes if axis is not None}
        found = [size if axis in kept else 1 for axis, size in enumerate(shape)]
    return tuple(found) if math.prod(found) > 1 else ()


def _split(size: int, block: int | None) -> tuple[int, ...]:
    return (size,) if block is None else (math.ceil(size / block), 1)


def is_quantizer(module: nn.Module) -> bool:
    return any(
        base.__name__ == "TensorQuantizer" and base.__module__.startswith("modelopt.") for base in type(module).__mro__
    )


TURNED = "ModelOpt keeps the weight of a Conv1D of transformers as its transpose, which is not undone here"


def is_turned(module: nn.Module) -> bool:
    """Whether ModelOpt made a linear layer of a `Conv1D` of transformers (GPT-2), whose weight is (inputs, outputs).

    Source: `_QuantConv1D.convert` of modelopt 0.47.
    """
    owner: Any = module
    return hasattr(type(module), "original_cls") and owner.original_cls.__name__ == "Conv1D"


class AmaxQuantizer(Quantizer):
    """A ModelOpt `TensorQuantizer`."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, site: str, algorithm: str) -> None:
        super().__init__(names, module, site, Needs.DATA)
        self.settings = settings_from(vars(module))
        self.parameter = ""  # key of the weight that `source` gives
        self.whole: nn.Module = module  # all quantizers in a row
        self.is_of_turned = False  # see `is_turned`
        self.lazy = False  # whether the model has yet to be calibrated
        self._algorithm = algorithm
        self._before: tuple[bool, bool] | None = None
        owner: Any = module
        if not self.settings.enabled or owner._use_constant_amax or owner._constant_amax is not None:
            self.needs = Needs.DEFINITION
        elif self.settings.dynamic or owner.is_mx_format:
            self.needs = Needs.NOTHING

    def take_weight(self, source: Callable[[], Tensor], host: nn.Module, parameter: str, whole: nn.Module) -> None:
        """Say that this quantizes a tensor of the model's own."""
        self.parameter, self.whole = parameter, whole
        self.is_of_turned = is_turned(host)
        if self.needs is Needs.DATA:
            self.needs, self.source = Needs.WEIGHTS, source

    def _shape(self) -> tuple[int, ...] | None:
        """The shape that `_amax` must have, where that is known without data."""
        if self.source is not None:
            return amax_shape(tuple(self.source().shape), self.settings)
        return () if self.settings.axis is None and not self.settings.blocks else None

    def channels(self) -> int | None:
        shape = self._shape()
        return None if shape is None else math.prod(shape)

    def disable(self) -> None:
        module: Any = self.module
        if self._before is None:
            self._before = module._if_quant, module._if_calib
        module._if_quant = module._if_calib = False

    def start_observing(self) -> None:
        module: Any = self.module
        # a copy, since what it has collected is no attribute of the module and would outlive a roll-back
        module._calibrator = copy.copy(module._calibrator)
        module._calibrator.reset()
        module._if_calib = True

    def observe(self, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise QParamError("the tensor that it quantizes holds NaN or inf", key=self.name, expected="finite values")
        self.module(value)

    def reduction(self) -> Reduction | None:
        """A MaxCalibrator keeps the largest magnitude, which is that of one of the ends."""
        module: Any = self.module
        axis = self.settings.axis
        if self.source is None or axis not in (None, 0) or self.settings.block_sizes or self.refusal():
            return None
        changed = module.pre_quant_scale is not None or module.rotate_is_enabled or self.whole is not module
        return None if changed else Reduction(self.parameter, 0 if axis == 0 else None)

    def observe_range(self, low: Tensor, high: Tensor) -> None:
        assert self.source is not None
        ends = torch.stack([low, high], -1)
        self.observe(ends.view(*ends.shape, *[1] * (self.source().dim() - ends.dim())))

    def needs_no_forward(self) -> bool:
        return self.reduction() is not None

    def compute_qparams(self) -> None:
        module: Any = self.module
        self._write(module._calibrator.compute_amax())

    def restore_switches(self) -> None:
        module: Any = self.module
        if self._before is not None:
            module._if_quant, module._if_calib = self._before
            self._before = None

    def _write(self, value: Tensor) -> None:
        module: Any = self.module
        held = module._buffers.get("_amax")
        if held is not None and held.shape != value.shape:
            del module._buffers["_amax"]
        module.amax = value

    def restore(self, leaf: str, value: Tensor) -> None:
        assert leaf == "_amax"
        shape = self._shape()
        self._write(value if shape is None else value.reshape(shape))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        module: Any = self.module
        self._write(torch.maximum(-low, high).to(module._amax))

    def takes_range(self) -> bool:
        return self._shape() == ()

    def ranges(self) -> list[Tensor]:
        seen = getattr(getattr(self.module, "_calibrator", None), "_calib_amax", None)
        return [seen] if isinstance(seen, Tensor) else []

    def hides_infinity(self) -> bool:
        return True  # its calibrator stops at NaN and inf with an assertion

    def observes_in_training(self) -> bool:
        return False

    def refusal(self) -> str:
        module: Any = self.module
        if self._algorithm not in _PLAIN_ALGORITHMS:
            name = self._algorithm.removesuffix("_calibrate")
            return f"the model was calibrated with {name!r}, which the engine does not run; it runs 'max'"
        if type(module._calibrator).__name__ != "MaxCalibrator":
            return f"its calibrator is a {type(module._calibrator).__name__}, not a MaxCalibrator"
        if self.is_of_turned:
            return TURNED
        if module._bias is not None:
            return "it has an affine bias, which the engine does not calibrate"
        if module.is_nvfp4_static or getattr(module, "_global_amax", None) is not None:
            return "its blocks share a second range, which the engine does not calibrate"
        return ""

    def check(self) -> Iterable[Problem]:
        module: Any = self.module
        amax = module._buffers.get("_amax")
        if amax is None:
            return
        key, remedy = f"{self.name}._amax", "calibrate this quantizer anew, or take it from a sound file"
        bad = int((~torch.isfinite(amax) | (amax < 0)).sum())
        if bad:
            yield Problem(ProblemKind.INVALID, key, f"{bad} of {amax.numel()} are negative or not finite", remedy)
        expected = self._shape()
        if expected is not None and tuple(amax.shape) != expected:
            detail = f"expected the shape {list(expected)}, found {list(amax.shape)}"
            yield Problem(ProblemKind.INVALID, key, detail, remedy)

    def soundness(self) -> Tensor | None:
        amax = self.module._buffers.get("_amax")
        if amax is None or self._shape() not in (None, tuple(amax.shape)):
            return None
        return (torch.isfinite(amax) & (amax >= 0)).all()

    def form(self) -> Form | None:
        module: Any = self.module
        bits, dynamic = self.settings.bits, (self.settings.block_sizes or {}).get("type") == "dynamic"
        if not isinstance(bits, int) or dynamic or module._bias is not None:
            return None
        grid = Grid(bits, not self.settings.unsigned, self.settings.narrow_range)
        return Form("modelopt.int", grid, {"_amax": "_amax"})

    def refuses_transfer(self) -> str:
        bits = self.settings.bits
        if not isinstance(bits, int):
            return f"its levels are floating-point numbers, E{bits[0]}M{bits[1]}"
        return super().refuses_transfer()

    def magnitudes(self) -> tuple[Tensor, Tensor] | None:
        amax = self.module._buffers.get("_amax")
        if self.source is None or amax is None:
            return None
        with torch.no_grad():
            return magnitude(self.source()), amax.max().double()

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {self.parameter: self._quantized} if self.source is not None else {}

    def _quantized(self) -> Tensor:
        assert self.source is not None
        if not any("_amax" in module._buffers for module in self.whole.modules()):
            raise QParamError(
                "the weight quantizer has seen nothing yet",
                key=self.name,
                remedy="load or calibrate the model first, or take the latent weights",
            )
        with torch.no_grad():
            value: Tensor = copy.deepcopy(self.whole)(self.source())
        return value
