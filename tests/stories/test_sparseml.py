"""SparseML: `missing conv1.quant.activation_post_process.scale`, and a QAT file in which all is float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from common import FOLDER, PAIRS_CNN, Cnn, eager, images, read, real, same, stateful
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    QConfig,
    QuantWrapper,
    fuse_modules_qat,
    prepare_qat,
)

import qat_compat as qc
from qat_compat.testing import assert_same_output, assert_same_state, assert_twin

# the scheme that the recipe in the file names: 8 bits, per tensor, asymmetric inputs on the signed grid
_INPUT = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8, reduce_range=False
)
_WEIGHT = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_tensor_symmetric,
    reduce_range=False,
)


def wrap(model: nn.Module) -> nn.Module:
    """Fused, and every layer with a `QuantWrapper` around it, as SparseML prepares a model."""
    model = fuse_modules_qat(model.train(), [list(names) for names in PAIRS_CNN])
    for name in ("conv1", "conv2", "pool", "head"):
        inner = getattr(model, name)
        inner.qconfig = QConfig(activation=nn.Identity, weight=_WEIGHT)
        wrapper = QuantWrapper(inner)
        wrapper.qconfig = wrapper.quant.qconfig = QConfig(activation=_INPUT, weight=_WEIGHT)
        inner.qconfig = QConfig(activation=nn.Identity, weight=_WEIGHT)
        setattr(model, name, wrapper)
    return prepare_qat(model, inplace=True)


def recast(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What SparseML's `save_model` does to every tensor."""
    return {key: value.to(torch.float32) for key, value in state.items()}


def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float model's share of a wrapped state dict, by hand."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if "activation_post_process" not in key and "weight_fake_quant" not in key:
            name = key.replace(".module.", ".").replace("conv1.bn.", "bn1.").replace("conv2.bn.", "bn2.")
            found[name] = value
    return found


def trained() -> nn.Module:
    model = wrap(Cnn())
    for batch in images():
        model(batch)
    return model


@real
def test_the_missing_scale_of_the_title() -> None:
    """A float file into the wrapped model: torch names 40-odd missing keys; here they are synthesized."""
    raw = read("sparseml/float.pth", "state_dict")
    with pytest.raises(RuntimeError, match=r"conv1\.quant\.activation_post_process\.scale"):
        wrap(Cnn()).load_state_dict(raw)
    exact = {key: value.long() if key.endswith("tracked") else value for key, value in raw.items()}
    twin = assert_twin(Cnn, wrap, exact, images(), source=FOLDER / "sparseml/float.pth")
    assert twin.report.copied == 14
    assert not any("lost" in text or "loss" in text for text in twin.report.warnings)


@real
def test_everything_in_float32_is_resumed_bit_for_bit() -> None:
    plain = read("sparseml/qat_default_plain_state_dict.pth")
    checkpoint = qc.open_checkpoint(FOLDER / "sparseml/qat_default.pth")
    assert (checkpoint.framework, checkpoint.stage) == ("sparseml", "prepared")
    model = wrap(Cnn())
    assert sorted(model.state_dict()) == sorted(plain)
    report = qc.load_checkpoint(model, FOLDER / "sparseml/qat_default.pth")
    assert (report.copied, report.synthesized, report.dropped) == (len(plain), 0, 0)
    same(model.state_dict(), plain)
    other = wrap(Cnn())
    qc.load_checkpoint(other, FOLDER / "sparseml/qat_default_plain_state_dict.pth")
    assert_same_state(other, model)
    assert_same_output(other, model, images())


@real
@pytest.mark.parametrize("name", ["qat_default", "qat_default_plain_state_dict"])
def test_back_to_float(name: str) -> None:
    expected = floats(read("sparseml/qat_default_plain_state_dict.pth"))
    back = qc.to_float(FOLDER / f"sparseml/{name}.pth", like=Cnn())
    same(back, expected)
    if "plain" in name:  # its version record says that bn1 and bn2 were emptied
        same(qc.to_float(FOLDER / f"sparseml/{name}.pth"), expected)
    model = Cnn()
    qc.load_checkpoint(model, FOLDER / f"sparseml/{name}.pth")
    same(model.state_dict(), expected)


@real
def test_into_a_model_that_torch_prepared_itself() -> None:
    """No wrapper there: weights by name, their scales anew, inputs from data."""
    prepare = eager(*PAIRS_CNN)
    expected = floats(read("sparseml/qat_default_plain_state_dict.pth"))
    assert_twin(Cnn, prepare, expected, images(), source=FOLDER / "sparseml/qat_default.pth")


def test_ema_none(tmp_path: Path) -> None:
    """The YOLOv8 integration's container: under QAT there is no average, and `ema` is None."""
    model = trained()
    container = {"epoch": -1, "best_fitness": 0.5, "ema": None, "recipe": "...", "source": "sparseml", "train_args": {}}
    torch.save({**container, "model": dict(model.state_dict())}, tmp_path / "checkpoint.pt")
    checkpoint = qc.open_checkpoint(tmp_path / "checkpoint.pt")
    assert (checkpoint.framework, checkpoint.metadata["best_fitness"]) == ("sparseml", 0.5)
    fresh = wrap(Cnn())
    qc.load_checkpoint(fresh, tmp_path / "checkpoint.pt")
    assert_same_state(fresh, model)


def test_float_in_and_everything_back(tmp_path: Path) -> None:
    state = stateful(Cnn())
    torch.save({"state_dict": recast(state), "epoch": 3}, tmp_path / "float.pth")
    assert_twin(Cnn, wrap, state, images(), source=tmp_path / "float.pth")
    model = trained()
    torch.save({"state_dict": recast(model.state_dict()), "recipe": "..."}, tmp_path / "qat.pth")
    fresh = wrap(Cnn())
    qc.load_checkpoint(fresh, tmp_path / "qat.pth")
    assert_same_state(fresh, model)
    expected = floats(model.state_dict())
    same(qc.to_float(tmp_path / "qat.pth", like=Cnn()), expected)
    same(qc.to_float(model), expected)


def test_without_like_the_recast_file_asks_for_it(tmp_path: Path) -> None:
    """Recasting took the version record, so that nothing says which norm was fused into which layer."""
    torch.save({"state_dict": recast(trained().state_dict())}, tmp_path / "qat.pth")
    with pytest.raises(qc.PlanError, match="pass like="):
        qc.to_float(tmp_path / "qat.pth")


def test_a_value_that_float32_cannot_have_been(tmp_path: Path) -> None:
    """A switch or counter that is no whole number was not recast: it is refused."""
    state = recast(trained().state_dict())
    state["conv1.module.bn.num_batches_tracked"] = torch.tensor(2.5)
    with pytest.raises(qc.CompatError, match="num_batches_tracked"):
        qc.load_checkpoint(wrap(Cnn()), copy.copy(state))
