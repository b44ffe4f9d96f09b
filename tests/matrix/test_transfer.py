"""QAT state of one flow in a model of another: weights and their ranges bit for bit, activations where both name them.

The oracle is the source itself: what is carried must be equal there, and what is not must be what calibration gives.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import prepare_for
from test_converted import run
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver, QConfig
from zoo import ARCHS

import qat_compat as qc
from qat_compat.frameworks import Needs, Quantizer
from qat_compat.source import open_any
from qat_compat.testing import assert_same_state, native_calibration

FLOWS = ["eager-x86", "fx-x86", "pt2e-x86"]
PAIRS = [(a, b) for a in FLOWS for b in FLOWS if a != b]
CELLS = [("plain", "module"), ("plain", "saved"), ("residual", "module"), ("transformer", "saved")]


def trained(flow: str, name: str) -> nn.Module:
    """Calibrated on other data than the target is given, so that a range tells where it comes from."""
    model = prepare_for(flow, name)(ARCHS[name].make(1))
    native_calibration(model, ARCHS[name].batches(2, seed=500))
    return model


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Site -> quantizer, of the sites that one quantizer has."""
    description = open_any(model).description
    assert description is not None
    sites = Counter(quantizer.site for quantizer in description.quantizers)
    return {quantizer.site: quantizer for quantizer in description.quantizers if sites[quantizer.site] == 1}


