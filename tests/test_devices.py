"""Models on an accelerator: where tensors are after a load, what an error leaves, and how often the host waits.

All of it runs on the late device (`tests/late`), which counts waits, and what needs no count on a real one, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.matrix.flows import FLOWS
from qat_compat.memory import copy_all
from qat_compat.testing import QATModel, assert_same_state, scramble

pytestmark = pytest.mark.gpu


class Blocks(nn.Module):
    """As many convolutions or linear layers as one likes."""

    def __init__(self, count: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        block = self._linear if linear else self._convolution
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.fc = nn.Linear(32 if linear else 4, 4)

    @staticmethod
    def _linear() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU())

    @staticmethod
    def _convolution() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x if self.linear else x.mean((2, 3)))


class Flowing:
    """One flow, over a model of that many blocks on a device."""

    def __init__(self, flow: str, count: int, device: str, folder: Path) -> None:
        linear = flow.startswith("torchao-")
        shape = (2, 32) if linear else (2, 4, 6, 6)
        fuse = [] if linear else [[f"blocks.{i}.{j}" for j in range(3)] for i in range(count)]
        self.flow, self.device, self.folder = FLOWS[flow], device, folder
        self.declared = QATModel(
            "blocks", lambda: Blocks(count, linear).to(device), lambda: torch.randn(shape).to(device), fuse=fuse
        )
        self.batches = [torch.randn(shape) for _ in range(2)]
        torch.manual_seed(count)
        self.float = Blocks(count, linear)
        self.file = folder / f"{count}.safetensors"
        save_file(self.float.state_dict(), self.file)

    def prepared(self) -> nn.Module:
        prepare = next(iter(self.flow.prepare.values()))
        return prepare(scramble(self.declared.build()).train(), self.declared)

    def loaded(self, **options: Any) -> nn.Module:
        model = self.prepared()
        qc.load_checkpoint(model, self.file, **{"calibration": self.batches, **options})
        return model


def places(model: nn.Module) -> set[str]:
    return {str(value.device) for value in model.state_dict().values() if isinstance(value, Tensor)}


# --- how often the host waits -----------------------------------------------------------------------------------------


def _load(flowing: Flowing) -> Callable[[], object]:
    model = flowing.prepared()
    return lambda: qc.load_checkpoint(model, flowing.file, calibration=flowing.batches)


def _defer(flowing: Flowing) -> Callable[[], object]:
    model = flowing.prepared()
    return lambda: qc.load_checkpoint(model, flowing.file, calibration="defer")


def _inplace(flowing: Flowing) -> Callable[[], object]:
    model = flowing.prepared()
    return lambda: qc.load_checkpoint(model, flowing.file, calibration=flowing.batches, inplace=True)


def _resume(flowing: Flowing) -> Callable[[], object]:
    file, model = qc.save_checkpoint(flowing.loaded(), flowing.folder / "qat.pt"), flowing.prepared()
    return lambda: qc.load_checkpoint(model, file)


def _recall(flowing: Flowing) -> Callable[[], object]:
    known, model = qc.calibrate(flowing.loaded(), flowing.batches), flowing.prepared()
    return lambda: qc.load_checkpoint(model, flowing.file, calibration=known)


def _calibrate(flowing: Flowing) -> Callable[[], object]:
    model = flowing.loaded()
    return lambda: qc.calibrate(model, flowing.batches)


def _to_float(flowing: Flowing) -> Callable[[], object]:
    model = flowing.loaded()
    return lambda: qc.to_float(model)


@pytest.mark.parametrize("begin", [_load, _defer, _inplace, _resume, _recall, _calibrate, _to_float])
@pytest.mark.parametrize(
    "flow", ["eager-x86", "eager-qnnpack", "fx-x86", "pt2e-x86", "torchao-static", "torchao-learned"]
)
def test_a_larger_model_is_not_waited_for_more_often(
    tmp_path: Path, accelerator: str, flow: str, begin: Callable[[Flowing], Callable[[], object]]
) -> None:
    if accelerator != "late":
        pytest.skip("only the late device counts how often it is waited for")
    counts = []
    for size in (2, 7):
        call = begin(Flowing(flow, size, accelerator, tmp_path))
        before = torch.late.waits()
        call()
        waits = {name: count - before.get(name, 0) for name, count in torch.late.waits().items()}
        assert waits.pop("event", 0) < 40  # of the ring: for its slots, as many as the file is large
        counts.append({name: count for name, count in waits.items() if count})
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) < 20


def test_many_small_tensors_cross_together(accelerator: str) -> None:
    values = [torch.arange(float(size)).to(dtype) for size in (0, 1, 5, 99) for dtype in (torch.bfloat16, torch.int8)]
    values += [torch.tensor(True), torch.arange(12.0).view(3, 4).t()]
    targets = [torch.zeros_like(value, dtype=torch.float64, device=accelerator) for value in values]
    copy_all(zip(targets, values, strict=True))
    for target, value in zip(targets, values, strict=True):
        assert torch.equal(target.cpu(), value.double())


# --- where tensors are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"mmap": True}], ids=str)
@pytest.mark.parametrize("flow", ["eager-x86", "torchao-static", "modelopt-int8", "brevitas"])
def test_a_load_and_a_resume_leave_nothing_on_the_cpu(
    tmp_path: Path, accelerator: str, flow: str, options: dict[str, bool]
) -> None:
    if FLOWS[flow].missing:
        pytest.skip(f"needs {', '.join(FLOWS[flow].missing)}")
    flowing = Flowing(flow, 2, accelerator, tmp_path)
    model = flowing.loaded(**options)
    assert places(model) == {f"{accelerator}:0"}
    again = flowing.prepared()
    qc.load_checkpoint(again, qc.save_checkpoint(model, tmp_path / "qat.pt"), **options)
    assert places(again) == {f"{accelerator}:0"}
    assert_same_state(again, model)
    assert torch.equal(
        again.eval()(flowing.batches[0].to(accelerator)), model.eval()(flowing.batches[0].to(accelerator))
    )


@pytest.mark.parametrize("way", ["where its quantizers are", "default device", "device="])
def test_a_meta_model_is_made(tmp_path: Path, accelerator: str, way: str) -> None:
    flowing = Flowing("eager-x86" if way == "where its quantizers are" else "torchao-8da4w", 2, accelerator, tmp_path)
    model = flowing.prepared()
    for module in model.modules():
        module._parameters = {
            name: p if p is None else nn.Parameter(p.to("meta")) for name, p in module._parameters.items()
        }
    options = {"device": accelerator} if way == "device=" else {}
    with torch.device(accelerator if way == "default device" else "cpu"):
        qc.load_checkpoint(model, flowing.file, calibration="defer", **options)
    assert places(model) == {f"{accelerator}:0"}


def test_the_way_back_gives_the_file(tmp_path: Path, accelerator: str) -> None:
    flowing = Flowing("eager-x86", 3, accelerator, tmp_path)
    back = qc.to_float(flowing.loaded(), like=flowing.float)
    assert_same_state(dict(back.items()), flowing.float.state_dict())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_on_the_second_device_and_one_on_both(tmp_path: Path, accelerator: str, inplace: bool) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("one device only")
    flowing = Flowing("eager-x86", 3, accelerator, tmp_path)
    second = flowing.prepared().to(f"{accelerator}:1")
    qc.load_checkpoint(second, flowing.file, calibration=flowing.batches, inplace=inplace)
    assert places(second) == {f"{accelerator}:1"}
    both = flowing.prepared()
    both.fc.to(f"{accelerator}:1")
    qc.load_checkpoint(both, flowing.file, calibration="defer", inplace=inplace)
    assert places(both) == {f"{accelerator}:0", f"{accelerator}:1"}
    for model in (second, both):
        back = qc.to_float(model, like=flowing.float)
        assert_same_state(dict(back.items()), flowing.float.state_dict())
    assert torch.accelerator.current_device_index() == 0


# --- what an error leaves ---------------------------------------------------------------------------------------------


def test_after_an_error_the_model_is_as_it_was(tmp_path: Path, accelerator: str) -> None:
    flowing = Flowing("eager-x86", 2, accelerator, tmp_path)
    model = flowing.prepared()
    before = {key: (value, value.clone()) for key, value in model.state_dict().items()}
    model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(qc.CalibrationError):
        qc.load_checkpoint(model, flowing.file, calibration=flowing.batches)
    after = model.state_dict()
    for key, (value, copy) in before.items():
        assert after[key].data_ptr() == value.data_ptr() and torch.equal(after[key], copy), key


def test_nan_in_a_weight_is_said(tmp_path: Path, accelerator: str) -> None:
    flowing = Flowing("eager-x86", 2, accelerator, tmp_path)
    state = flowing.float.state_dict()
    state["blocks.1.0.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(qc.QParamError, match=r"blocks\.1\.0"):
        qc.load_checkpoint(flowing.prepared(), state, calibration="defer")
