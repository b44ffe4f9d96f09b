"""Brevitas' own models: float in, resume, float out, and what is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
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

qnn = pytest.importorskip("brevitas.nn")
bq = pytest.importorskip("brevitas.quant")
calibrate = pytest.importorskip("brevitas.graph.calibrate")


class QuantNet(nn.Module):
    """The float model of these tests, built of Brevitas' layers under the same names."""

    def __init__(self, weight: dict[str, Any], act: Any, extra: dict[str, Any], returns: bool = False) -> None:
        super().__init__()
        self.inp = qnn.QuantIdentity(act_quant=act, return_quant_tensor=returns)
        self.conv1 = qnn.QuantConv2d(3, 8, 3, bias=False, **weight)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = qnn.QuantReLU(return_quant_tensor=returns)
        self.conv2 = qnn.QuantConv2d(8, 16, 3, stride=2, bias=True, **weight)
        self.fc1 = qnn.QuantLinear(16, 32, bias=True, input_quant=act, output_quant=act, **weight, **extra)
        self.fc2 = qnn.QuantLinear(32, 8, bias=False, **weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.inp(x))))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


Build = Callable[[], nn.Module]


def prepare(model: nn.Module, data: Sequence[Tensor], build: Build) -> nn.Module:
    """Brevitas' way: build its layers, load the float weights, `calibration_mode`, and one forward."""
    prepared = build()
    prepared.load_state_dict(model.state_dict(), strict=False)
    if data:
        prepared.eval()
        with torch.no_grad(), calibrate.calibration_mode(prepared):
            for batch in data:
                prepared(batch)
        with torch.no_grad():
            prepared(data[0])  # weight thresholds are set in the first forward that quantizes
    return prepared.train()


LEARNED = {"weight_scaling_impl_type": "parameter_from_stats"}
CONFIGS: dict[str, Build] = {
    "default": partial(QuantNet, {}, bq.Int8ActPerTensorFloat, {}),
    "quant tensors": partial(QuantNet, {}, bq.Int8ActPerTensorFloat, {}, returns=True),
    "per channel": partial(QuantNet, {"weight_quant": bq.Int8WeightPerChannelFloat}, bq.Int8ActPerTensorFloat, {}),
    "learned": partial(QuantNet, LEARNED, bq.Int8ActPerTensorFloat, {}),
    "learned per channel": partial(
        QuantNet, {"weight_quant": bq.Int8WeightPerChannelFloat, **LEARNED}, bq.Int8ActPerTensorFloat, {}
    ),
    "affine": partial(
        QuantNet, {"weight_quant": bq.ShiftedUint8WeightPerTensorFloat}, bq.ShiftedUint8ActPerTensorFloat, {}
    ),
    "power of two": partial(
        QuantNet, {"weight_quant": bq.Int8WeightPerTensorFixedPoint}, bq.Int8ActPerTensorFixedPoint, {}
    ),
    "learned powers of two": partial(
        QuantNet, {"weight_quant": bq.Int8WeightPerTensorFixedPoint, **LEARNED}, bq.Int8ActPerTensorFixedPoint, {}
    ),
    "learned logarithms": partial(
        QuantNet,
        {"weight_quant": bq.Int8WeightPerChannelFloat, "weight_restrict_scaling_type": "log_fp", **LEARNED},
        bq.Int8ActPerTensorFloat,
        {},
    ),
    "bias": partial(QuantNet, {}, bq.Int8ActPerTensorFloat, {"bias_quant": bq.Int32Bias}),
    "four bits": partial(QuantNet, {"weight_bit_width": 4, **LEARNED}, bq.Int8ActPerTensorFloat, {}),
}
VALUE = "tensor_quant.scaling_impl.value"
ACT = f"fused_activation_quant_proxy.{VALUE}"


@pytest.mark.parametrize("config", CONFIGS)
def test_twin(config: str) -> None:
    assert_native_twin(partial(prepare, build=CONFIGS[config]))


@pytest.mark.parametrize("config", ["default", "learned", "affine", "power of two"])
def test_twin_of_a_model_that_was_never_calibrated(config: str) -> None:
    own = partial(prepare, build=CONFIGS[config])
    target = own(scramble(make_float()), ())
    assert not any("scaling_impl" in key for key in target.state_dict())
    qc.load_checkpoint(target, float_state(), calibration=batches())
    twin = native(own, float_state(), batches())
    assert_same_state(target, twin)
    assert_same_output(target, twin, batches())


SEARCHED = [name for name in dir(bq) if "Weight" in name and name.endswith(("MSE", "HQO"))]
ONE_LAYER = {"fc.weight": torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), "fc.bias": torch.zeros(8)}


def _layer(weight: str, **more: Any) -> nn.Module:
    return nn.Sequential(OrderedDict(fc=qnn.QuantLinear(64, 8, weight_quant=getattr(bq, weight), **more))).train()


