"""Names rest on evidence: where there is none, both candidates are named and nothing is loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from flows import cells, prepare_for
from torch import Tensor, nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_same_state, assert_twin, native_calibration, scramble

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "model.")


def test_two_norms_that_nothing_tells_apart() -> None:
    """No trace can follow this model, its BNs have one shape, and there is no data."""
    arch = ARCHS["dynamic"]
    model = prepare_for("eager-x86", "dynamic")(scramble(arch.make()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, arch.state(), calibration="defer")
    ambiguous = [p for p in caught.value.problems if p.kind.value == "ambiguous"]
    assert ambiguous
    text = " ".join(map(str, ambiguous))
    for name in ("entry", "exit", "a", "b"):
        assert name in text, name
    assert "rename" in text or "calibration" in text, "a remedy that works for a model without a trace"
    assert_same_state(model.state_dict(), before)
    with pytest.raises(qc.CompatError, match="entry"):
        qc.to_float(model)


@pytest.mark.parametrize("witness", ["model", "state_dict"])
def test_channels_tell_where_a_trace_cannot(witness: str) -> None:
    """The way back from a model that nothing can trace needs a `like=` with shapes, and says so."""
    arch = ARCHS["dynamic_channels"]
    model = prepare_for("eager-x86", "dynamic_channels")(_float("dynamic_channels"))
    like = scramble(arch.make())
    assert_same_state(qc.to_float(model, like=like if witness == "model" else like.state_dict()), arch.state())
    with pytest.raises(qc.CompatError, match="like="):
        qc.to_float(model)


def test_convention_is_not_followed_against_the_trace() -> None:
    """bn1 does not belong to conv1, as every witness but its name says."""
    arch, prepare = ARCHS["crossed"], prepare_for("eager-x86", "crossed")
    twin = assert_twin(arch.make, prepare, arch.state(), arch.batches())
    state = arch.state()
    assert torch.equal(twin.loaded.conv1.bn.weight, state["bn2.weight"])
    assert not torch.equal(state["bn1.weight"], state["bn2.weight"])


@pytest.mark.parametrize(("flow", "name"), cells("eager-x86/residual", "fx-x86/plain", "torchao-static/tied"))
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._fsdp_wrapped_module._orig_mod."])
def test_wrapper_prefixes(flow: str, name: str, prefix: str) -> None:
    arch = ARCHS[name]
    wrapped = {prefix + key: value for key, value in arch.state().items()}
    model = prepare_for(flow, name)(scramble(arch.make()))
    expected = prepare_for(flow, name)(_float(name))
    native_calibration(expected, arch.batches())
    qc.load_checkpoint(model, wrapped, calibration=arch.batches())
    assert_same_state(model, expected)


@pytest.mark.parametrize("wrapper", WRAPPERS[2:4])
def test_wrapper_infixes(wrapper: str) -> None:
    arch = ARCHS["residual"]
    wrapped = {key.replace("layer1.", f"layer1.{wrapper}"): value for key, value in arch.state().items()}
    assert_twin(arch.make, prepare_for("eager-x86", "residual"), arch.state(), arch.batches(), source=wrapped)


def test_stripping_must_not_merge_keys() -> None:
    """Two files in one: with and without prefix, which is which?"""
    arch = ARCHS["plain"]
    state = arch.state()
    both = {**state, **{f"module.{key}": value + 1 for key, value in state.items()}}
    model = prepare_for("eager-x86", "plain")(scramble(arch.make()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qc.CompatError, match=r"module\.conv1\.weight"):
        qc.load_checkpoint(model, both, calibration=arch.batches())
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("flow", "name"), cells("eager-x86/residual", "fx-x86/residual", "torchao-int8-int4/transformer")
)
def test_rename(flow: str, name: str) -> None:
    """A pair of `rename` takes a source key to the float model's own name."""
    arch = ARCHS[name]
    renamed = {f"encoder/{key.replace('.', '/')}": value for key, value in arch.state().items()}
    pairs = ((r"^encoder/", ""), (r"/", "."))
    assert_twin(arch.make, prepare_for(flow, name), arch.state(), arch.batches(), source=renamed, rename=pairs)


@pytest.mark.parametrize(("flow", "head"), [("eager-x86", "fc"), ("fx-x86", "fc"), ("pt2e-x86", "fc")])
def test_a_head_of_another_size(flow: str, head: str) -> None:
    """Refused without `keep=`; with it the model's own head stays, and its quantizers fit what it holds."""
    arch = ARCHS["plain"]
    state = arch.state()
    for key in (f"{head}.weight", f"{head}.bias"):
        state[key] = torch.cat([state[key], state[key]])
    model = prepare_for(flow, "plain")(arch.make())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qc.PlanError, match=r"fc\.weight"):
        qc.load_checkpoint(model, state, calibration=arch.batches())
    assert_same_state(model.state_dict(), before)
    qc.load_checkpoint(model, state, calibration=arch.batches(), keep=f"{head}.*")
    expected = _float("plain")
    own = arch.make().state_dict()
    expected.load_state_dict({key: own[key] if key.startswith(head) else v for key, v in arch.state().items()})
    expected = prepare_for(flow, "plain")(expected)
    native_calibration(expected, arch.batches())
    assert_same_state(model, expected)


@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86", "torchao-static"])
def test_no_data_is_said(flow: str) -> None:
    name = "transformer" if flow.startswith("torchao") else "plain"
    arch = ARCHS[name]
    model = prepare_for(flow, name)(scramble(arch.make()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qc.CalibrationError) as caught:
        qc.load_checkpoint(model, arch.state())
    for word in ("calibration=", "defer", "activation"):
        assert word in str(caught.value), word
    assert_same_state(model.state_dict(), before)


def _float(name: str) -> nn.Module:
    model = ARCHS[name].make()
    state: dict[str, Tensor] = ARCHS[name].state()
    model.load_state_dict(state)
    return model
