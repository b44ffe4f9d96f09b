"""What a change of dtype does to values is said, whatever the two dtypes are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import qat_compat as qc
from qat_compat.casting import cast_loss

_INTEGERS = {torch.int8: np.int8, torch.uint8: np.uint8, torch.int16: np.int16, torch.int32: np.int32,
             torch.int64: np.int64, torch.uint16: np.uint16}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), itertools.permutations(_INTEGERS, 2))
def test_integers_that_do_not_fit_are_counted(old: torch.dtype, new: torch.dtype) -> None:
    """Also those that wrap around and back."""
    ends = np.iinfo(_INTEGERS[old])
    values = np.array([ends.min, -1 if ends.min else 1, 0, 2, 100, 200 if ends.max > 200 else 7, ends.max])
    there = np.iinfo(_INTEGERS[new])
    lost = sum(not there.min <= int(value) <= there.max for value in values)
    loss = cast_loss(torch.from_numpy(values.astype(_INTEGERS[old])), new)
    assert (int(loss.text.split()[0]) if loss is not None else 0) == lost
    assert loss is None or loss.fatal


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_rounding_to_eight_bits_is_a_loss_that_is_counted(dtype: torch.dtype) -> None:
    loss = cast_loss(torch.tensor([1.0, 0.3, -0.5]), dtype)
    assert loss is not None and not loss.fatal and loss.text.startswith("1 of 3 values rounded")
    model = torch.nn.Linear(2, 2, bias=False).to(dtype)
    report = qc.load_checkpoint(model, {"weight": torch.tensor([[1.0, 0.3], [0.5, 2.0]])})
    assert "rounded" in report.losses["weight"]
    assert torch.equal(model.weight.float(), torch.tensor([[1.0, 0.3], [0.5, 2.0]]).to(dtype).float())


@pytest.mark.parametrize("new", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "old", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str
)
def test_eight_bits_become_integers_where_they_are_some(old: torch.dtype, new: torch.dtype) -> None:
    assert cast_loss(torch.tensor([1.0, 0.0]).to(old), new) is None
    loss = cast_loss(torch.tensor([1.0, -0.5]).to(old), new)
    assert (loss is None) == new.is_complex
    assert loss is None or (loss.fatal and loss.text.startswith("1 of 2 values cannot be held"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_what_torch_cannot_convert_is_refused(dtype: torch.dtype) -> None:
    loss = cast_loss(torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), dtype)
    assert loss is not None and loss.fatal and "torch cannot convert from float4_e2m1fn_x2" in loss.text


def test_negative_numbers_become_complex_and_come_back() -> None:
    values = torch.tensor([-0.5, 2.0])
    assert cast_loss(values, torch.complex64) is None
    assert cast_loss(values.to(torch.complex64), torch.float32) is None
    assert cast_loss(torch.tensor([1j]), torch.float32) is not None


def test_a_buffer_of_other_integers_is_not_wrapped_around() -> None:
    model = torch.nn.Module()
    model.register_buffer("table", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(qc.PlanError, match="2 of 3 values cannot be held"):
        qc.load_checkpoint(model, {"table": torch.tensor([-1, 2, -100], dtype=torch.int8)})
    assert not model.table.any()
