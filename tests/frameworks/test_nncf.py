"""NNCF's own models: float in, resume, float out, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from native import (
    assert_native_float,
    assert_native_resume,
    assert_native_twin,
    batches,
    float_state,
    make_float,
    native,
    other,
    train,
)
from test_apply import untouched
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.frameworks import Needs, describe_model
from qat_compat.testing import assert_same_output, assert_same_state, scramble

nncf = pytest.importorskip("nncf")

# Without bias correction, which changes the float model's own biases.
PLAIN = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "mixed": {"preset": nncf.QuantizationPreset.MIXED},
    "transformer": {"model_type": nncf.ModelType.TRANSFORMER, "smooth_quant_alpha": -1.0},
    "all levels": {"overflow_fix": nncf.OverflowFix.DISABLE},
    "half of the levels": {"overflow_fix": nncf.OverflowFix.ENABLE},
}


def prepare(model: nn.Module, data: Sequence[Tensor], config: str = "default", **advanced: Any) -> nn.Module:
    """`nncf.quantize` without bias correction."""
    options = dict(CONFIGS[config])
    parameters = copy.deepcopy(PLAIN)
    for name in ("overflow_fix", "smooth_quant_alpha"):
        if name in options:
            setattr(parameters, name, options.pop(name))
    for name, value in advanced.items():
        setattr(parameters, name, value)
    dataset = nncf.Dataset(list(data))
    return nncf.quantize(
        model.eval(), dataset, subset_size=len(data), advanced_parameters=parameters, **options
    ).train()


@pytest.mark.parametrize("config", CONFIGS)
def test_twin(config: str) -> None:
    assert_native_twin(partial(prepare, config=config))


@pytest.mark.parametrize("config", ["default", "mixed"])
def test_resume(config: str) -> None:
    own = partial(prepare, config=config)
    assert_native_resume(own, train(native(own, float_state(), batches())))


def test_resume_into_a_model_that_nncf_built_from_its_config() -> None:
    """NNCF's own way back: the config makes the quantizers, the state_dict fills them."""
    trained = train(native(prepare, float_state(), batches()))
    config = nncf.torch.get_config(trained)
    fresh = nncf.torch.load_from_config(scramble(make_float()), config)
    qc.load_checkpoint(fresh, trained.state_dict())
    assert_same_state(fresh, trained)
    assert_same_output(fresh, trained, batches())


@pytest.mark.parametrize("config", ["default", "mixed"])
def test_back_to_float(config: str, tmp_path: Path) -> None:
    model = native(partial(prepare, config=config), float_state(), batches())
    torch.save({"model": model.state_dict(), "config": 1}, tmp_path / "nncf.pt")
    saved = [tmp_path / "nncf.pt", qc.save_checkpoint(model, tmp_path / "own.pt")]
    assert_native_float(model, float_state(), saved)


def test_own_files_load_into_nncf(tmp_path: Path) -> None:
    model = train(native(prepare, float_state(), batches()))
    path = qc.save_checkpoint(model, tmp_path / "own.pt")
    fresh = other(prepare)
    fresh.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert_same_state(fresh, model)


def test_quantized_weights_are_those_that_the_layers_use() -> None:
    model = native(prepare, float_state(), batches())
    back = qc.to_float(model, weights="quantized")
    quantizer = model.get_submodule("__nncf_hooks.pre_hooks.fc1/linear/0__1.0")
    assert torch.equal(back["fc1.weight"], quantizer(model.fc1.weight).detach())
    assert not torch.equal(back["fc1.weight"], model.fc1.weight)


def test_levels_follow_the_sign_that_was_loaded() -> None:
    """They are no state: a file with signed activations, into a model whose activations were unsigned."""
    signed = native(prepare, float_state(), batches())
    name = "__nncf_hooks.post_hooks./mean/0__0.0"
    signed.get_submodule(name).signed = True
    fresh = other(prepare)
    assert fresh.get_submodule(name).level_low == 0
    qc.load_checkpoint(fresh, signed.state_dict())
    assert fresh.get_submodule(name).level_low == signed.get_submodule(name).level_low < 0
    assert_same_output(fresh, signed, batches())


def test_biases_are_those_of_the_source_and_that_is_said() -> None:
    own = partial(prepare, disable_bias_correction=False)
    assert not torch.equal(native(own, float_state(), batches()).fc1.bias, float_state()["fc1.bias"])
    model = other(own)
    report = qc.load_checkpoint(model, float_state(), calibration=batches())
    assert any("biases are those of the source" in text for text in report.warnings)
    assert torch.equal(model.fc1.bias, float_state()["fc1.bias"])


