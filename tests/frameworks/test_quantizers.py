"""What each framework file says of its own models and files: sites, needs, switches, and state that is not saved."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from flows import prepare_for
from test_apply import CASES, prepared, untouched
from torch import nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat import trace
from qat_compat.frameworks import Needs, describe_keys, describe_model
from qat_compat.frameworks.base import KeyView
from qat_compat.ranges import value_range
from qat_compat.schema import Role, Spec
from qat_compat.testing import assert_same_state, native_calibration
from qat_compat.transaction import rehearsal

NAMES = {
    "eager-x86": "torch_ao",
    "fx-x86": "fx",
    "pt2e-x86": "pt2e",
    "torchao-static": "torchao",
    "torchao-learned": "torchao",
}


@cache
def shared(flow: str, name: str) -> nn.Module:
    """One model for all tests that leave it as it is."""
    return prepared(flow, name)


def _file(model: nn.Module) -> KeyView:
    return KeyView({key: Spec(tuple(value.shape), value.dtype) for key, value in model.state_dict().items()})


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_a_model_and_its_file_are_recognised_as_the_same_framework(flow: str, name: str) -> None:
    model = shared(flow, name)
    with untouched(model):
        description = describe_model(model)
    assert description.schema.framework == NAMES[flow]
    file = describe_keys(_file(model))
    assert file.framework == (NAMES[flow] if flow != "torchao-static" and flow != "torchao-learned" else "plain")
    assert set(file) <= set(description.schema)
    for key, entry in file.items():
        mine = description.schema[key]
        if entry.quantizer:
            assert (entry.role, entry.leaf) == (mine.role, mine.leaf), key


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_every_key_has_one_entry_and_every_quantizer_one_site(flow: str, name: str) -> None:
    model = shared(flow, name)
    description = describe_model(model)
    visible = [key for key, entry in description.schema.items() if not entry.hidden]
    assert visible == list(model.state_dict())
    sites = [quantizer.site for quantizer in description.quantizers]
    assert len(sites) == len(set(sites))
    needs = {quantizer.needs for quantizer in description.quantizers}
    assert needs == {Needs.WEIGHTS, Needs.DATA}
    for quantizer in description.quantizers:
        assert quantizer.site.startswith("weight:") == (quantizer.needs is Needs.WEIGHTS), quantizer
        assert (quantizer.source is not None) == (quantizer.needs is Needs.WEIGHTS), quantizer


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_a_weight_quantizer_knows_the_tensor_that_it_is_really_shown(flow: str, name: str) -> None:
    """What `source()` computes without data is what reaches the quantizer in a forward in eval mode, bit for bit."""
    arch, model = ARCHS[name], shared(flow, name)
    description = describe_model(model)
    assert description.framework is not None
    shown: dict[str, torch.Tensor] = {}
    handles = []
    for quantizer in description.quantizers:
        if quantizer.needs is Needs.WEIGHTS:

            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], site: str = quantizer.site) -> None:
                shown[site] = args[0].detach().clone()

            handles.append(quantizer.module.register_forward_pre_hook(hook))
    with rehearsal(description), description.framework.evaluation(model) as call:
        for quantizer in description.quantizers:
            quantizer.disable()
            if flow.startswith("torchao"):
                quantizer.start_observing()
        call(arch.batches()[0])
    for handle in handles:
        handle.remove()
    weights = [quantizer for quantizer in description.quantizers if quantizer.needs is Needs.WEIGHTS]
    assert len(weights) >= 3
    for quantizer in weights:
        assert quantizer.source is not None
        assert torch.equal(quantizer.source(), shown[quantizer.site]), quantizer


@pytest.mark.parametrize(("flow", "name"), [*CASES, ("eager-qnnpack", "plain")])
def test_the_range_of_a_parameter_is_all_that_a_weight_quantizer_needs(flow: str, name: str) -> None:
    """Also where it is multiplied by a normalization's factor on the way, of either sign or 0."""
    model = prepared(flow, name)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.copy_(torch.randn_like(module.weight)).data[0] = 0.0
    description = describe_model(model)
    weights = [q for q in description.quantizers if q.needs is Needs.WEIGHTS]
    assert weights
    with rehearsal(description):
        for quantizer in weights:
            wanted = quantizer.reduction()
            assert wanted is not None, quantizer
            assert quantizer.source is not None
            quantizer.disable()
            quantizer.start_observing()
            quantizer.module(quantizer.source())
            quantizer.compute_qparams()
            module = quantizer.module
            expected = [module.scale.clone(), module.zero_point.clone(), *(one.clone() for one in quantizer.ranges())]
            quantizer.start_observing()
            parameter = description.view.slots[wanted.parameter].tensor.detach()
            quantizer.observe_range(*value_range(parameter, wanted.axis, wanted.group))
            quantizer.compute_qparams()
            found = [module.scale, module.zero_point, *quantizer.ranges()]
            assert all(map(torch.equal, found, expected)), quantizer
            assert [one.dtype for one in found] == [one.dtype for one in expected]


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_evaluation_gives_modes_back_whatever_happens(flow: str, name: str) -> None:
    model = shared(flow, name)
    description = describe_model(model)
    assert description.framework is not None
    with (
        untouched(model),
        torch.random.fork_rng(),  # exported programs look for patterns with random inputs; the engine forks, too
        pytest.raises(KeyboardInterrupt),
        description.framework.evaluation(model),
    ):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_a_rehearsal_gives_everything_back(flow: str, name: str) -> None:
    arch, model = ARCHS[name], shared(flow, name)
    description = describe_model(model)
    assert description.framework is not None
    with untouched(model), rehearsal(description), description.framework.evaluation(model) as call:
        for quantizer in description.quantizers:
            quantizer.disable()
            quantizer.start_observing()
        torch.rand(3)
        call(arch.batches()[0])


