"""Ranges equal those of torch, whatever the bits, the layout and the blocks."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from qat_compat import ranges
from qat_compat.ranges import RangeOver, value_range

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 6e-8, -6e-8, 65504.0, -65504.0, 1.0]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, or special values among ordinary ones; any strides that fill memory or do not."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = torch.Size(shape).numel()
    if draw(st.booleans()):
        width = 8 * dtype.itemsize
        bits = draw(st.lists(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1), min_size=count, max_size=count))
        value = torch.tensor(bits, dtype=INTEGERS[dtype.itemsize]).view(dtype)
    else:
        ordinary = st.floats(-9, 9, width=16)
        numbers = draw(st.lists(st.sampled_from(SPECIAL) | ordinary, min_size=count, max_size=count))
        value = torch.tensor(numbers, dtype=dtype)
    value = value.view(shape)
    if draw(st.booleans()):
        value = value.permute(draw(st.permutations(range(len(shape)))))
    return value[::2] if draw(st.booleans()) else value


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num(0.0, 2.0, -2.0), theirs.nan_to_num(0.0, 2.0, -2.0))
        assert torch.equal(mine.isinf(), theirs.isinf())


def by_torch(value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    rows = value.movedim(axis, 0).reshape(value.shape[axis], -1)
    low, high = torch.aminmax(rows, dim=1)
    return low, high


# rows are reduced by numpy or, where they are short, by torch
short_rows = st.sampled_from([0, ranges._SHORT]).map(lambda most: mock.patch.object(ranges, "_SHORT", most))


@settings(max_examples=300, deadline=None)
@given(tensors(), short_rows, st.data())
def test_a_range_is_that_of_aminmax(value: Tensor, short: mock._patch, data: st.DataObject) -> None:
    low, high = torch.aminmax(value)
    same(value_range(value), (low, high))
    axis = data.draw(st.integers(-value.dim(), value.dim() - 1))
    with short:
        same(value_range(value, axis), by_torch(value, axis))


@settings(max_examples=200, deadline=None)
@given(tensors(), st.data())
def test_groups_in_any_order_make_the_same_range(value: Tensor, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    value = torch.stack([value] * size, dim=-1).flatten(-2)
    value = value * torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(size)).to(value.dtype)
    found = RangeOver(value, None, size)
    for row in data.draw(st.permutations(range(len(value)))):
        found.look(row, row + 1)
    pieces = value.unflatten(-1, (-1, size))
    low, high = torch.aminmax(pieces.reshape(-1, size), dim=1)
    expected = low.view(pieces.shape[:-1]), high.view(pieces.shape[:-1])
    same(found.result(), expected)
    same(value_range(value, group=size), expected)
    if value.dim() > 1:
        columns = value.movedim(0, -1).contiguous().movedim(-1, 0)  # rows that do not lie in memory as such
        same(value_range(columns, group=size), expected)


@settings(max_examples=200, deadline=None)
@given(tensors(), st.data())
def test_blocks_in_any_order_make_the_same_range(value: Tensor, data: st.DataObject) -> None:
    value = value.contiguous()
    axis = data.draw(st.none() | st.integers(0, value.dim() - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(value)))) | {0, len(value)})
    found = RangeOver(value, axis)
    for first, end in data.draw(st.permutations(list(itertools.pairwise(cuts)))):
        found.look(first, end)
    low, high = torch.aminmax(value)
    same(found.result(), by_torch(value, axis) if axis is not None else (low, high))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FLOATS), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_a_group_is_a_piece_of_a_row(dtype: torch.dtype, rows: int, groups: int, size: int, seed: int) -> None:
    value = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    low, high = torch.aminmax(value.view(rows, groups, size), dim=2)
    same(value_range(value, group=size), (low, high))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
def test_a_range_is_that_of_the_native_observer(dtype: torch.dtype, axis: int | None, poison: float | None) -> None:
    """Large enough for threads and many blocks; both ends of the last block matter."""
    weight = torch.randn(1536, 3072, generator=torch.Generator().manual_seed(0)).to(dtype)
    if poison is not None:
        weight[-1, -1] = poison
    observer = MinMaxObserver() if axis is None else PerChannelMinMaxObserver(ch_axis=axis)
    observer(weight)
    low, high = value_range(weight, axis)
    same((low.float(), high.float()), (observer.min_val, observer.max_val))


def test_what_is_not_plain_memory_is_left_to_torch() -> None:
    whole = torch.arange(-3, 9).view(3, 4)
    same(tuple(t.float() for t in value_range(whole, 1)), by_torch(whole.float(), 1))
    same(value_range(torch.tensor(3.0)), (torch.tensor(3.0), torch.tensor(3.0)))
    expanded = torch.ones(2, 1).expand(2, 3)
    same(value_range(expanded, 0), (torch.ones(2), torch.ones(2)))
