"""What a change of dtype does to values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Loss", "bits_of", "cast_loss", "is_widening", "same_values"]

_BLOCK = 1 << 20  # elements
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


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
    names = f"{str(value.dtype).removeprefix('torch.')} to {str(dtype).removeprefix('torch.')}"
    if is_widening(value.dtype, dtype):
        return None
    lost = changed = 0
    rounds = dtype.is_floating_point and not value.is_complex()
    for part in _blocks(value):
        try:
            cast = part.to(dtype)
        except NotImplementedError:  # of a dtype whose elements torch packs, which it does not convert at all
            return Loss(f"torch cannot convert from {names}", True)
        if not rounds:  # of integers of one size, a number that wraps around comes back as it was, with another sign
            changed += int(((cast.to(part.dtype) != part) | _wraps(part, cast)).sum())
            continue
        lost += int((_is_finite(part) & ~_is_finite(cast)).sum())
        changed += int(((cast.to(part.dtype) != part) & (part == part)).sum())
    if lost or (changed and not rounds):
        what = "overflow from" if rounds else "cannot be held after"
        return Loss(f"{lost or changed} of {value.numel()} values {what} {names}", True)
    return Loss(f"{changed} of {value.numel()} values rounded from {names}", False) if changed else None


def _wraps(part: Tensor, cast: Tensor) -> Tensor | bool:
    """Where an integer has got another sign; of no complex number is one known."""
    return False if part.is_complex() or cast.is_complex() else _is_negative(cast) ^ _is_negative(part)


def _is_negative(value: Tensor) -> Tensor:
    signed = value.dtype.is_signed
    return _comparable(value) < 0 if signed else torch.zeros((), dtype=torch.bool, device=value.device)


def _is_finite(value: Tensor) -> Tensor:
    return torch.isfinite(_comparable(value))


def _comparable(value: Tensor) -> Tensor:
    """The same values, in a dtype of which torch knows which are finite and which negative: not so of float8."""
    return value.float() if value.dtype.itemsize == 1 and value.is_floating_point() else value


def is_widening(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether every value of one floating-point dtype is one of the other, known without looking at any.

    Example:
        >>> import torch
        >>> is_widening(torch.bfloat16, torch.float32), is_widening(torch.bfloat16, torch.float16)
        (True, False)
    """
    wider = old.is_floating_point and new.is_floating_point and new.itemsize > old.itemsize
    try:
        return wider and torch.finfo(new).max >= torch.finfo(old).max  # not so for the exponents of an MX format
    except NotImplementedError:  # of a dtype whose elements torch packs by two
        return False


def _blocks(value: Tensor) -> Sequence[Tensor]:
    """Parts of a tensor, so that what is worked out of it needs little memory."""
    if value.dim() == 0 or value.numel() <= _BLOCK:
        return (value,)
    step = max(1, _BLOCK * len(value) // value.numel())
    return [value[first : first + step] for first in range(0, len(value), step)]


def bits_of(value: Tensor) -> Tensor:
    """The bits of floating-point values, as integers of the same size over the same memory.

    Example:
        >>> import torch
        >>> bits_of(torch.tensor([0.0, -0.0]))
        tensor([          0, -2147483648], dtype=torch.int32)
    """
    return value.detach().view(_INTEGERS[value.dtype.itemsize])


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, so that NaN equals itself.

    Example:
        >>> import torch
        >>> same_values(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
        True
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.is_floating_point():  # neither does NaN differ from itself, nor is -0.0 the same as 0.0
        return torch.equal(bits_of(left), bits_of(right))
    return torch.equal(left, right)