HOOK = "__nncf_hooks.pre_hooks.fc1/linear/0__1.0"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{HOOK}.scale", torch.full((32, 1), -1.0)),
        (f"{HOOK}.scale", torch.full((32, 1), float("nan"))),
        (f"{HOOK}.scale", torch.ones(32)),
        ("__nncf_hooks.post_hooks.x__0.0.scale", torch.tensor([float("inf")])),
    ],
)
def test_bad_values(key: str, value: Tensor) -> None:
    model = other(prepare)
    state = native(prepare, float_state(), batches()).state_dict()
    with untouched(model), pytest.raises(qc.QParamError, match="__nncf_hooks"):
        qc.load_checkpoint(model, {**state, key: value})


def test_ranges_of_other_weights_are_refused() -> None:
    state = native(prepare, float_state(), batches()).state_dict()
    model = other(prepare)
    stale = {**state, f"{HOOK}.scale": state[f"{HOOK}.scale"] * 100}
    with untouched(model), pytest.raises(qc.PlanError, match="ranges of other weights"):
        qc.load_checkpoint(model, stale)


def test_a_scale_that_does_not_tell_its_levels_is_refused() -> None:
    model = other(prepare)
    with torch.no_grad():
        model.fc1.weight.mul_(20)
    with untouched(model), pytest.raises(qc.PlanError, match="half its levels"):
        qc.load_checkpoint(model, float_state(), calibration=batches())


def test_an_error_in_calibration_takes_everything_back() -> None:
    model = other(prepare)

    def broken(prepared: nn.Module) -> None:
        prepared(batches()[0])
        raise RuntimeError("no more data")

    with untouched(model), pytest.raises(qc.CalibrationError, match="no more data"):
        qc.load_checkpoint(model, float_state(), calibration=broken)
    with untouched(model), pytest.raises(qc.CalibrationError, match="NaN or inf"):
        qc.load_checkpoint(model, float_state(), calibration=[torch.full((1, 3, 8, 8), float("nan"))])


def test_nan_in_a_weight_is_named() -> None:
    model = other(prepare)
    state = float_state()
    state["fc1.weight"][0, 0] = float("nan")
    with untouched(model), pytest.raises(qc.QParamError, match="fc1/linear"):
        qc.load_checkpoint(model, state, calibration="defer")


def test_what_smoothing_made_is_never_taken_for_float() -> None:
    own = partial(prepare, config="transformer", smooth_quant_alpha=None)
    model = native(own, float_state(), batches())
    assert any(key.endswith("_scale_value") for key in model.state_dict())
    for source in (model, model.state_dict()):
        for options in ({}, {"like": make_float()}):
            with pytest.raises(qc.PlanError, match="_scale_value"):
                qc.to_float(source, **options)
    with untouched(model), pytest.raises(qc.PlanError, match="smoothing"):
        qc.load_checkpoint(model, float_state(), calibration=batches())
    assert_native_resume(own, model)


def test_every_key_has_one_entry() -> None:
    model = other(prepare)
    needs = {q.site: q.needs for q in describe_model(model).quantizers}
    assert (needs["weight:fc1"], needs["input:x"]) == (Needs.WEIGHTS, Needs.DATA)
    assert set(qc.open_checkpoint(model)) == set(model.state_dict())


class Nested(nn.Module):
    """Layers in a Sequential, which is called, and in a ModuleList, which is not and whose names NNCF leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_weights_of_modules_in_modules() -> None:
    """What the name tells is read from the weight itself; what it does not, from data."""
    data = [torch.randn(4, 8) for _ in range(2)]
    state = Nested().state_dict()
    float_model = Nested()
    float_model.load_state_dict(state)
    twin, model = prepare(float_model, data), prepare(Nested(), data)
    needs = {quantizer.site: quantizer.needs for quantizer in describe_model(model).quantizers}
    assert (needs["weight:stem.0"], needs["weight:stem.2"]) == (Needs.WEIGHTS, Needs.WEIGHTS)
    assert sum(site.startswith("weight:") for site in needs) == 2
    qc.load_checkpoint(model, state, calibration=data)
    assert_same_state(model, twin)


def test_compressed_weights_are_not_float() -> None:
    model = nncf.compress_weights(make_float().eval(), dataset=nncf.Dataset(batches()))
    with pytest.raises(qc.PlanError, match="converted"):
        qc.to_float(model)