@pytest.mark.parametrize("calibrated", [False, True], ids=["alone", "with data"])
@pytest.mark.parametrize("weight", SEARCHED)
def test_thresholds_that_are_searched_for_are_those_that_brevitas_finds(weight: str, calibrated: bool) -> None:
    """It searches by quantizing with each candidate, which a quantizer that is held would not do."""
    try:
        native, target = _layer(weight), _layer(weight)
    except Exception as error:  # of Brevitas itself, for some names that are parts of others
        pytest.skip(f"Brevitas cannot make it: {error}")
    data = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    native.load_state_dict(ONE_LAYER, strict=False)
    with torch.no_grad():
        native(data)
    qc.load_checkpoint(target, ONE_LAYER, **({"calibration": [data]} if calibrated else {}))
    with torch.no_grad():
        assert torch.equal(target.eval()(data), native.eval()(data))
    assert_same_state(target, native)


@pytest.mark.parametrize(
    ("weight", "more"),
    [
        ("Int8WeightNormL2PerChannelFixedPoint", {}),
        ("Int8AccumulatorAwareWeightQuant", {"input_quant": bq.Int8ActPerTensorFloat}),
    ],
)
def test_a_norm_that_is_learnt_is_part_of_the_weight(weight: str, more: dict[str, Any], tmp_path: Path) -> None:
    """What resumes is the same; what would be another weight, in either direction, is refused."""
    torch.manual_seed(0)
    model, data = _layer(weight, **more), torch.randn(4, 64)
    if more:
        with calibrate.calibration_mode(model):
            model(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    for source in (model.state_dict(), qc.save_checkpoint(model, tmp_path / "own.pt")):
        again = _layer(weight, **more)
        assert qc.load_checkpoint(again, source).synthesized == 0
        assert_same_state(again, model)
    with pytest.raises(qc.PlanError, match="stored as a product"):
        qc.to_float(model)
    target = _layer(weight, **more)
    with untouched(target), pytest.raises(qc.PlanError, match="weights are made for it"):
        qc.load_checkpoint(target, ONE_LAYER, calibration=[data])


@pytest.mark.parametrize("config", CONFIGS)
def test_resume(config: str) -> None:
    own = partial(prepare, build=CONFIGS[config])
    assert_native_resume(own, train(native(own, float_state(), batches())))


@pytest.mark.parametrize("config", ["learned", "affine"])
def test_resume_of_a_model_that_was_never_calibrated(config: str) -> None:
    """What was loaded is not multiplied by statistics once more in the next forward."""
    own = partial(prepare, build=CONFIGS[config])
    trained = train(native(own, float_state(), batches()))
    fresh = own(scramble(make_float()), ())
    qc.load_checkpoint(fresh, trained.state_dict())
    assert_same_state(fresh, trained)
    for model in (fresh, trained):
        train(model)
    assert_same_state(fresh, trained)


def test_a_model_that_still_collects_is_read_as_it_would_be_saved() -> None:
    own = partial(prepare, build=CONFIGS["learned"])
    model = own(make_float(), ())
    model.load_state_dict(float_state(), strict=False)
    for batch in batches():
        model(batch)  # in training mode, with 300 steps of collection before it
    saved = model.state_dict()
    assert f"relu.act_quant.{ACT}" in saved
    for source in (model, saved):
        fresh = other(own)
        qc.load_checkpoint(fresh, source)
        assert_same_state(fresh.state_dict(), saved)


def test_an_uncalibrated_model_has_no_ranges_to_give() -> None:
    own = partial(prepare, build=CONFIGS["learned"])
    source = own(make_float(1), ())
    with pytest.raises(qc.CalibrationError, match="act_quant"):
        qc.load_checkpoint(other(own), source)
    fresh = other(own)
    report = qc.load_checkpoint(fresh, source, calibration=batches())
    assert report.synthesized > 0
    assert_same_state(fresh, native(own, float_state(), batches()))


@pytest.mark.parametrize("config", CONFIGS)
def test_back_to_float(config: str, tmp_path: Path) -> None:
    model = native(partial(prepare, build=CONFIGS[config]), float_state(), batches())
    torch.save(model.state_dict(), tmp_path / "brevitas.pt")
    saved = [tmp_path / "brevitas.pt", qc.save_checkpoint(model, tmp_path / "own.pt")]
    assert_native_float(model, float_state(), saved)


@pytest.mark.parametrize("config", ["default", "learned per channel", "power of two", "affine"])
def test_quantized_weights_are_those_that_the_layers_use(config: str) -> None:
    model = native(partial(prepare, build=CONFIGS[config]), float_state(), batches())
    back = qc.to_float(model, weights="quantized")
    for name in ("conv1", "conv2", "fc1", "fc2"):
        assert torch.equal(back[f"{name}.weight"], model.get_submodule(name).quant_weight().value)


def test_own_files_load_into_brevitas(tmp_path: Path) -> None:
    own = partial(prepare, build=CONFIGS["learned"])
    model = train(native(own, float_state(), batches()))
    path = qc.save_checkpoint(model, tmp_path / "own.pt")
    fresh = CONFIGS["learned"]()
    fresh.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert_same_state(fresh, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"fc1.weight_quant.{VALUE}", torch.full((32, 1), -1.0)),
        (f"fc1.weight_quant.{VALUE}", torch.full((32, 1), float("nan"))),
        (f"relu.act_quant.{ACT}", torch.tensor(float("inf"))),
        (f"relu.act_quant.{ACT}", torch.tensor(0.0)),
        (f"fc1.weight_quant.{VALUE}", torch.ones(32)),
    ],
)
def test_bad_values(key: str, value: Tensor) -> None:
    own = partial(prepare, build=CONFIGS["learned per channel"])
    model = other(own)
    state = native(own, float_state(), batches()).state_dict()
    with untouched(model), pytest.raises(qc.QParamError, match=key.replace(".", r"\.")):
        qc.load_checkpoint(model, {**state, key: value})


