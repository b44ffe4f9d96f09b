"""A QAT state into an equal QAT model: what was saved, bit for bit, and nothing made anew."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import FLOWS, cells, prepare_for
from test_calibration import Namesakes
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, get_default_qat_qconfig_mapping, prepare_qat
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_resume, assert_same_state, native_calibration, scramble

_CELLS = cells(
    "eager-x86/plain crossed residual tied shared fixed transformer partial conv3d",
    "eager-qnnpack/plain",
    "eager-x86-v0/plain",
    "eager-minmax-per-tensor/plain bf16",
    "eager-average-per-channel/plain",
    "eager-histogram/plain",
    "eager-embedding/embedding",
    "fx-x86/plain residual constants tied linear_bn fixed",
    "fx-skip/plain",
    "pt2e-x86/plain residual functional",
    "pt2e-sharing/functional",
    "torchao-int8-int4/transformer tied",
    "torchao-weight-only/tied",
    "torchao-learned/transformer",
)


def trained(flow: str, name: str, steps: int = 2) -> nn.Module:
    """A model of that cell after calibration and some steps, with an observer switched off and another not."""
    arch = ARCHS[name]
    model = arch.make(3)
    model = prepare_for(flow, name)(model)
    batches = arch.batches()
    native_calibration(model, batches)
    if FLOWS[flow].kind != "pt2e":
        model.train()
    # A learned scale that a large step takes below zero is no state to resume from.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4 if flow == "torchao-learned" else 0.01)
    for batch in (batches * steps)[:steps]:
        optimizer.zero_grad()
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        (output if isinstance(output, Tensor) else output[0]).square().mean().backward()
        optimizer.step()
    switched = [module for module in model.modules() if hasattr(module, "observer_enabled")]
    for module in switched[::2]:
        module.observer_enabled.fill_(0)
    for module in switched[::3]:
        module.fake_quant_enabled.fill_(0)
    return model


@pytest.mark.parametrize(("flow", "name"), _CELLS)
def test_resume(flow: str, name: str) -> None:
    arch = ARCHS[name]
    model = trained(flow, name)
    report = assert_resume(arch.make, prepare_for(flow, name), model, arch.batches(seed=7))
    assert report.copied >= len(model.state_dict())


def test_resume_needs_no_data_for_what_is_not_in_a_file() -> None:
    """Static torchao quantizers save nothing: with data they are made anew, without they are asked for."""
    arch, prepare = ARCHS["transformer"], prepare_for("torchao-static", "transformer")
    model = trained("torchao-static", "transformer")
    with pytest.raises(qc.CalibrationError, match="activation_fake_quantizer"):
        qc.load_checkpoint(prepare(scramble(arch.make())), model.state_dict())
    loaded = prepare(scramble(arch.make()))
    qc.load_checkpoint(loaded, model.state_dict(), calibration=arch.batches())
    expected = arch.make()
    expected.load_state_dict(model.state_dict())
    expected = prepare(expected)
    native_calibration(expected, arch.batches())
    assert_same_state(loaded, expected)


def _version_1(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state as torch 1.5 would have named it: BN tensors on the ConvBn itself, per-channel ranges in the plural."""
    bn = {"weight": "gamma", "bias": "beta"}
    old: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner.endswith(".bn"):
            key = f"{owner.removesuffix('.bn')}.{bn.get(leaf, leaf)}"
        elif leaf in ("min_val", "max_val") and "weight_fake_quant" in owner:
            key = f"{owner}.{leaf}s"
        elif leaf == "eps":
            continue
        old[key] = value.clone()
    return old


class TwiceCalled(nn.Module):
    """Its head has several outputs in a graph, and pooling shares the quantizer of what it pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        return self.pool(self.head(fine)) + self.pool(self.head(self.down(fine)))


def test_a_file_of_ours_resumes_a_graph_that_shares_quantizers(tmp_path: Path) -> None:
    batches = [torch.randn(2, 3, 8, 8)]

    def prepare(model: nn.Module) -> nn.Module:
        return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (batches[0],))

    model = prepare(TwiceCalled())
    native_calibration(model, batches)
    loaded = prepare(TwiceCalled())
    qc.load_checkpoint(loaded, qc.save_checkpoint(model, tmp_path / "qat.pt"))
    assert_same_state(loaded, model)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("parts", [["fc"], ["quant", "fc"], ["quant", "fc", "model.quant"]])
def test_no_range_is_that_of_a_namesake(saved: bool, parts: list[str], tmp_path: Path) -> None:
    def prepare(names: list[str]) -> nn.Module:
        model = Namesakes().train()
        for name in names:
            model.get_submodule(name).qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(model)

    batches = [torch.randn(8, 4)]
    trained, expected, loaded = prepare(["model.quant", "model.fc"]), prepare(parts), prepare(parts)
    native_calibration(trained, batches)
    source = qc.save_checkpoint(trained, tmp_path / "qat.pt") if saved else trained.state_dict()
    qc.load_checkpoint(loaded, source, calibration=batches)
    expected.load_state_dict(trained.state_dict(), strict=False)
    native_calibration(expected, batches)
    for quantizer in ("quant", "fc.activation_post_process", "fc.weight_fake_quant"):
        assert_same_state(loaded.get_submodule(quantizer), expected.get_submodule(quantizer))


@pytest.mark.parametrize("metadata", [False, True])
def test_resume_from_an_old_layout(metadata: bool) -> None:
    arch, prepare = ARCHS["plain"], prepare_for("eager-x86", "plain")
    model = trained("eager-x86", "plain")
    source: Any = _version_1(model)
    if metadata:
        source._metadata = OrderedDict({name: {"version": 1} for name, _ in model.named_modules()})
    loaded = prepare(scramble(arch.make()))
    qc.load_checkpoint(loaded, source)
    assert_same_state(loaded, model)


def test_a_trained_state_is_never_calibrated_again() -> None:
    """Calibration data that would widen every range has no effect, also not on weight quantizers."""
    arch, prepare = ARCHS["plain"], prepare_for("eager-x86", "plain")
    model = trained("eager-x86", "plain")
    loaded = prepare(scramble(arch.make()))
    qc.load_checkpoint(loaded, model.state_dict(), calibration=[100 * batch for batch in arch.batches()])
    assert_same_state(loaded, model)
