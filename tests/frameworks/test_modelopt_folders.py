"""Trained models as folders that ModelOpt itself restores, without a model of its own at hand."""

from __future__ import annotations

import copy
import errno
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_modelopt
import torch
from native import batches, float_state, make_float, native
from safetensors.torch import load_file
from test_ranges_in import affine, wide
from test_translation import WEIGHTS, torch_ao
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, fuse_modules_qat, prepare_qat
from torchao.quantization import PerAxis, PerGroup, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import qat_compat as qc
from qat_compat.testing import assert_same_output, assert_same_state

mto = test_modelopt.mto


def restored(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """ModelOpt's own way back."""
    model = mto.restore_from_modelopt_state(model or make_float(), modelopt_state_path=folder / "modelopt_state.pth")
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def learned(dtype: torch.dtype, granularity: Any) -> nn.Module:
    """torchao's QAT of the linear layers, with trained scales."""
    static: dict[str, Any] = {"is_dynamic": False, "range_learning": True, "zero_point_precision": torch.float32}
    config = IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=True, **static)
    model = make_float()
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    qc.load_checkpoint(model, float_state(), calibration=batches())
    with torch.no_grad():
        for layer in (model.fc1, model.fc2):
            layer.weight_fake_quantizer.scale.mul_(1.3)
    return model


def dynamic(dtype: torch.dtype, granularity: Any, symmetric: bool = True) -> nn.Module:
    """torchao's usual QAT, whose scales are those of the weight as it is."""
    model = make_float()
    model.load_state_dict(float_state())
    config = IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=symmetric)
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    return model


def dynamic_inputs() -> nn.Module:
    model = make_float()
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=True)
    weights = IntxFakeQuantizeConfig(torch.int4, PerGroup(16))
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return model


DYNAMIC = "torchao, worked out anew"  # it has no state, so that a file of it does not say that anything is quantized
SOURCES: dict[str, Callable[[], nn.Module]] = {
    "torch.ao": lambda: wide(torch_ao()),
    "torch.ao, narrow": lambda: wide(torch_ao(-127)),
    "torch.ao, 4 bits": lambda: wide(torch_ao(-8, 7)),
    "torchao": lambda: learned(torch.int8, PerAxis(0)),
    "torchao, groups of 4 bits": lambda: learned(torch.int4, PerGroup(16)),
    DYNAMIC: lambda: dynamic(torch.int4, PerGroup(16)),
    "modelopt": lambda: native(test_modelopt.prepare, float_state(), batches()),
}


FILES = [(name, suffix) for name in SOURCES for suffix in ("live", "pt") if (name, suffix) != (DYNAMIC, "pt")]


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_modelopt_restores_what_was_trained(name: str, suffix: str, tmp_path: Path) -> None:
    source = SOURCES[name]()
    held = source if suffix == "live" else qc.save_checkpoint(source, tmp_path / "qat.pt")
    folder = qc.convert_checkpoint(held, "modelopt", tmp_path / "out", like=make_float())
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "modelopt_state.pth"]
    model = restored(folder)
    assert_same_state(dict(qc.to_float(model)), float_state())
    expected, found = qc.to_float(source, weights="quantized"), qc.to_float(model, weights="quantized")
    for key in WEIGHTS:
        weight = float_state()[key]
        same = torch.isclose(found[key], expected[key], rtol=1e-5, atol=1e-6)
        # half-way between two levels, the last bit of the scale decides
        torch.testing.assert_close((found[key] - weight).abs(), (expected[key] - weight).abs(), rtol=1e-4, atol=1e-6)
        assert float(same.double().mean()) > (0.99 if name == DYNAMIC else 1 - 1e-9), key
    assert not torch.allclose(found["fc1.weight"], float_state()["fc1.weight"], rtol=1e-5, atol=1e-6)
    if name == DYNAMIC:
        return
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batches()[0]), source.eval()(batches()[0]), rtol=1e-4, atol=1e-5)


def test_its_own_models_come_back_bit_for_bit(tmp_path: Path) -> None:
    source = SOURCES["modelopt"]()
    mto.save(source, tmp_path / "mto.pt")
    for number, held in enumerate((source, tmp_path / "mto.pt")):
        folder = qc.convert_checkpoint(held, "modelopt", tmp_path / str(number), like=make_float())
        model = restored(folder)
        assert_same_state(model, source)
        assert_same_output(model, source, batches())
        again = qc.convert_checkpoint(folder / "model.safetensors", "modelopt", tmp_path / "again", like=make_float())
        assert_same_state(restored(again), source)
        for path in again.iterdir():
            path.unlink()


def test_it_can_be_trained_on(tmp_path: Path) -> None:
    folder = qc.convert_checkpoint(SOURCES["torch.ao"](), "modelopt", tmp_path / "out", like=make_float())
    model = restored(folder)
    before = model.fc1.weight.clone()
    test_modelopt.train(model)
    assert not torch.equal(model.fc1.weight, before)
    mto.save(model, tmp_path / "trained.pt")
    assert_same_state(mto.restore(make_float(), tmp_path / "trained.pt"), model)