def ranges(quantizer: Quantizer) -> list[Tensor]:
    module: Any = quantizer.module
    return [module.scale, module.zero_point, *quantizer.ranges()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def load(source: Any, flow: str, name: str, **options: Any) -> tuple[nn.Module, qc.Report]:
    target = prepare_for(flow, name)(ARCHS[name].make(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return target, qc.load_checkpoint(target, source, calibration=ARCHS[name].batches(), **options)


def assert_weights_carried(source: nn.Module, target: nn.Module) -> None:
    theirs = quantizers(source)
    mine = {site: one for site, one in quantizers(target).items() if one.needs is Needs.WEIGHTS}
    assert mine
    for site, quantizer in mine.items():
        assert same(ranges(quantizer), ranges(theirs[site])), site


@pytest.mark.parametrize(("name", "form"), CELLS)
@pytest.mark.parametrize(("theirs", "mine"), PAIRS)
def test_state_of_one_flow_in_a_model_of_another(theirs: str, mine: str, name: str, form: str, tmp_path: Path) -> None:
    source = trained(theirs, name)
    arch = ARCHS[name]
    target, report = load(source if form == "module" else qc.save_checkpoint(source, tmp_path / "qat.pt"), mine, name)
    assert_same_state(dict(qc.to_float(target, like=arch.make())), dict(qc.to_float(source, like=arch.make())))
    assert_weights_carried(source, target)
    before, after = quantizers(source), quantizers(target)
    shared = {site for site in before.keys() & after.keys() if not site.startswith(("weight:", "node:"))}
    for site in shared:
        assert same(before[site].ranges(), after[site].ranges()), site
    if name == "plain":
        assert {"output:conv1+bn+relu", "output:conv2+bn"} <= shared
    twin = prepare_for(mine, name)(arch.make(1))
    native_calibration(twin, arch.batches())
    fresh = {site: one for site, one in quantizers(twin).items() if site not in before and one.needs is Needs.DATA}
    for site, quantizer in fresh.items():
        assert same(ranges(quantizer), ranges(after[site])), site
    assert report.synthesized >= 4 * len(fresh)


@pytest.mark.parametrize(("theirs", "mine"), [("eager-x86", "fx-x86"), ("fx-x86", "pt2e-x86")])
def test_a_file_that_torch_saved_gives_weights_and_their_ranges(theirs: str, mine: str, tmp_path: Path) -> None:
    """The state_dict alone: what an activation quantizer sees is not in it, so that all of these are calibrated."""
    source = trained(theirs, "plain")
    torch.save(source.state_dict(), tmp_path / "qat.pt")
    options: dict[str, Any] = {"float_model": ARCHS["plain"].make()} if mine.startswith("pt2e") else {}
    target, _ = load(tmp_path / "qat.pt", mine, "plain", **options)
    assert_weights_carried(source, target)
    twin = prepare_for(mine, "plain")(ARCHS["plain"].make(1))
    native_calibration(twin, ARCHS["plain"].batches())
    for site, quantizer in quantizers(twin).items():
        if quantizer.needs is Needs.DATA:
            assert same(ranges(quantizer), ranges(quantizers(target)[site])), site


@pytest.mark.parametrize(("theirs", "mine"), PAIRS)
def test_a_tracers_number_never_carries_a_range(theirs: str, mine: str) -> None:
    """`relu_1` of one graph is not `relu_1` of another."""
    target, report = load(trained(theirs, "residual"), mine, "residual")
    numbered = {q.name for site, q in quantizers(target).items() if site.startswith("node:")}
    carried = {s.key for s in report.steps if type(s).__name__ in ("Copy", "Derive")}
    assert not any(key.startswith(f"{name}.") for key in carried for name in numbered if "enabled" not in key)


@pytest.mark.parametrize(("theirs", "mine"), [("eager-x86", "pt2e-x86"), ("pt2e-x86", "eager-x86")])
def test_what_a_weight_was_trained_with_is_carried_though_the_target_would_choose_another_scale(
    theirs: str, mine: str
) -> None:
    """X86InductorQuantizer lets no scale be smaller than 2**-12, the eager flow does: of small weights each makes
    another."""
    source, twin = (prepare_for(flow, "transformer")(ARCHS["transformer"].make(1)) for flow in (theirs, mine))
    for model in (source, twin):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2**-6)
        native_calibration(model, ARCHS["transformer"].batches())
    target, _ = load(source, mine, "transformer")
    assert_weights_carried(source, target)
    own = {site: one for site, one in quantizers(twin).items() if one.needs is Needs.WEIGHTS}
    assert all(not torch.equal(ranges(one)[0], ranges(quantizers(target)[site])[0]) for site, one in own.items())


FOUR_BIT = QConfig(
    activation=torch.nn.Identity,
    weight=FakeQuantize.with_args(
        observer=PerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    ),
)


def four_bit(model: nn.Module) -> nn.Module:
    model.train().qconfig = FOUR_BIT
    return torch.ao.quantization.prepare_qat(model)


def learning(model: nn.Module) -> nn.Module:
    from torchao.quantization import PerAxis, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = IntxFakeQuantizeConfig(
        torch.int4,
        PerAxis(0),
        is_symmetric=True,
        is_dynamic=False,
        range_learning=True,
        zero_point_precision=torch.float32,
    )
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    return model


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(("theirs", "mine"), [(four_bit, learning), (learning, four_bit)])
def test_scales_on_the_same_integers_go_over(
    theirs: Callable[[nn.Module], nn.Module], mine: Callable[[nn.Module], nn.Module]
) -> None:
    source = theirs(_net(1))
    qc.load_checkpoint(source, _net(1).state_dict())
    with torch.no_grad():  # ranges of their own, not those that the weights would give
        for layer in (source[0], source[2]):
            holder = layer.weight_fake_quant if theirs is four_bit else layer.weight_fake_quantizer
            holder.scale.mul_(1.5)
            if theirs is four_bit:
                holder.activation_post_process.min_val.mul_(1.5)
                holder.activation_post_process.max_val.mul_(1.5)
    target = mine(_net(2))
    qc.load_checkpoint(target, source)
    for old, new in ((source[0], target[0]), (source[2], target[2])):
        a, b = (m.weight_fake_quant if hasattr(m, "weight_fake_quant") else m.weight_fake_quantizer for m in (old, new))
        torch.testing.assert_close(a.scale.flatten(), b.scale.flatten(), rtol=1e-6, atol=0)
        assert b.scale.shape == ((8, 1) if b is target[0] else b.scale.shape)
    x = torch.randn(5, 16)
    torch.testing.assert_close(run("eager", target, x), run("eager", source, x))


def test_another_number_of_bits_is_not_carried() -> None:
    eight = QConfig(activation=nn.Identity, weight=FOUR_BIT.weight.with_args(quant_min=-128, quant_max=127))
    source = _net(1).train()
    source.qconfig = eight
    source = torch.ao.quantization.prepare_qat(source)
    qc.load_checkpoint(source, _net(1).state_dict())
    target, twin = learning(_net(2)), learning(_net(3))
    report = qc.load_checkpoint(target, source)
    qc.load_checkpoint(twin, _net(1).state_dict())
    assert torch.equal(target[0].weight_fake_quantizer.scale, twin[0].weight_fake_quantizer.scale)
    assert "the source has the grid -128..127 symmetric, not -8..7 symmetric" in str(report)


def test_the_range_of_a_weight_is_not_that_of_a_weight_times_its_norm() -> None:
    """A fused module quantizes `weight * gamma / std`: under one name, two flows may quantize two tensors."""
    model = ARCHS["plain"].make(1).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    unfused = torch.ao.quantization.prepare_qat(model)
    native_calibration(unfused, ARCHS["plain"].batches())
    target, _ = load(unfused, "fx-x86", "plain")
    twin, _ = load(qc.to_float(unfused), "fx-x86", "plain")
    for site, quantizer in quantizers(twin).items():
        if site.startswith("weight:conv"):
            assert same(ranges(quantizer), ranges(quantizers(target)[site])), site
            assert not torch.equal(quantizer.ranges()[0], quantizers(unfused)[site.removesuffix("+bn")].ranges()[0])
