"""Weights that a layer works out anew in every forward: ranges are those of the weights that were loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_apply import untouched
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import qat_compat as qc
from qat_compat.derived import weight_like, weight_of

WAYS: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}


def net(way: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    WAYS[way](model[0])
    return model


def trained(way: str) -> dict[str, Tensor]:
    """Five times larger than any weight that was just made."""
    torch.manual_seed(0)
    model = net(way)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("weight_u"):
                parameter.mul_(5)
    return model.state_dict()


def eager(model: nn.Module) -> nn.Module:
    weight = tq.default_per_channel_weight_fake_quant
    model.qconfig = tq.QConfig(activation=nn.Identity, weight=weight)
    return tq.prepare_qat(model.train())


def learning(model: nn.Module) -> nn.Module:
    config = IntxFakeQuantizeConfig(
        torch.int4, group_size=32, is_symmetric=True, is_dynamic=False, range_learning=True,
        scale_precision=torch.float32, zero_point_precision=torch.float32,
    )  # fmt: skip
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    return model.train()


def _scale(model: nn.Module) -> Tensor:
    host: Any = model[0]
    quantizer = getattr(host, "weight_fake_quant", None) or host.weight_fake_quantizer
    return quantizer.scale.detach().clone()


def _wrapped(way: str, prepare: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Preparing keeps neither hooks nor parametrizations of a layer that it replaces."""
    model = prepare(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    WAYS[way](model[0])
    return model


@pytest.mark.parametrize("prepare", [eager, learning])
@pytest.mark.parametrize("way", WAYS)
def test_ranges_are_of_the_loaded_weight(way: str, prepare: Callable[[nn.Module], nn.Module]) -> None:
    state = trained(way)
    torch.manual_seed(1)
    model = _wrapped(way, prepare)
    report = qc.load_checkpoint(model, state)
    found = _scale(model)
    float_model = net(way).eval()
    float_model.load_state_dict(state)
    with torch.no_grad():
        float_model(torch.ones(1, 64))
        weight = float_model[0].weight
        rows = weight.abs().amax(1) if prepare is eager else weight.view(32, 2, 32).abs().amax(-1)
        assert torch.allclose(found.flatten(), rows.flatten() / (127.5 if prepare is eager else 7.5))
    expected = "make the optimizer after it" if prepare is learning else ""
    assert expected in "; ".join(report.warnings)
    # buffers of a spectral norm in training mode move with each look at the weight
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_and_a_look_change_nothing(way: str) -> None:
    model, state = _wrapped(way, eager), trained(way)
    with untouched(model):
        qc.plan_load(model, state)
        assert weight_like(model[0]).shape == (32, 64)


def test_a_weight_that_is_a_parameter_is_that() -> None:
    layer = nn.Linear(2, 3)
    assert weight_of(layer) is layer.weight
    assert weight_like(layer) is layer.weight


@pytest.mark.parametrize("way", ["pruned", "parametrized weight_norm"])
def test_what_has_no_weight_to_round_says_so(way: str, tmp_path: Path) -> None:
    model = _wrapped(way, learning)
    qc.load_checkpoint(model, trained(way))
    with pytest.raises(qc.CompatError, match="compute their weights in every forward") as caught:
        qc.to_float(model, weights="quantized")
    assert caught.value.key == "0.weight"
    for to, out in (("torchao", tmp_path / "out.safetensors"), ("compressed-tensors", tmp_path / "out")):
        with pytest.raises(qc.PlanError, match=r"0\.weight: the layer computes it in every forward"):
            qc.convert_checkpoint(model, to, out)
    assert not list(tmp_path.iterdir())