@pytest.mark.parametrize("config", ["learned", "learned per channel"])
def test_thresholds_of_other_weights_are_caught(config: str) -> None:
    """Loading them with `load_state_dict` gives no error and wrong outputs."""
    own = partial(prepare, build=CONFIGS[config])
    state = native(own, float_state(), batches()).state_dict()
    key = f"fc1.weight_quant.{VALUE}"
    model = other(own)
    with untouched(model), pytest.raises(qc.PlanError, match="ranges of other weights"):
        qc.load_checkpoint(model, {**state, key: state[key] / 100})
    report = qc.load_checkpoint(model, {**state, key: state[key] / 3})
    assert any("fc1.weight_quant" in text and "3 times the range" in text for text in report.warnings)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("config", ["learned", "affine"])
def test_an_error_in_calibration_takes_everything_back(config: str, calibrated: bool) -> None:
    """Also values that statistics were multiplied into, counters and switches."""
    own = partial(prepare, build=CONFIGS[config])
    model = other(own) if calibrated else own(make_float(), ())
    before = copy.deepcopy(_settings(model))

    def broken(prepared: nn.Module) -> None:
        prepared(batches()[0])
        raise RuntimeError("no more data")

    with untouched(model), pytest.raises(qc.CalibrationError, match="no more data"):
        qc.load_checkpoint(model, float_state(), calibration=broken)
    assert _settings(model) == before


def _settings(model: nn.Module) -> dict[str, Any]:
    names = ("counter", "init_done", "disable_quant", "observer_only", "collect_stats_steps", "momentum", "training")
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        for name in (*names, "return_quant_tensor")
        if hasattr(module, name)
    }


def test_switches_are_as_before_a_load() -> None:
    own = partial(prepare, build=CONFIGS["quant tensors"])
    model = other(own)
    before = _settings(model)
    qc.load_checkpoint(model, float_state(), calibration=batches())
    assert _settings(model) == before


def test_nan_is_named() -> None:
    own = partial(prepare, build=CONFIGS["learned"])
    model = other(own)
    with untouched(model), pytest.raises(qc.CalibrationError, match="NaN or inf"):
        qc.load_checkpoint(model, float_state(), calibration=[torch.full((1, 3, 8, 8), float("nan"))])
    state = float_state()
    state["fc1.weight"][0, 0] = float("nan")
    with untouched(model), pytest.raises(qc.QParamError, match=r"fc1\.weight_quant"):
        qc.load_checkpoint(model, state, calibration="defer")


def test_deferred_calibration_collects_in_training() -> None:
    """As in a fresh model: the first training batches give the ranges."""
    own = partial(prepare, build=CONFIGS["default"])
    loaded, twin = own(scramble(make_float()), ()), native(own, float_state(), ())
    qc.load_checkpoint(loaded, float_state(), calibration="defer")
    for model in (loaded, twin):
        train(model)
    assert_same_state(loaded, twin)


def test_every_key_has_one_entry() -> None:
    own = partial(prepare, build=CONFIGS["affine"])
    for model in (other(own), own(make_float(), ())):
        description = describe_model(model)
        assert [key for key, entry in description.schema.items() if not entry.hidden] == list(model.state_dict())
        needs = {q.name: q.needs for q in description.quantizers}
        assert needs["relu.act_quant"] is needs["fc1.input_quant"] is Needs.DATA
        assert needs["fc1.bias_quant"] is Needs.NOTHING


def test_scripted_models_are_refused() -> None:
    model = CONFIGS["default"]()
    model.fc1.weight_quant.tensor_quant = torch.jit.script(nn.Identity())
    with pytest.raises(qc.CompatError, match="BREVITAS_JIT"):
        qc.load_checkpoint(model, float_state())
