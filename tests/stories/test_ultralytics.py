"""Ultralytics: half-precision modules pickled whole, ModelOpt's ranges beside them, and no package to read them."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from common import eager, same, stateful
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.testing import assert_twin


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=0.001, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c, 3), Conv(c, c, 3)
        self.add = True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class DFL(nn.Module):
    def __init__(self, c1: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)


class Detect(nn.Module):
    anchors = torch.empty(0)

    def __init__(self, nc: int, ch: tuple[int, ...]) -> None:
        super().__init__()
        self.nc, self.stride = nc, torch.zeros(len(ch))  # a plain attribute, not a buffer
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(c, 8, 3), nn.Conv2d(8, 16, 1)) for c in ch)
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(c, nc, 3), nn.Conv2d(nc, nc, 1)) for c in ch)
        self.dfl = DFL()

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        found = [torch.cat((a(one), b(one)), 1) for a, b, one in zip(self.cv2, self.cv3, x, strict=True)]
        if self.training:
            return found
        boxes = torch.cat([one[:, :16].flatten(2) for one in found], 2).unflatten(1, (4, 4)).transpose(2, 1)
        return [*found, self.dfl.conv(boxes.softmax(1))]


class DetectionModel(nn.Module):
    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.yaml = {"nc": nc, "backbone": [[-1, 1, "Conv", [8, 3, 2]]]}
        self.model = nn.Sequential(Conv(3, 8, 3, 2), C2f(8, 8), Conv(8, 16, 3, 2), Detect(nc, (8, 16)))
        self.names = {i: f"{i}" for i in range(nc)}
        self.criterion = None

    def forward(self, x: Tensor) -> list[Tensor]:
        small = self.model[1](self.model[0](x))
        return self.model[3]([small, self.model[2](small)])


PLACES = {
    "ultralytics.nn.modules.conv": (Conv,),
    "ultralytics.nn.modules.block": (Bottleneck, C2f, DFL),
    "ultralytics.nn.modules.head": (Detect,),
    "ultralytics.nn.tasks": (DetectionModel,),
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The classes are where Ultralytics has them, until :meth:`undo` is called."""
    for name, classes in PLACES.items():
        for end in range(len(name.split("."))):
            monkeypatch.setitem(sys.modules, ".".join(name.split(".")[: end + 1]), types.ModuleType(name))
        for cls in classes:
            monkeypatch.setattr(cls, "__module__", name)
            monkeypatch.setattr(sys.modules[name], cls.__name__, cls, raising=False)
    yield monkeypatch


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(2)]


def trained(seed: int = 0) -> DetectionModel:
    model = DetectionModel()
    model.load_state_dict({key: value.half().to(value.dtype) for key, value in stateful(model, seed).items()})
    return model


def quantization(model: nn.Module) -> dict[str, Any]:
    """What Ultralytics keeps beside the module: ModelOpt's own state, and the ranges of a model that it quantized."""
    quantized = mtq.quantize(
        copy.deepcopy(model).eval(), mtq.INT8_DEFAULT_CFG, lambda net: [net(batch) for batch in images()]
    )
    ranges = {key: value for key, value in quantized.state_dict().items() if key.endswith("_amax")}
    return {"modelopt": mto.modelopt_state(quantized), "ranges": ranges}


FORMS = pytest.mark.parametrize("form", ["ema", "model", "both"])


def write(path: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """While training `model` is None; a stripped file has no `ema`; older files have both."""
    model = trained()
    beside = quantization(model)
    half, other = copy.deepcopy(model).half(), trained(1).half()
    modules = {"ema": (None, half), "model": (half, None), "both": (other, half)}[form]
    about = {"epoch": -1, "updates": 7, "optimizer": None, "train_args": {"imgsz": 32}, "version": "8.4.190"}
    torch.save({**about, "model": modules[0], "ema": modules[1], "modelopt": beside}, path)
    return dict(half.state_dict()), beside


@FORMS
def test_the_modules_tensors_and_the_ranges(tmp_path: Path, installed: pytest.MonkeyPatch, form: str) -> None:
    state, beside = write(tmp_path / "best.pt", form)
    installed.undo()
    found = qc.open_checkpoint(tmp_path / "best.pt")
    assert "ultralytics" not in sys.modules
    assert list(found) == [*state, *beside["ranges"]]
    same(found, {**state, **beside["ranges"]})
    assert {found.spec("model.0.conv.input_quantizer._amax").shape} == {()}
    assert found.spec("model.0.conv.weight_quantizer._amax").shape == (8, 1, 1, 1)
    assert (found.framework, found.stage) == ("modelopt", "prepared")
    assert [note.endswith("also there: model") for note in found.notes] == ([True] if form == "both" else [])


@FORMS
def test_modelopts_own_state_is_plain_data(tmp_path: Path, installed: pytest.MonkeyPatch, form: str) -> None:
    _, beside = write(tmp_path / "best.pt", form)
    installed.undo()
    metadata = qc.open_checkpoint(tmp_path / "best.pt").metadata
    assert metadata["train_args"] == {"imgsz": 32}
    kept = metadata["modelopt"]["modelopt"]
    assert kept["modelopt_version"] == beside["modelopt"]["modelopt_version"]
    states, expected = (dict(one["modelopt_state_dict"]) for one in (kept, beside["modelopt"]))
    assert list(states) == list(expected)
    quantizers = states["quantize"]["metadata"]["quantizer_state"]
    assert list(quantizers) == list(expected["quantize"]["metadata"]["quantizer_state"])
    weight = quantizers["model.0.conv.weight_quantizer"]
    assert (weight["_num_bits"], weight["_axis"], weight["_disabled"]) == (8, 0, False)


@pytest.mark.parametrize("beside", [None, {"ranges": None}, {"ranges": {}}], ids=str)
def test_a_run_without_ranges(tmp_path: Path, installed: pytest.MonkeyPatch, beside: Any) -> None:
    torch.save({"model": trained().half(), "ema": None, "train_args": {}, "modelopt": beside}, tmp_path / "best.pt")
    installed.undo()
    found = qc.open_checkpoint(tmp_path / "best.pt")
    same(found, trained().half().state_dict())
    assert (found.framework, found.stage) == ("plain", "float")


def test_into_a_prepared_model_and_back(tmp_path: Path, installed: pytest.MonkeyPatch) -> None:
    state, _ = write(tmp_path / "best.pt", "ema")
    installed.undo()
    recast = {key: value.to(trained().state_dict()[key].dtype) for key, value in state.items()}
    assert_twin(DetectionModel, eager(), recast, images(), source=tmp_path / "best.pt")
    same(qc.to_float(tmp_path / "best.pt"), state)


def test_modelopts_own_file(tmp_path: Path) -> None:
    quantized = mtq.quantize(trained().eval(), mtq.INT8_DEFAULT_CFG, lambda net: net(images()[0]))
    mto.save(quantized, tmp_path / "modelopt.pt")
    found = qc.open_checkpoint(tmp_path / "modelopt.pt")
    same(found, quantized.state_dict())
    assert (found.framework, found.stage) == ("modelopt", "prepared")
    states = dict(found.metadata["modelopt_state"]["modelopt_state_dict"])
    assert "model.0.conv.weight_quantizer" in states["quantize"]["metadata"]["quantizer_state"]
