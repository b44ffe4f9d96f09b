"""A whole YOLOv8: Ultralytics' and SparseML's QAT files back to its plain keys, its float file into prepared models."""

from __future__ import annotations

import copy
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
import yolo
from common import eager, same, stateful
from torch import Tensor, nn
from torch.ao.quantization import QuantWrapper, fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torch.ao.quantization.qconfig_mapping import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from yolo import YOLOv8

import qat_compat as qc
from qat_compat.testing import assert_same_output, assert_same_state, assert_twin, scramble

KEYS = 331
FUSE = [(f"{name}.conv", f"{name}.bn") for name, module in YOLOv8().named_modules() if isinstance(module, yolo.Conv)]


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 64, 64, generator=generator) for _ in range(2)]


def trained(seed: int = 0) -> YOLOv8:
    """Weights that half precision holds exactly, as Ultralytics trains them with AMP and stores them."""
    model = YOLOv8()
    state = {key: value - 0.9 if key.endswith("conv.weight") else value for key, value in stateful(model, seed).items()}
    model.load_state_dict({key: value.half().to(value.dtype) for key, value in state.items()})
    return model


def float_file(path: Path) -> dict[str, Tensor]:
    """While training: `model` is None and `ema` is the module, in half precision; the weights in single precision."""
    torch.save({"epoch": 3, "model": None, "ema": trained().half(), "updates": 7, "train_args": {}}, path)
    return dict(trained().state_dict())


def modelopt(model: nn.Module) -> nn.Module:
    return mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, lambda net: [net(batch) for batch in images()])


def fx(model: nn.Module) -> nn.Module:
    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (images()[0],))


def sparseml(model: nn.Module) -> nn.Module:
    """Convolutions fused with their normalizations; every layer and activation in a `QuantWrapper`."""
    model = fuse_modules_qat(model.train(), [list(names) for names in FUSE])
    qconfig = get_default_qat_qconfig("x86")
    fused = [host for host, _ in FUSE]
    lone = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.SiLU)]
    for name in (*fused, *(name for name in lone if name.rpartition(".")[0] not in fused)):
        parent, _, child = name.rpartition(".")
        inner = model.get_submodule(name)
        wrapper = QuantWrapper(inner)
        wrapper.qconfig = wrapper.quant.qconfig = inner.qconfig = qconfig
        setattr(model.get_submodule(parent), child, wrapper)
    return prepare_qat(model, inplace=True)


def test_the_size_of_the_real_network() -> None:
    state = YOLOv8().state_dict()
    assert len(state) == KEYS
    assert len(FUSE) == 53 and "model.22.dfl.conv.weight" in state


def test_ultralytics_qat_file_back_to_the_plain_keys(tmp_path: Path) -> None:
    """The module has the plain keys, and ModelOpt's ranges are beside it."""
    model = trained()
    quantized = modelopt(copy.deepcopy(model))
    ranges = {key: value for key, value in quantized.state_dict().items() if key.endswith("_amax")}
    assert len(ranges) > 100
    beside = {"modelopt": mto.modelopt_state(quantized), "ranges": ranges}
    torch.save(
        {"epoch": -1, "model": model.half(), "ema": None, "train_args": {}, "modelopt": beside}, tmp_path / "q.pt"
    )
    checkpoint = qc.open_checkpoint(tmp_path / "q.pt")
    assert (checkpoint.framework, checkpoint.stage, len(checkpoint)) == ("modelopt", "prepared", KEYS + len(ranges))
    back = qc.to_float(tmp_path / "q.pt")
    assert list(back) == list(YOLOv8().state_dict())
    same(back, model.state_dict())


@pytest.mark.parametrize("recast", [False, True], ids=["with versions", "recast to float32"])
def test_sparseml_qat_file_back_to_the_plain_keys(tmp_path: Path, recast: bool) -> None:
    model = trained()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = sparseml(model)
    wrapped.eval()
    wrapped(images()[0])
    state = wrapped.state_dict()
    assert "model.0.conv.module.bn.running_mean" in state and "model.0.act.quant.activation_post_process.scale" in state
    if recast:  # what SparseML's generic `save_model` does: the version record is lost with it
        state = {key: value.to(torch.float32) for key, value in state.items()}
    container = {"epoch": -1, "best_fitness": 0.5, "ema": None, "recipe": "...", "source": "sparseml", "train_args": {}}
    torch.save({**container, "model": state}, tmp_path / "q.pt")
    checkpoint = qc.open_checkpoint(tmp_path / "q.pt")
    assert (checkpoint.framework, checkpoint.stage) == ("sparseml", "prepared")
    # with the version record went the places of the normalizations, and with the dtypes that counters are integers
    for options in ({"like": YOLOv8()}, *([] if recast else [{"like": list(expected)}, {}])):
        back = qc.to_float(tmp_path / "q.pt", **options)
        same(back, expected)
        YOLOv8().load_state_dict(dict(back), strict=True)


def test_a_float_file_into_a_model_of_eager_mode(tmp_path: Path) -> None:
    state = float_file(tmp_path / "last.pt")
    twin = assert_twin(YOLOv8, eager(*FUSE), state, images(), source=tmp_path / "last.pt")
    assert twin.report.copied == KEYS
    same(qc.to_float(twin.loaded), state)


def test_a_float_file_into_a_model_of_fx_mode(tmp_path: Path) -> None:
    """In training mode nothing calls `dfl`, so that it is not in the graph: the float model tells that it may go."""
    state = float_file(tmp_path / "last.pt")
    with pytest.raises(qc.PlanError, match=r"unexpected +model\.22\.dfl\.conv\.weight"):
        qc.load_checkpoint(fx(YOLOv8()), tmp_path / "last.pt", calibration=images())
    twin = assert_twin(YOLOv8, fx, state, images(), source=tmp_path / "last.pt", float_model=YOLOv8())
    assert (twin.report.copied, twin.report.dropped) == (KEYS - 1, 1)


def test_a_float_file_into_a_model_that_modelopt_prepared(tmp_path: Path) -> None:
    state = float_file(tmp_path / "last.pt")
    native = YOLOv8()
    native.load_state_dict(state)
    native, loaded = modelopt(native), modelopt(scramble(YOLOv8()))
    report = qc.load_checkpoint(loaded, tmp_path / "last.pt", calibration=images())
    assert report.copied == KEYS
    assert_same_state(loaded, native)
    assert_same_output(loaded, native, images())
    same(qc.to_float(loaded), state)