def folded() -> nn.Module:
    model = fuse_modules_qat(make_float().train(), [["conv1", "bn1"]])
    model.qconfig = torch_ao().qconfig
    return wide(prepare_qat(model))


def quantized_outputs() -> nn.Module:
    model = make_float(5).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return wide(prepare_qat(model))


def symmetric_outputs() -> nn.Module:
    """Which ModelOpt's output quantizers can be."""
    config = torch_ao().qconfig
    output = FakeQuantize.with_args(
        observer=MinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
    )
    model = make_float(5).train()
    model.qconfig = torch.ao.quantization.QConfig(activation=output, weight=config.weight)
    return wide(prepare_qat(model))


def test_symmetric_outputs_are_quantized_as_they_were(tmp_path: Path) -> None:
    source = symmetric_outputs()
    model = restored(qc.convert_checkpoint(source, "modelopt", tmp_path / "out", like=make_float()))
    quantizer: Any = source.fc1.activation_post_process
    torch.testing.assert_close(model.fc1.output_quantizer._amax, quantizer.scale[0] * 127)
    assert model.fc1.output_quantizer.is_enabled and not model.fc1.input_quantizer.is_enabled


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "asymmetric weights": (lambda: wide(affine()), "its grid is -128..127 affine"),
    "asymmetric outputs": (quantized_outputs, r"its grid is 0\.\.127 affine"),
    "a folded normalization": (folded, "a normalization is folded into"),
    "no grid in the file": (lambda: wide(torch_ao()).state_dict(), "the source's grid is not known"),
    "inputs worked out anew": (dynamic_inputs, "fc1.activation_fake_quantizer: its range is worked out anew"),
    "an asymmetric weight": (lambda: dynamic(torch.int4, PerGroup(16), symmetric=False), "another than 0"),
    "no quantizers": (float_state, "nothing says to which integers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_modelopt_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    source, reason = REFUSED[case]
    with pytest.raises(qc.PlanError, match=reason):
        qc.convert_checkpoint(source(), "modelopt", tmp_path / "out", like=make_float())
    assert list(tmp_path.iterdir()) == []


def test_without_the_float_model_its_quantizers_are_not_known(tmp_path: Path) -> None:
    for like in (None, float_state()):
        with pytest.raises(qc.CompatError, match="the quantizers of every module"):
            qc.convert_checkpoint(wide(torch_ao()), "modelopt", tmp_path / "out", like=like)
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    path = qc.save_checkpoint(SOURCES["torch.ao"](), tmp_path / "qat.pt")
    opened = qc.open_checkpoint(path)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(key: str) -> Tensor:
        nonlocal most
        value = opened[key].clone()
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    source = qc.Checkpoint({key: opened.spec(key) for key in opened}, read, name="large", record=opened.record)
    model = make_float()
    folder = qc.convert_checkpoint(source, "modelopt", tmp_path / "out", like=model)
    assert len(alive) >= len(float_state())
    assert most <= 4
    assert_same_state(model, make_float())  # nothing of ModelOpt is put into the model that says what it looks like
    assert restored(folder) is not None


HUGGING_FACE = """
import sys

import modelopt.torch.opt as mto
import torch
from transformers import AutoModelForCausalLM

mto.enable_huggingface_checkpointing()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
"""


def test_transformers_takes_the_folder_as_a_model(tmp_path: Path) -> None:
    """With embeddings that are tied, and in a process of its own: ModelOpt changes `from_pretrained`."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    like = transformers.LlamaForCausalLM(config)
    static: dict[str, Any] = {"is_dynamic": False, "range_learning": True, "zero_point_precision": torch.float32}
    weights = IntxFakeQuantizeConfig(torch.int4, PerGroup(16), is_symmetric=True, **static)
    source = copy.deepcopy(like)
    quantize_(source, QATConfig(weight_config=weights, step="prepare"))
    qc.load_checkpoint(source, like.state_dict())
    with torch.no_grad():
        for path, parameter in source.named_parameters():
            if path.endswith("fake_quantizer.scale"):
                parameter.mul_(1.3)
        expected = source.eval()(torch.arange(8)[None]).logits
    folder = qc.convert_checkpoint(source, "modelopt", tmp_path / "out", like=like)
    command = [sys.executable, "-W", "ignore", "-c", HUGGING_FACE, str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


def test_without_modelopt_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(qc.CompatError, match="pip install nvidia-modelopt"):
        qc.convert_checkpoint(wide(torch_ao()), "modelopt", tmp_path / "out", like=make_float())
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(qc.SaveError, match=r"No space left[\s\S]*free space"):
        qc.convert_checkpoint(wide(torch_ao()), "modelopt", tmp_path / "out", like=make_float())
    assert not list(tmp_path.iterdir())
