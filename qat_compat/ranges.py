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

__all__ = ["RangeOver", "magnitude", "value_range"]

_Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 20  # bytes that are still in the cache for the second maximum
_TASK = 4 << 20  # bytes that one thread takes at a time; from two such on, threads pay
_SHORT = 512  # elements of a row to which calling a loop costs more than running it
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
    dense = _dense(value if group is None else value.contiguous(), axis)
    if dense is None and group is not None:
        low, high = _by_torch(value.reshape(-1, group), 0)
        shape = (*value.shape[:-1], value.shape[-1] // group)
        return low.view(shape), high.view(shape)
    if dense is None:
        return _by_torch(value, axis)
    rows, axis = dense
    found = RangeOver(rows, axis, group)
    step = max(1, _TASK * len(rows) // rows.nbytes)
    threads = THREADS if rows.nbytes >= 2 * _TASK else 1
    in_threads((partial(found.look, at, at + step) for at in range(0, len(rows), step)), threads)
    return found.result()


def magnitude(value: Tensor) -> Tensor:
    """The largest absolute value, without a copy of the tensor, as a 0-dimensional float64; 0 if it holds nothing.

    Example:
        >>> import torch
        >>> magnitude(torch.tensor([1.0, -2.0]))
        tensor(2., dtype=torch.float64)
    """
    if not value.numel():
        return torch.zeros((), dtype=torch.float64, device=value.device)
    low, high = value_range(value)
    return torch.maximum(-low.double(), high.double())


class RangeOver:
    """The range of a tensor at which one looks block by block, in any order, from any thread.

    Example:
        >>> import torch
        >>> found = RangeOver(torch.tensor([[-1.0, 2.0], [4.0, 5.0]]), axis=0)
        >>> found.look(1, 2)
        >>> found.look(0, 1)
        >>> found.result()
        (tensor([-1.,  4.]), tensor([2., 5.]))

    Args:
        values: Contiguous, of one of the four floating-point dtypes, with at least one dimension; they need to be there
            only when they are looked at, and when the result is asked for.
        axis: The axis that is kept, not negative; None for one range of all.
        group: Number of neighbours along the last axis that share a range.
    """

    def __init__(self, values: Tensor, axis: int | None, group: int | None = None) -> None:
        values = values.detach()
        self._identity = values.data_ptr(), values.shape, values.stride()
        self._shape = () if axis is None else (values.shape[axis],)
        self._pieces = 1  # of each row
        if group is not None:
            self._shape = (*values.shape[:-1], values.shape[-1] // group)
            self._pieces = math.prod(self._shape[1:])
            values, axis = values.view(-1, group), 0
        self._values, self._axis = values, axis
        self._bits = _Bits(values, axis) if values.is_cpu else None
        self._ends: list[tuple[Tensor, Tensor]] = []  # of blocks on another device

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether the range of values of this dtype can be told."""
        return dtype in _INTEGERS

    def look(self, first: int, end: int) -> None:
        """Look at the rows (of dimension 0) from `first` to before `end`, or to the last."""
        first, end = first * self._pieces, end * self._pieces
        if self._bits is not None:
            self._bits.look(first, end)
        else:
            self._ends.append(_by_torch(self._values[first:end], self._axis))

    def is_of(self, values: Tensor) -> bool:
        """Whether these are the values that were looked at: the same shape over the same memory."""
        return (values.data_ptr(), values.shape, values.stride()) == self._identity

    def result(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest values of all blocks, when each row has been looked at once."""
        if self._bits is not None:
            low, high = self._bits.result()
        else:
            ((low, high),) = self._ends  # a device is shown whole tensors
        return low.view(self._shape), high.view(self._shape)


class _Bits:
    """Both ends of a range, from two integer maxima over the bits of its values."""

    def __init__(self, values: Tensor, axis: int | None) -> None:
        integer, signed, unsigned = _INTEGERS[values.dtype]
        self.dtype, self.axis, self.shape = values.dtype, axis, tuple(values.shape)
        self.rows: _Array = values.view(integer).view(len(values), -1).numpy()
        self.signed, self.unsigned = signed, unsigned
        self.sign = unsigned(1) << unsigned(8 * self.rows.itemsize - 1)
        self.infinity = unsigned(torch.tensor(math.inf, dtype=values.dtype, device="cpu").view(integer).item())
        # with a range per row each block has its own place in these; else it is one more part
        self.most: _Array = np.empty(len(values) if axis == 0 else 0, signed)
        self.least: _Array = np.empty(len(self.most), unsigned)
        self.parts: list[tuple[_Array, _Array]] = []

    def look(self, first: int, end: int) -> None:
        step = max(1, _BLOCK // (self.rows.shape[1] * self.rows.itemsize))
        for at in range(first, min(end, len(self.rows)), step):
            block = slice(at, min(end, at + step))
            rows = self.rows[block]
            if self.axis == 0 and rows.shape[1] < _SHORT:
                # numpy calls its inner loop once for each row, torch makes one of many short ones; it has no unsigned
                # integers, but those with the first bit turned over are in the order of signed ones
                values = torch.from_numpy(rows)
                torch.amax(values, 1, out=torch.from_numpy(self.most[block]))
                least = self.least[block].view(self.signed)
                torch.amax(values.bitwise_xor(int(self.sign.view(self.signed))), 1, out=torch.from_numpy(least))
                np.bitwise_xor(least, self.sign.view(self.signed), out=least)
            elif self.axis == 0:
                np.maximum.reduce(rows, axis=1, out=self.most[block])
                np.maximum.reduce(rows.view(self.unsigned), axis=1, out=self.least[block])
            else:
                most = self._reduced(rows, np.maximum)
                self.parts.append((most, self._reduced(rows.view(self.unsigned), np.maximum)))

    def result(self) -> tuple[Tensor, Tensor]:
        if self.axis == 0:
            most, least = self.most, self.least
        else:
            most = np.maximum.reduce([most for most, _ in self.parts])
            least = np.maximum.reduce([least for _, least in self.parts])
        nan = (most > self.infinity.astype(self.signed)) | (least > (self.sign | self.infinity))
        low, high = least.view(self.signed), most
        # nothing negative: the smallest is the smallest as an integer; nothing else: the largest is the negative one of
        # smallest size
        unsigned = self.rows.view(self.unsigned)
        for end, odd, rows in ((low, least < self.sign, self.rows), (high, most < 0, unsigned)):
            if odd.any():
                end[odd] = self._smallest(rows, odd).view(self.signed)
        ends = [torch.from_numpy(end).view(self.dtype) for end in (low, high)]
        if nan.any():
            ends = [end.masked_fill(torch.from_numpy(nan), math.nan) for end in ends]
        return ends[0], ends[1]

    def _smallest(self, rows: _Array, wanted: _Array) -> _Array:
        """The smallest integer of each channel that is wanted."""
        if self.axis != 0:
            return self._reduced(rows, np.minimum)[wanted]
        step = max(1, _BLOCK // (rows.shape[1] * rows.itemsize))
        numbers = np.flatnonzero(wanted)
        pieces = [rows[numbers[at : at + step]] for at in range(0, len(numbers), step)]
        return np.concatenate([np.minimum.reduce(piece, axis=1) for piece in pieces])

    def _reduced(self, rows: _Array, how: np.ufunc) -> _Array:
        """Reduce all but the axis; shape `(channels,)`."""
        if self.axis is None:
            found: _Array = how.reduce(rows.reshape(1, -1), axis=1)
            return found
        before, channels = len(rows) * math.prod(self.shape[1 : self.axis]), self.shape[self.axis]
        # whole rows at first, which are long
        return how.reduce(how.reduce(rows.reshape(before, -1), axis=0).reshape(channels, -1), axis=1)  # type: ignore[no-any-return]


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
