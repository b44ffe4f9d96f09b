"""Lightning: one run gives two checkpoints, the original file and what a QAT model of the same network takes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import FUSE_CNN, PAIRS_CNN, Cnn, eager, images, read, real, same, stateful
from torch import Tensor, nn
from torch.ao.quantization import QuantWrapper, fuse_modules_qat, get_default_qat_qconfig, prepare_qat

import qat_compat as qc
from qat_compat.testing import assert_same_output, assert_same_state, assert_twin

PREPARE = eager(*FUSE_CNN)
FILES = {
    "original": "lightning/original-epoch=1.ckpt",
    "compiled": "lightning/compiled-epoch=1.ckpt",
    "average": "lightning/ema-epoch=1.ckpt",
    "bf16": "lightning/bf16true-epoch=1.ckpt",
    "weights": "lightning/weights_only.ckpt",
}


def without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items()}


def ckpt(state: dict[str, Tensor], prefix: str = "model.", **more: Any) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` writes."""
    about = {"epoch": 1, "global_step": 8, "pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {}}
    return {**about, "state_dict": {prefix + k: v for k, v in state.items()}, **more, "hyper_parameters": {"lr": 0.01}}


class Lit(nn.Module):
    """The module that Lightning trains: the network is its attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@real
@pytest.mark.parametrize("name", FILES)
def test_every_form_of_the_file_into_a_prepared_model(name: str) -> None:
    raw = read(FILES[name], "state_dict")
    prefix = "model._orig_mod." if name == "compiled" else "model."
    twin = assert_twin(Cnn, PREPARE, without_prefix(raw, prefix), images(), source=FOLDER_OF(name))
    assert twin.report.copied == 14
    same(qc.to_float(twin.loaded), {k: v.to(twin.loaded.state_dict()["head.weight"].dtype) if v.is_floating_point()
                                    else v for k, v in without_prefix(raw, prefix).items()})  # fmt: skip


def FOLDER_OF(name: str) -> Path:
    from common import FOLDER

    return FOLDER / FILES[name]


@real
def test_the_whole_lightning_module_is_a_target_too() -> None:
    raw = read(FILES["compiled"], "state_dict")
    prepare = eager(*(tuple(f"model.{name}" for name in names) for names in FUSE_CNN))
    state = {f"model.{key}": value for key, value in without_prefix(raw, "model._orig_mod.").items()}
    assert_twin(Lit, prepare, state, images(), source=FOLDER_OF("compiled"))


@real
def test_average_and_live_weights() -> None:
    average, live = read(FILES["average"], "state_dict"), read(FILES["average"], "current_model_state")
    path = FOLDER_OF("average")
    twin = assert_twin(Cnn, PREPARE, without_prefix(average, "model."), images(), source=path)
    assert any("which Lightning with weight averaging itself loads first" in text for text in twin.report.warnings)
    assert_twin(Cnn, PREPARE, without_prefix(live, "model."), images(), source=path, select="current_model_state")
    assert_twin(Cnn, PREPARE, without_prefix(live, "model."), images(), source=path, select="model")


def qat_callback() -> nn.Module:
    """What Lightning 1.9's `QuantizationAwareTraining` makes of the module's `model` (its `fit` start)."""
    lit = nn.Module()
    model = fuse_modules_qat(Cnn().train(), [list(names) for names in PAIRS_CNN])
    lit.model = QuantWrapper(model)
    lit.model.qconfig = get_default_qat_qconfig("x86")
    lit.forward = lambda x: lit.model(x)  # type: ignore[method-assign]
    prepare_qat(lit.model.train(), inplace=True)
    return lit


@real
def test_the_file_of_the_qat_run_is_resumed_and_goes_back_to_float() -> None:
    from common import FOLDER

    path = FOLDER / "lightning/qat-epoch=1.ckpt"
    raw = read("lightning/qat-epoch=1.ckpt", "state_dict")
    checkpoint = qc.open_checkpoint(path)
    assert (checkpoint.framework, checkpoint.stage, checkpoint.metadata["epoch"]) == ("torch_ao", "prepared", 1)
    model = qat_callback()
    report = qc.load_checkpoint(model, path)
    assert (report.copied, report.synthesized, report.derived) == (63, 0, 0)
    same(model.state_dict(), raw)
    float_keys = {k.replace("module.", "").replace("conv1.bn", "bn1").replace("conv2.bn", "bn2"): v
                  for k, v in raw.items() if "fake_quant" not in k and "activation_post_process" not in k}  # fmt: skip
    back = qc.to_float(path)
    same(back, float_keys)
    plain = Cnn()
    qc.load_checkpoint(plain, back)
    same(plain.state_dict(), without_prefix(float_keys, "model."))
    other = PREPARE(Cnn())
    report = qc.load_checkpoint(other, path, calibration=images())
    same(qc.to_float(other), without_prefix(float_keys, "model."))
    again = Cnn()
    qc.load_checkpoint(again, path)
    assert_same_state(again, plain)


@real
def test_one_run_two_checkpoints(tmp_path: Path) -> None:
    """The original file is untouched, and the transformed one opens without this package and resumes bit for bit."""
    path = FOLDER_OF("original")
    before = path.read_bytes()
    model = PREPARE(Cnn())
    qc.load_checkpoint(model, path, calibration=images())
    out = qc.save_checkpoint(model, tmp_path / "qat.ckpt")
    assert path.read_bytes() == before
    same(dict(torch.load(out, weights_only=True)), model.state_dict())
    resumed = PREPARE(Cnn())
    assert qc.load_checkpoint(resumed, out).synthesized == 0
    assert_same_state(resumed, model)
    assert_same_output(resumed, model, images())
    same(qc.to_float(out), without_prefix(read(FILES["original"], "state_dict"), "model."))


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "model.module.", "net."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    state = stateful(Cnn())
    torch.save(ckpt(state, prefix), tmp_path / "epoch=1.ckpt")
    assert_twin(Cnn, PREPARE, state, images(), source=tmp_path / "epoch=1.ckpt")


def test_average_beside_live_weights(tmp_path: Path) -> None:
    average, live = stateful(Cnn(), 1), stateful(Cnn(), 2)
    current = {f"model.{key}": value for key, value in live.items()}
    torch.save(ckpt(average, current_model_state=current), tmp_path / "ema.ckpt")
    assert_twin(Cnn, PREPARE, average, images(), source=tmp_path / "ema.ckpt")
    assert_twin(Cnn, PREPARE, live, images(), source=tmp_path / "ema.ckpt", select="current_model_state")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Lightning itself leaves of a run of FSDP2, as its two sharding strategies write it."""
    folder = tmp_path_factory.mktemp("lightning")
    script = Path(__file__).with_name("lightning_sharded.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


STRATEGIES = pytest.mark.parametrize("strategy", ["model_parallel", "fsdp"])


@STRATEGIES
def test_a_directory_of_shards_and_its_consolidated_file(sharded: Path, strategy: str) -> None:
    directory, file = qc.open_checkpoint(sharded / strategy), qc.open_checkpoint(sharded / f"{strategy}.ckpt")
    assert list(directory) == list(file) == [f"model.{key}" for key in Cnn().state_dict()]
    same(directory, file)
    assert directory.metadata["hyper_parameters"] == file.metadata["hyper_parameters"] == {"rate": 0.01}
    assert directory.metadata["loops"] == file.metadata["loops"]


@STRATEGIES
def test_a_directory_of_shards_into_a_prepared_model(sharded: Path, strategy: str) -> None:
    raw = torch.load(sharded / f"{strategy}.ckpt", weights_only=True)["state_dict"]
    twin = assert_twin(Cnn, PREPARE, without_prefix(raw, "model."), images(), source=sharded / strategy)
    assert twin.report.copied == 14


def test_after_convert_the_file_is_never_taken_for_float_unasked(tmp_path: Path) -> None:
    model = qat_callback()
    model(images()[0])
    converted = torch.ao.quantization.convert(copy.deepcopy(model).eval())
    torch.save(ckpt(dict(converted.state_dict()), ""), tmp_path / "last.ckpt")
    checkpoint = qc.open_checkpoint(tmp_path / "last.ckpt")
    assert (checkpoint.framework, checkpoint.stage) == ("converted", "converted")
    for target in (Cnn(), PREPARE(Cnn())):
        with pytest.raises(qc.PlanError, match=r"the source is a converted \(integer\) checkpoint") as error:
            qc.load_checkpoint(target, tmp_path / "last.ckpt", calibration=images())
        assert len(error.value.problems) == 1
    back = qc.to_float(tmp_path / "last.ckpt", like=Cnn())
    Cnn().load_state_dict(dict(back), strict=True)


def test_the_qat_callbacks_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = qat_callback()
    for batch in images():
        model(batch)
    torch.save(ckpt(dict(model.state_dict()), ""), tmp_path / "qat.ckpt")
    fresh = qat_callback()
    qc.load_checkpoint(fresh, tmp_path / "qat.ckpt")
    same(fresh.state_dict(), model.state_dict())
    back = qc.to_float(tmp_path / "qat.ckpt", like=Lit())
    assert sorted(back) == sorted(Lit().state_dict())
    assert torch.equal(back["model.bn1.running_var"], model.state_dict()["model.module.conv1.bn.running_var"])
