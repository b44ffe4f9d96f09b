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


# --- an attribute of another name -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A LightningModule whose author calls the network `net`, which is no wrapper's word."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.fixture(scope="module")
def run() -> nn.Module:
    """A QAT model in the middle of its training."""
    torch.manual_seed(0)
    model = PREPARE(Cnn())
    for batch in images(3):
        model(batch)
    return model


def test_a_resume_finds_its_ranges_under_any_attribute(run: nn.Module) -> None:
    """All of the state is the file's, none is made anew, in both directions."""
    bare, under = PREPARE(Cnn()), Net(PREPARE(Cnn()))
    reports = [
        qc.load_checkpoint(bare, ckpt(run.state_dict(), "net.")),
        qc.load_checkpoint(under, run.state_dict()),
    ]
    for report, model in zip(reports, (bare, under.net), strict=True):
        assert (report.copied, report.synthesized, report.dropped) == (len(run.state_dict()), 0, 0)
        assert_same_state(model, run)
    assert_same_state(dict(qc.to_float(ckpt(run.state_dict(), "net."), like=Cnn())), dict(qc.to_float(run)))


@pytest.mark.parametrize("float_model", [None, Cnn, lambda: Net(Cnn())], ids=["alone", "bare", "under"])
def test_a_float_file_goes_under_any_attribute(float_model: Any) -> None:
    state = Cnn().state_dict()
    more = {"float_model": float_model()} if float_model is not None else {}
    expected, under, bare = PREPARE(Cnn()), Net(PREPARE(Cnn())), PREPARE(Cnn())
    qc.load_checkpoint(expected, state, calibration=images())
    qc.load_checkpoint(under, state, calibration=images(), **more)
    qc.load_checkpoint(bare, ckpt(state, "net."), calibration=images(), **more)
    assert_same_state(under.net, expected)
    assert_same_state(bare, expected)


@pytest.mark.parametrize(
    ("make", "inner", "rename"),
    [
        (lambda: PREPARE(Cnn()), "net.", [(r"^net\.", "")]),
        (lambda: Net(PREPARE(Cnn())), "", [(r"^", "net.")]),
        (lambda: PREPARE(Cnn()), "head.", [(r"^head\.(.*)$", r"\1")]),
    ],
)
def test_rename_speaks_of_ranges_too(run: nn.Module, make: Any, inner: str, rename: Any) -> None:
    model = make()
    report = qc.load_checkpoint(model, ckpt(run.state_dict(), inner), rename=rename)
    assert (report.synthesized, report.dropped) == (0, 0)
    assert_same_state(getattr(model, "net", model), run)


def test_one_layer_of_another_name_keeps_its_ranges(run: nn.Module) -> None:
    """Two names may even change places."""
    other = {"conv1": "conv2", "conv2": "conv1"}
    state = {other.get(key.split(".")[0], key.split(".")[0]) + key[key.index(".") :]: value
             for key, value in run.state_dict().items()}  # fmt: skip
    rename = [(r"^conv1\.", "x."), (r"^conv2\.", "conv1."), (r"^x\.", "conv2.")]
    model = PREPARE(Cnn())
    assert qc.load_checkpoint(model, state, rename=rename).synthesized == 0
    assert_same_state(model, run)


# --- a run whose ranges lag -------------------------------------------------------------------------------------------


def test_a_run_resumes_also_where_a_moving_average_lags_far_behind(tmp_path: Path) -> None:
    """Pixels that nobody normalized: the range of the first fused weight is the average of very different ones."""
    torch.manual_seed(0)
    model = PREPARE(Cnn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.rand(8, 3, 16, 16) * 255).square().mean().backward()
        optimizer.step()
    again = PREPARE(Cnn())
    report = qc.load_checkpoint(again, qc.save_checkpoint(model, tmp_path / "own.pt"))
    assert_same_state(again, model)
    assert report.synthesized == 0
    assert any("conv1.weight_fake_quant: the weight reaches" in text for text in report.warnings)


def test_ranges_of_other_weights_that_no_longer_move_are_refused_in_the_words_of_the_file(run: nn.Module) -> None:
    state = {key: value.clone() for key, value in run.state_dict().items()}
    for key, value in state.items():
        if key.endswith("observer_enabled"):
            value.zero_()
    state["conv1.weight"] *= 100
    with pytest.raises(qc.PlanError, match="ranges of other weights") as caught:
        qc.load_checkpoint(PREPARE(Cnn()), ckpt(state))
    assert [p.key for p in caught.value.problems] == ["conv1.weight_fake_quant"]
    assert "drop='model.conv1.weight_fake_quant.*'" in caught.value.problems[0].remedy
    model = PREPARE(Cnn())
    report = qc.load_checkpoint(model, ckpt(state), drop="model.conv1.weight_fake_quant.*")
    assert report.synthesized == 4
    assert not any("the weight reaches" in text for text in report.warnings)
