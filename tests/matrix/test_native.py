"""The oracle itself: what torch makes without the package is the same twice, and is not what it was before."""

from __future__ import annotations

import copy

import pytest
import torch
from flows import CELLS, FLOWS, REFUSED, cells, prepare_for
from torch import nn
from zoo import ARCHS

from qat_compat.testing import assert_same_output, assert_same_state, native_calibration, scramble

# A PT2E cell takes seconds, and `test_twin.py` goes through all of them.
_QUICK = [cell for cell in CELLS if FLOWS[cell[0]].kind != "pt2e"]


def _native(flow: str, name: str, seed: int) -> nn.Module:
    arch = ARCHS[name]
    model = arch.make(seed)
    model.load_state_dict(arch.state())
    return prepare_for(flow, name)(model)


@pytest.mark.parametrize(("flow", "name"), [*_QUICK, *cells("pt2e-x86/plain", "pt2e-sharing/functional")])
def test_native_twins_are_equal(flow: str, name: str) -> None:
    batches = ARCHS[name].batches()
    twins = [_native(flow, name, seed) for seed in (0, 5)]
    for twin in twins:
        native_calibration(twin, batches)
    assert_same_state(*twins)
    assert_same_output(*twins, batches[:1])


@pytest.mark.parametrize(("flow", "name"), list(REFUSED))
def test_what_torch_refuses(flow: str, name: str) -> None:
    """When torch learns to do one of these, it belongs into the matrix."""
    with pytest.raises(Exception, match=REFUSED[flow, name][1]):
        native_calibration(_native(flow, name, 0), ARCHS[name].batches())


@pytest.mark.parametrize(
    ("flow", "name"), cells("eager-x86/plain", "fx-x86/residual", "pt2e-x86/plain", "pt2e-x86-eval/plain")
)
def test_calibration_fills_every_quantizer_and_leaves_the_rest(flow: str, name: str) -> None:
    arch = ARCHS[name]
    model = _native(flow, name, 0)
    before = copy.deepcopy(model.state_dict())
    modes = {key: module.training for key, module in model.named_modules()}
    random = torch.get_rng_state()
    native_calibration(model, arch.batches())
    after = model.state_dict()
    changed = {
        key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    }
    assert changed == {key for key in before if key.endswith((".scale", ".min_val", ".max_val"))} | {
        key for key in changed if key.endswith(".zero_point")
    }
    assert modes == {key: module.training for key, module in model.named_modules()}
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("flow", ["torchao-static", "torchao-learned"])
def test_calibration_creates_what_torchao_creates_lazily(flow: str) -> None:
    model = _native(flow, "transformer", 0)
    quantizer = model.attn.qkv.activation_fake_quantizer
    assert quantizer.scale is None
    native_calibration(model, ARCHS["transformer"].batches())
    assert isinstance(quantizer.scale, nn.Parameter) == (flow == "torchao-learned")
    assert torch.isfinite(quantizer.scale).all()


def test_other_data_gives_another_state() -> None:
    """A comparison that cannot fail would prove nothing."""
    twins = [_native("eager-x86", "plain", 0) for _ in range(2)]
    for seed, twin in enumerate(twins):
        native_calibration(twin, ARCHS["plain"].batches(seed=seed))
    with pytest.raises(
        AssertionError, match=r"conv1\.activation_post_process\.scale: 1 of 1 values differ, at most by"
    ):
        assert_same_state(*twins)


@pytest.mark.parametrize("name", list(ARCHS))
def test_scramble_changes_every_value(name: str) -> None:
    model = ARCHS[name].make()
    before = copy.deepcopy(model.state_dict())
    scramble(model)
    for key, value in model.state_dict().items():
        if value.is_floating_point() or key.endswith("num_batches_tracked"):
            assert (value != before[key]).float().mean() > 0.9, key


def test_ties_are_state() -> None:
    tied, loose = ARCHS["tied"].make(), ARCHS["tied"].make()
    loose.lm_head.weight = nn.Parameter(loose.embed.weight.detach().clone())
    with pytest.raises(AssertionError, match=r"\('embed.weight', 'lm_head.weight'\): should share memory"):
        assert_same_state(loose, tied)


def test_torchao_unties_on_meta() -> None:
    """A tie of a meta model cannot be kept: nothing of it is left when the file comes."""
    arch = ARCHS["tied"]
    with torch.device("meta"):
        model = arch.build()
    assert model.embed.weight is model.lm_head.weight
    model = prepare_for("torchao-int8-int4", "tied")(model)
    assert model.embed.weight is not model.lm_head.weight


def test_requantized_embeddings_are_tied_by_memory_only() -> None:
    """Two parameters, one memory: `deepcopy` unties them, and so may whoever moves one of them."""
    model = prepare_for("eager-embedding", "tied")(ARCHS["tied"].make())
    assert model.embed.weight is not model.lm_head.weight
    assert model.embed.weight.data_ptr() == model.lm_head.weight.data_ptr()
