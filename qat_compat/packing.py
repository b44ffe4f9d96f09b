"""Integers of few bits packed into words, and the tensors that they stand for: pure math.

Words are filled from their lowest bit up, and a value may cross into the next word. A signed value of `bits` bits is
stored with `2**(bits - 1)` added, so that it is never negative (compressed-tensors `pack_to_int32`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["dequantize", "pack", "packed_size", "power_of_two", "unpack", "unpack_fp4"]

_WORD = 32
# Four bits as sign, two bits of exponent and one of mantissa (OCP microscaling formats, E2M1).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def packed_size(columns: int, bits: int) -> int:
    """Words that so many values of so many bits take.

    Example:
        >>> packed_size(64, 4), packed_size(10, 3)
        (8, 1)
    """
    return -(-columns * bits // _WORD)


def pack(values: Tensor, bits: int) -> Tensor:
    """Signed values in words, along the last dimension.

    Example:
        >>> pack(torch.tensor([[-8, -7, 7, 0]], dtype=torch.int8), 4)
        tensor([[36624]], dtype=torch.int32)

    Args:
        values: (..., n) int8, each in [-2**(bits-1), 2**(bits-1) - 1].
        bits: 1 to 8.

    Returns:
        (..., ceil(n * bits / 32)) int32.
    """
    columns = values.shape[-1]
    # what is added below fills the padding too; it is cut off with its words
    fill = -(1 << (bits - 1))
    grouped = pad(values, (0, -columns % _WORD), value=fill).reshape(*values.shape[:-1], -1, _WORD)
    words = torch.zeros(*grouped.shape[:-1], bits + 1, dtype=torch.int64, device=values.device)
    for index, (word, shift) in enumerate(_places(bits)):
        value = (grouped[..., index].long() - fill) << shift
        words[..., word] |= value
        words[..., word + 1] |= value >> _WORD
    low = words[..., :bits] & ((1 << _WORD) - 1)
    signed = low - ((low >> (_WORD - 1)) << _WORD)
    return signed.flatten(-2)[..., : packed_size(columns, bits)].to(torch.int32).contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The first `columns` signed values of words, along the last dimension; the inverse of :func:`pack`.

    Example:
        >>> unpack(pack(torch.tensor([[-8, -7, 7, 0]], dtype=torch.int8), 4), 4, 4)
        tensor([[-8, -7,  7,  0]], dtype=torch.int8)

    Args:
        words: (..., at least ceil(columns * bits / 32)) int32.
        bits: 1 to 8.
        columns: Number of values in each row.

    Returns:
        (..., columns) int8.
    """
    groups = -(-columns // _WORD)
    grouped = pad(words, (0, groups * bits - words.shape[-1])).reshape(*words.shape[:-1], groups, bits)
    values = torch.empty(*grouped.shape[:-1], _WORD, dtype=torch.int8, device=words.device)
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    for index, (word, shift) in enumerate(_places(bits)):
        value = grouped[..., word] >> shift
        if (rest := _WORD - shift) < bits:
            value = (value & ((1 << rest) - 1)) | (grouped[..., word + 1] << rest)
        values[..., index] = (value & mask) - offset
    return values.flatten(-2)[..., :columns]


def _places(bits: int) -> Iterator[tuple[int, int]]:
    """Word and shift of each of the 32 values that fill `bits` words."""
    return (divmod(index * bits, _WORD) for index in range(_WORD))


def unpack_fp4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Pairs of E2M1 values, the low nibble first.

    Example:
        >>> unpack_fp4(torch.tensor([[0x21, 0xF7]], dtype=torch.uint8), torch.float32)
        tensor([[ 0.5000,  1.0000,  6.0000, -6.0000]])

    Args:
        packed: (..., n) uint8.
        dtype: Of the values; each has a form in any floating dtype of 8 bits and more.

    Returns:
        (..., 2 * n).
    """
    table = torch.tensor(_E2M1, dtype=dtype, device=packed.device)
    return torch.stack([table[(packed & 0xF).int()], table[(packed >> 4).int()]], dim=-1).flatten(-2)


def power_of_two(exponents: Tensor) -> Tensor:
    """The scales that E8M0 exponents stand for, `2**(e - 127)`, as bfloat16, which has all of them but the last.

    Example:
        >>> power_of_two(torch.tensor([127, 130, 120], dtype=torch.uint8)).tolist()
        [1.0, 8.0, 0.0078125]
    """
    return 2.0 ** (exponents.to(torch.int32) - 127).to(torch.bfloat16)


def dequantize(
    values: Tensor, scale: Tensor, zero_point: Tensor | None = None, block: tuple[int, int] | None = None
) -> Tensor:
    """`(values - zero_point) * scale`, each scale over its block of the last two dimensions.

    Example:
        >>> dequantize(torch.tensor([[1, 2, 3, 4]], dtype=torch.int8), torch.tensor([[0.5, 2.0]])).tolist()
        [[0.5, 1.0, 6.0, 8.0]]

    Args:
        values: (..., rows, columns).
        scale: One element, or (..., r, c).
        zero_point: Like `scale`.
        block: Rows and columns that share a scale; by default rows / r and columns / c. Those at the right and the
            lower edge may be smaller.

    Returns:
        Like `values`, in the dtype of `scale`.
    """
    found = values.to(scale.dtype, copy=True)  # the only large tensor that is made, but for the spread scales
    if zero_point is not None:
        found -= _spread(zero_point.to(scale.dtype), found, block)
    found *= _spread(scale, found, block)
    return found


def _spread(scale: Tensor, values: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The scale in a shape that broadcasts over the values."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:
        scale = scale.unsqueeze(-1)
    for dimension in (-2, -1):
        size, count = values.shape[dimension], scale.shape[dimension]
        if count not in (1, size):
            repeats = block[dimension] if block is not None else size // count
            scale = scale.repeat_interleave(repeats, dim=dimension).narrow(dimension, 0, size)
    return scale
