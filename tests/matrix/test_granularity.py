"""A QAT file of one granularity or observer into a model of another: seen beforehand, and made anew where it must
be."""

from __future__ import annotations

import copy

import pytest
import torch
from flows import HISTOGRAM, eager, prepare_for
from torch import nn
from torch.ao.quantization import FakeQuantize, HistogramObserver, QConfig
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_same_output, assert_same_state, native_calibration, scramble


def _native(flow: str, name: str) -> nn.Module:
    arch = ARCHS[name]
    model = arch.make()
    model.load_state_dict(arch.state())
    model = prepare_for(flow, name)(model)
    native_calibration(model, arch.batches())
    return model


def _other(flow: str, name: str) -> nn.Module:
    return prepare_for(flow, name)(scramble(ARCHS[name].make()))


@pytest.mark.parametrize("name", ["plain", "residual", "linear_bn"])
@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("eager-qnnpack", "eager-x86"),
        ("eager-x86", "eager-qnnpack"),
        ("fx-qnnpack", "fx-x86"),
        ("eager-x86", "eager-x86-v0"),
    ],
)
def test_between_backends(source: str, target: str, calibrate: bool, name: str) -> None:
    """Their activation observers see the same data in the same way, so that carried and calibrated ranges are one.

    Only their quantized range may differ. Weights change between per-tensor and per-channel.
    """
    model = _other(target, name)
    before = copy.deepcopy(model.state_dict())
    state = _native(source, name).state_dict()
    plan = qc.plan_load(model, state, calibration=ARCHS[name].batches() if calibrate else None)
    assert not plan.problems
    assert_same_state(model.state_dict(), before)
    report = qc.load_checkpoint(model, state, calibration=ARCHS[name].batches() if calibrate else None)
    expected = _native(target, name)
    assert_same_state(model, expected)
    assert_same_output(model, expected, ARCHS[name].batches())
    if "v0" not in target:
        assert report.derived + report.synthesized > 0


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("eager-minmax-per-tensor", "eager-average-per-channel"),
        ("eager-average-per-channel", "eager-minmax-per-tensor"),
        ("eager-x86", "eager-histogram"),
        ("eager-histogram", "eager-x86"),
    ],
)
def test_between_observers(source: str, target: str) -> None:
    """Weights as the target's own quantizer sees them; every activation range finite; and it runs."""
    arch, model = ARCHS["plain"], _other(target, "plain")
    qc.load_checkpoint(model, _native(source, "plain").state_dict(), calibration=arch.batches())
    expected = _native(target, "plain").state_dict()
    found = model.state_dict()
    weights = {key for key in expected if "weight_fake_quant" in key}
    assert weights
    assert_same_state({key: found[key] for key in weights}, {key: expected[key] for key in weights})
    for key, value in found.items():
        assert key in expected, key
        assert value.shape == expected[key].shape, key
        if key.endswith("scale"):
            assert torch.isfinite(value).all(), key
            assert (value > 0).all(), key
    model(arch.batches()[0])


def test_between_histograms() -> None:
    """Other bins: a histogram cannot be carried, so the target's own is made from the data."""
    activation = FakeQuantize.with_args(
        observer=HistogramObserver, quant_min=0, quant_max=255, dtype=torch.quint8, bins=64
    )
    qconfig = QConfig(activation=activation, weight=HISTOGRAM.weight)
    arch = ARCHS["plain"]
    model = eager(scramble(arch.make()), arch, qconfig=qconfig)
    state = _native("eager-histogram", "plain").state_dict()
    qc.load_checkpoint(model, state, calibration=arch.batches())
    float_model = arch.make()
    float_model.load_state_dict(arch.state())
    expected = eager(float_model, arch, qconfig=qconfig)
    native_calibration(expected, arch.batches())
    assert_same_state(model, expected)


def test_without_data_nothing_is_left_at_its_start() -> None:
    """Histograms say nothing without data: they are carried as ranges, or asked for, but never left empty."""
    arch, model = ARCHS["plain"], _other("eager-histogram", "plain")
    before = copy.deepcopy(model.state_dict())
    try:
        qc.load_checkpoint(model, _native("eager-x86", "plain").state_dict())
    except qc.CompatError as error:
        assert "activation_post_process" in str(error)
        assert_same_state(model.state_dict(), before)
    else:
        scales = {key: v for key, v in model.state_dict().items() if key.endswith("scale")}
        assert all((value != 1).all() for value in scales.values())
    assert arch.name == "plain"