def test_dynamic_quantizers_need_nothing_and_have_no_state() -> None:
    model = prepared("torchao-int8-int4", "transformer")
    description = describe_model(model)
    assert {quantizer.needs for quantizer in description.quantizers} == {Needs.NOTHING}
    assert all(not entry.quantizer for entry in description.schema.values())


def test_static_state_is_hidden_and_saved_all_the_same(tmp_path: Path) -> None:
    """No state_dict holds it; a file of ours does, and gives it back without data."""
    arch, model = ARCHS["transformer"], prepared("torchao-static", "transformer")
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    hidden = [key for key, entry in describe_model(model).schema.items() if entry.hidden]
    assert hidden
    assert not set(hidden) & set(model.state_dict())
    path = qc.save_checkpoint(model, tmp_path / "qat.pt")
    other = prepared("torchao-static", "transformer")
    qc.load_checkpoint(other, path)
    assert_same_state(other, model)


def test_a_constant_zero_point_is_not_learnt_after_a_resume(tmp_path: Path) -> None:
    """torchao keeps it beside a scale that it learns; our file holds it, and it stays what it is."""
    arch = ARCHS["transformer"]
    model, again = (prepared("torchao-learned", "transformer") for _ in range(2))
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    qc.load_checkpoint(again, qc.save_checkpoint(model, tmp_path / "own.pt"))
    assert list(again.state_dict()) == list(model.state_dict())
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    model.load_state_dict(again.state_dict(), strict=True)
    assert_same_state(again, model)


def test_fixed_quantizers_are_fixed_by_definition() -> None:
    arch, model = ARCHS["fixed"], prepared("eager-qnnpack", "fixed")
    fixed = [q for q in describe_model(model).quantizers if q.needs is Needs.DEFINITION]
    assert fixed
    before = {q.name: q.module.scale.clone() for q in fixed}
    report = qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    for quantizer in fixed:
        assert torch.equal(quantizer.module.scale, before[quantizer.name])
        assert report.provenance(f"{quantizer.name}.scale") == "keep: fixed by the quantizer's definition"


def test_old_names_of_ranges_and_norms_are_read_as_todays() -> None:
    spec = Spec((4,), torch.float32)
    keys = ["conv.weight", "conv.gamma", "conv.beta", "conv.running_mean", "conv.weight_fake_quant.min_vals"]
    schema = describe_keys(KeyView(dict.fromkeys(keys, spec)))
    assert schema["conv.gamma"].site == "conv.bn.weight"
    assert schema["conv.running_mean"].site == "conv.bn.running_mean"
    entry = schema["conv.weight_fake_quant.min_vals"]
    assert (entry.role, entry.leaf) == (Role.MIN, "min_val")


@pytest.mark.parametrize("keys", [["fc.weight"], [], ["activation.scale"], ["my_activation_post_process.x"]], ids=str)
def test_keys_of_no_framework_are_plain(keys: list[str]) -> None:
    schema = describe_keys(KeyView(dict.fromkeys(keys, Spec((4,), torch.float32))))
    assert (schema.framework, schema.stage.value) == ("plain", "float")


def test_pt2e_says_which_norms_it_changed() -> None:
    arch = ARCHS["plain"]
    float_model = arch.make()
    float_model.bn1.eps, float_model.bn1.momentum = 1e-3, 0.01
    model = prepare_for("pt2e-x86", "plain")(copy.deepcopy(float_model))
    report = qc.load_checkpoint(model, arch.state(), calibration=arch.batches(), float_model=float_model)
    assert any(text.startswith("bn1: eps is 1e-05 in the exported graph and 0.001") for text in report.warnings)
    assert any(text.startswith("bn1: momentum is 0.1") for text in report.warnings)
    silent = qc.plan_load(model, arch.state(), calibration=arch.batches())
    assert any("eps and momentum of 2 batch normalizations were not compared" in text for text in silent.warnings)


def test_native_calibration_and_calibrate_agree() -> None:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    saved = qc.calibrate(model, arch.batches())
    native_calibration(model, arch.batches())
    state = model.state_dict()
    assert saved.tensors
    for key, value in saved.tensors.items():
        assert torch.equal(state[key], value), key


def test_a_model_is_traced_only_where_keys_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    monkeypatch.setattr(trace, "_trace", lambda *_: pytest.fail("the model was traced"))
    qc.load_checkpoint(prepared("eager-x86", "plain"), model.state_dict())
    with pytest.raises(pytest.fail.Exception, match="was traced"):
        qc.plan_load(model, arch.state(), calibration="defer")
