"""What a float model, a forward and the statistics of the data tell of normalizations that fusion renamed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import qat_compat as qc
from qat_compat.testing import assert_same_state, assert_twin, scramble


class Interleaved(nn.Module):
    """Both convolutions run before either normalization, so that the order of the trace tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv1(x), self.conv2(x)
        y = self.bn2(left) + self.bn1(right)
        return self.fc(torch.relu(y).mean((2, 3)))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(2)]


def _make() -> nn.Module:
    torch.manual_seed(0)
    model = Interleaved()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
        model.train()(torch.cat(_batches()))
    return model


def _prepare(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = QConfigMapping().set_global(get_default_qat_qconfig("x86"))
        return prepare_qat_fx(model.train(), mapping, (_batches()[0],))


def test_refused_without_data_or_float_model() -> None:
    model = _prepare(scramble(_make()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, _make().state_dict(), calibration="defer")
    problems = caught.value.problems
    assert [(p.kind.value, p.key) for p in problems] == [("ambiguous", "conv1.bn"), ("ambiguous", "conv2.bn")]
    assert all("bn1 or bn2" in p.detail or "bn2 or bn1" in p.detail for p in problems)
    assert_same_state(model.state_dict(), before)


def test_running_statistics_decide_with_data() -> None:
    state = _make().state_dict()
    twin = assert_twin(_make, _prepare, state, _batches())
    assert torch.equal(twin.loaded.conv1.bn.running_mean, state["bn2.running_mean"])
    assert twin.report.provenance("conv1.bn.weight") == (
        "copy of bn2.weight: running statistics of the calibration data"
    )


def test_float_model_decides() -> None:
    twin = assert_twin(_make, _prepare, _make().state_dict(), _batches(), float_model=Interleaved())
    assert twin.report.provenance("conv1.bn.weight") == "copy of bn2.weight: trace of the float model"


def test_data_that_fits_both_decides_nothing() -> None:
    """With equal statistics there is nothing to tell the two apart, and nothing is guessed."""
    state = _make().state_dict()
    for leaf in ("running_mean", "running_var"):
        state[f"bn2.{leaf}"] = state[f"bn1.{leaf}"].clone()
    with pytest.raises(qc.PlanError, match="ambiguous"):
        qc.load_checkpoint(_prepare(scramble(_make())), state, calibration=_batches())


def test_a_plan_reads_no_tensor_to_decide() -> None:
    plan = qc.plan_load(_prepare(_make()), _make().state_dict(), calibration=_batches())
    assert {p.kind.value for p in plan.problems} == {"ambiguous"}


class Untraceable(Interleaved):
    """The naming convention is a complete bijection here, and wrong."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numpy().sum() == float("inf"):  # a trace stops here
            return x
        return super().forward(x)


def test_convention_that_the_data_speaks_against_is_refused() -> None:
    from torch.ao.quantization import fuse_modules_qat, prepare_qat

    def prepare(model: nn.Module) -> nn.Module:
        fused = fuse_modules_qat(model.train(), [["conv1", "bn2"], ["conv2", "bn1"]])
        for name in ("bn1", "bn2"):
            setattr(fused, name, _Silent())  # no identity is left for a forward to pass through
        fused.qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(fused)

    model = Untraceable()
    model.load_state_dict(_make().state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare(copy.deepcopy(model))
    with pytest.raises(qc.PlanError, match="its name says bn1"):
        qc.load_checkpoint(prepared, state, calibration=_batches())


class _Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)
