"""What a change of dtype does to values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Loss", "cast_loss"]


@dataclass(frozen=True)
class Loss:
    """What a cast changes, in words; fatal where a value cannot be held at all."""

    text: str
    fatal: bool


def cast_loss(value: Tensor, dtype: torch.dtype) -> Loss | None:
    """Count what a cast changes; None if every value stays as it is.

    Rounding to fewer bits is a loss that is counted. A finite value that becomes infinite, a fraction or a NaN that
    becomes an integer, a number outside an integer's range and a lost imaginary part are fatal.

    Example:
        >>> import torch
        >>> cast_loss(torch.tensor([1.0, 0.1]), torch.float16)
        Loss(text='1 of 2 values rounded from float32 to float16', fatal=False)
        >>> cast_loss(torch.tensor([1e30]), torch.float16)
        Loss(text='1 of 1 values overflow from float32 to float16', fatal=True)
        >>> cast_loss(torch.tensor([3.0]), torch.int64) is None
        True
    """
    cast = value.to(dtype)
    names = f"{str(value.dtype).removeprefix('torch.')} to {str(dtype).removeprefix('torch.')}"
    if dtype.is_floating_point and not value.is_complex():
        if value.is_floating_point() and torch.finfo(dtype).bits > torch.finfo(value.dtype).bits:
            return None
        lost = int((torch.isfinite(value) & ~torch.isfinite(cast)).sum())
        if lost:
            return Loss(f"{lost} of {value.numel()} values overflow from {names}", True)
        changed = int(((cast.to(value.dtype) != value) & (value == value)).sum())
        return Loss(f"{changed} of {value.numel()} values rounded from {names}", False) if changed else None
    changed = int((cast.to(value.dtype) != value).sum())
    return Loss(f"{changed} of {value.numel()} values cannot be held after {names}", True) if changed else None
