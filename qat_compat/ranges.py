"""Smallest and largest values of tensors, as fast as memory can be read: pure math, no model.

The bits of a floating-point number, read as an integer, are in order among the numbers of one sign: as a signed
integer the largest is the largest positive number, as an unsigned one it is the negative number of largest size. So two
integer maxima over the same bytes give both ends of a range, in every format of IEEE 754 and in bfloat16, and NaN,
whose bits lie beyond those of infinity, cannot hide. (IEEE 754-2019, 3.4; reductions of integers need no look at NaN
and run in vector instructions.)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat_compat.threads import THREADS, in_threads

__all__ = ["RangeOver", "value_range"]

_Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 20  # bytes that are still in the cache for the second maximum
_THREADED = 8 << 20  # bytes from which threads pay
_INTEGERS: dict[torch.dtype, tuple[torch.dtype, Any, Any]] = {
    torch.float64: (torch.int64, np.int64, np.uint64),
    torch.float32: (torch.int32, np.int32, np.uint32),
    torch.float16: (torch.int16, np.int16, np.uint16),
    torch.bfloat16: (torch.int16, np.int16, np.uint16),
}


def value_range(value: Tensor, axis: int | None = None, group: int | None = None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value: of all, per index of one axis, or per group within a row.

    Equal to what `torch.aminmax` gives, NaN included, which makes both ends NaN.

    Example:
        >>> import torch
        >>> low, high = value_range(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), axis=0)
        >>> low.tolist(), high.tolist()
        ([-2.0, 0.0], [1.0, 3.0])

    Args:
        value: Any shape with at least one element.
        axis: The axis that is kept; both results have shape `(value.shape[axis],)`, or `()` without it.
        group: Number of neighbours along the last axis that share a range; both results have shape
            `(*value.shape[:-1], value.shape[-1] // group)`.
    """
    if group is not None:
        rows = value.reshape(-1, group)
        low, high = value_range(rows, 0)
        shape = (*value.shape[:-1], value.shape[-1] // group)
        return low.view(shape), high.view(shape)
    dense = _dense(value, axis)
    if dense is None:
        return _by_torch(value, axis)
    rows, axis = dense
    found = RangeOver(axis)
    step = max(1, _BLOCK * len(rows) // rows.nbytes)
    threads = THREADS if rows.nbytes >= _THREADED else 1
    in_threads((partial(found.add, at, rows[at : at + step]) for at in range(0, len(rows), step)), threads)
    return found.result()


class RangeOver:
    """The range of a tensor of which blocks of rows come in any order, from any thread.

    Example:
        >>> import torch
        >>> found = RangeOver(axis=0)
        >>> found.add(1, torch.tensor([[4.0, 5.0]]))
        >>> found.add(0, torch.tensor([[-1.0, 2.0]]))
        >>> found.result()
        (tensor([-1.,  4.]), tensor([2., 5.]))

    Args:
        axis: The axis that is kept, not negative; None for one range of all.
    """

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self._parts: list[tuple[int, Tensor, Tensor]] = []

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether values of this dtype can be added."""
        return dtype in _INTEGERS

    def add(self, first: int, rows: Tensor) -> None:
        """Look at a block.

        Args:
            first: Number of its first row.
            rows: Contiguous, of one of the four floating-point dtypes; dimension 0 may be a part only.
        """
        low, high = _ends(rows, self.axis) if rows.is_cpu else _by_torch(rows, self.axis)
        self._parts.append((first, low.view(-1), high.view(-1)))

    def result(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest values of all blocks."""
        parts = sorted(self._parts, key=lambda part: part[0])
        lows, highs = [low for _, low, _ in parts], [high for _, _, high in parts]
        if len(parts) == 1:
            low, high = lows[0], highs[0]
        elif self.axis == 0:
            return torch.cat(lows), torch.cat(highs)
        else:
            low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
        return (low, high) if self.axis is not None else (low.view(()), high.view(()))


def _dense(value: Tensor, axis: int | None) -> tuple[Tensor, int | None] | None:
    """The same values with dimensions in the order of memory, where they fill it; else None."""
    if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_cpu or value.dtype not in _INTEGERS:
        return None
    value = value.detach()
    if value.dim() == 0:
        return (value.view(1), None) if axis is None else None
    axis = axis % value.dim() if axis is not None else None
    if value.is_contiguous():
        return value, axis
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    rows = value.permute(order)
    if not rows.is_contiguous():
        return None
    return rows, order.index(axis) if axis is not None else None


def _by_torch(value: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    if axis is None:
        low, high = torch.aminmax(value)
        return low, high
    others = [dim for dim in range(value.dim()) if dim != axis % value.dim()]
    return (value.amin(others), value.amax(others)) if others else (value, value)


def _ends(rows: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Both ends of a block, NaN where it holds NaN; shape `(channels,)`."""
    integer, signed_type, unsigned_type = _INTEGERS[rows.dtype]
    signed = rows.view(integer).numpy()
    unsigned = signed.view(unsigned_type)
    sign = unsigned_type(1) << unsigned_type(8 * signed.itemsize - 1)
    most, least = _reduced(signed, axis, np.maximum), _reduced(unsigned, axis, np.maximum)
    low, high = least.view(signed_type), most
    if (least < sign).any():  # nothing negative: the smallest is the smallest as an integer
        low = np.where(least < sign, _reduced(signed, axis, np.minimum), low)
    if (most < 0).any():  # nothing else: the largest is the negative one of smallest size
        high = np.where(most < 0, _reduced(unsigned, axis, np.minimum).view(signed_type), high)
    infinity = unsigned_type(torch.tensor(math.inf, dtype=rows.dtype).view(integer).item())
    odd = (most > infinity.astype(signed_type)) | (least > (sign | infinity))
    ends = [torch.from_numpy(np.ascontiguousarray(end)).view(rows.dtype) for end in (low, high)]
    if odd.any():
        ends = [end.masked_fill(torch.from_numpy(odd), math.nan) for end in ends]
    return ends[0], ends[1]


def _reduced(values: _Array, axis: int | None, how: np.ufunc) -> _Array:
    """Reduce all but one axis; shape `(channels,)`."""
    if axis is not None and axis > 0:
        before, channels = math.prod(values.shape[:axis]), values.shape[axis]
        # whole rows at first, which are long
        values = how.reduce(values.reshape(before, -1), axis=0).reshape(channels, -1)
    rows: _Array = how.reduce(values.reshape(1 if axis is None else len(values), -1), axis=1)
    return rows
