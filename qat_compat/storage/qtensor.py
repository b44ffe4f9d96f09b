"""Tensors of torch's quantized dtypes, rebuilt from checked parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, QParamError

if TYPE_CHECKING:
    from qat_compat.storage.lazy import LazyTensor

__all__ = ["Quantizer", "rebuild_quantized"]

# The range of stored integers; quint4x2 and quint2x4 hold several per byte.
_RANGES = {
    torch.qint8: (-128, 127),
    torch.quint8: (0, 255),
    torch.qint32: (-(2**31), 2**31 - 1),
    torch.quint4x2: (0, 15),
    torch.quint2x4: (0, 3),
}


class Quantizer(NamedTuple):
    """What a torch quantized tensor stores beside its integers; `axis` is None for one scale for all."""

    scheme: torch.qscheme
    scale: float | LazyTensor | list[float]
    zero_point: int | LazyTensor | list[int]
    axis: int | None = None


def rebuild_quantized(
    raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, quantizer: Quantizer
) -> Tensor:
    """The quantized tensor over the bytes `raw`.

    Raises:
        QParamError: A scale is not finite and positive, or a zero_point is outside the dtype's range.
        CheckpointError: The quantizer's parts do not fit the tensor.
    """
    if dtype not in _RANGES:
        raise _malformed("a quantized dtype", dtype)
    floats = quantizer.scheme is torch.per_channel_affine_float_qparams
    scales = _values(quantizer.scale, torch.float64).to(torch.float64)
    zero_points = _values(quantizer.zero_point, torch.float64 if floats else torch.int64)
    # The word of the scheme is not to be trusted: torch writes per_channel_affine for both, and its reader tells them
    # by the zero points, too.
    is_float = quantizer.axis is not None and zero_points.is_floating_point()
    _check_values(scales, zero_points.to(torch.float64), dtype, is_float)
    made: Tensor
    if quantizer.axis is None:
        made = torch._empty_affine_quantized(
            shape, scale=float(scales.item()), zero_point=int(zero_points.item()), dtype=dtype
        )
    else:
        if not 0 <= quantizer.axis < len(shape) or scales.numel() != shape[quantizer.axis]:
            raise _malformed(
                f"an axis of {shape} with a scale for each channel", f"axis {quantizer.axis}, {scales.numel()} scales"
            )
        made = torch._empty_per_channel_affine_quantized(
            shape,
            scales=scales.to(torch.float32) if is_float else scales,
            zero_points=zero_points.to(torch.float32 if is_float else torch.int64),
            axis=quantizer.axis,
            dtype=dtype,
        )
    return made.set_(raw.untyped_storage(), offset, shape, stride)


def _values(value: float | LazyTensor | list[float] | list[int], dtype: torch.dtype) -> Tensor:
    """A tensor as it is; numbers in `dtype`."""
    return torch.tensor(value, dtype=dtype, device="cpu") if isinstance(value, (int, float, list)) else value.read()


def _check_values(scales: Tensor, zero_points: Tensor, dtype: torch.dtype, is_float: bool) -> None:
    if scales.shape != zero_points.shape:
        raise _malformed("as many zero_points as scales", f"{zero_points.numel()} for {scales.numel()}")
    bad = ~(torch.isfinite(scales) & (scales > 0))
    if bool(bad.any()):
        raise QParamError(
            "a quantized tensor has a scale that no quantizer can use",
            expected="finite scales above 0",
            found=f"{scales[bad].flatten()[0].item()} ({int(bad.sum())} of {scales.numel()})",
            remedy="the file was written by a run that never calibrated, or is corrupt; convert the model again",
        )
    low, high = (-math.inf, math.inf) if is_float else _RANGES[dtype]
    outside = ~((zero_points >= low) & (zero_points <= high))
    if bool(outside.any()):
        raise QParamError(
            "a quantized tensor has a zero_point outside the range of its dtype",
            expected=f"{low} to {high} for {str(dtype).removeprefix('torch.')}",
            found=f"{zero_points[outside].flatten()[0].item():g} ({int(outside.sum())} of {zero_points.numel()})",
            remedy="the file is corrupt; convert the model again",
        )


def _malformed(expected: object, found: object) -> CheckpointError:
    return CheckpointError(
        "a quantized tensor is malformed",
        expected=expected,
        found=found,
        remedy="the file is corrupt; get a fresh copy",
    )
