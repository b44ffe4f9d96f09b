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
from yolo import DFL, Bottleneck, C2f, Conv, Detect, DetectionModel

import qat_compat as qc
from qat_compat.testing import assert_twin

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
    assert_twin(DetectionModel, eager(), recast, images(), source=tmp_path / "best.pt", drop="*_amax")
    same(qc.to_float(tmp_path / "best.pt"), state)


def test_the_ranges_of_its_weights_in_a_prepared_model(tmp_path: Path, installed: pytest.MonkeyPatch) -> None:
    _, beside = write(tmp_path / "best.pt", "ema")
    installed.undo()
    model = eager()(DetectionModel())
    qc.load_checkpoint(model, tmp_path / "best.pt", calibration=images())
    for name in ("model.0.conv", "model.3.cv2.0.1"):
        amax = beside["ranges"][f"{name}.weight_quantizer._amax"].flatten()
        torch.testing.assert_close(
            model.get_submodule(f"{name}.weight_fake_quant").scale, amax / 127, rtol=1e-6, atol=0
        )


def test_modelopts_own_file(tmp_path: Path) -> None:
    quantized = mtq.quantize(trained().eval(), mtq.INT8_DEFAULT_CFG, lambda net: net(images()[0]))
    mto.save(quantized, tmp_path / "modelopt.pt")
    found = qc.open_checkpoint(tmp_path / "modelopt.pt")
    same(found, quantized.state_dict())
    assert (found.framework, found.stage) == ("modelopt", "prepared")
    states = dict(found.metadata["modelopt_state"]["modelopt_state_dict"])
    assert "model.0.conv.weight_quantizer" in states["quantize"]["metadata"]["quantizer_state"]
