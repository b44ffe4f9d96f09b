"""NVIDIA ModelOpt's own models and files: float in, resume, float out, and what is refused."""

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
from qat_compat.frameworks.modelopt import settings_of
from qat_compat.frameworks.modelopt_quantizer import amax_shape
from qat_compat.testing import assert_same_output, assert_same_state, scramble

mto = pytest.importorskip("modelopt.torch.opt")
mtq = pytest.importorskip("modelopt.torch.quantization")


def prepare(model: nn.Module, data: Sequence[Tensor], config: str = "INT8_DEFAULT_CFG", **changes: Any) -> nn.Module:
    """`mtq.quantize` with one of ModelOpt's own configurations."""
    chosen = {**copy.deepcopy(getattr(mtq, config)), **changes}

    def forward_loop(prepared: nn.Module) -> None:
        for batch in data:
            prepared(batch)

    return mtq.quantize(model, chosen, forward_loop)


# NVFP4 calibrates on a CPU and does not run there; FP8 of one range per token has no state of activations.
FORWARD = (
    "INT8_DEFAULT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
)
STATE_ONLY = ("NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "W4A8_NVFP4_FP8_CFG")
SMOOTHED = ("INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG")


def w4a8(model: nn.Module, data: Sequence[Tensor]) -> nn.Module:
    """The quantizers of W4A8, two in a row, calibrated without AWQ's smoothing."""
    return prepare(model, data, "W4A8_AWQ_BETA_CFG", algorithm="max")


@pytest.mark.parametrize("config", FORWARD + STATE_ONLY)
def test_twin(config: str) -> None:
    assert_native_twin(partial(prepare, config=config), outputs=config in FORWARD)


def test_twin_of_two_quantizers_in_a_row() -> None:
    twin = assert_native_twin(w4a8)
    assert {"fc1.weight_quantizer.0._amax", "fc1.weight_quantizer.1._amax"} <= set(twin.loaded.state_dict())


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_twin_of_a_model_that_was_never_calibrated(config: str, tmp_path: Path) -> None:
    """`_amax` does not exist there before calibration, and afterwards it is a buffer like that of the twin."""
    target = prepare(scramble(make_float()), (), config, algorithm=None)
    assert not any("_amax" in key for key in target.state_dict())
    qc.load_checkpoint(target, float_state(), calibration=batches())
    twin = native(partial(prepare, config=config), float_state(), batches())
    assert_same_state(target, twin)
    assert_same_output(target, twin, batches())
    mto.save(target, tmp_path / "mto.pt")  # ModelOpt's own record of the model knows the new buffers
    assert_same_state(mto.restore(make_float(), tmp_path / "mto.pt"), twin)


def test_blocks_with_a_second_range_are_refused() -> None:
    """Static NVFP4: ModelOpt itself works out the range that blocks, and layers, share."""
    blocks = {-1: 16, "type": "static", "scale_bits": (4, 3)}
    config = {"quant_cfg": {"*weight_quantizer": {"num_bits": (2, 1), "block_sizes": blocks}}, "algorithm": None}
    state = nn.Sequential(nn.Linear(32, 16)).state_dict()
    for algorithm in (None, "max"):
        model = mtq.quantize(nn.Sequential(nn.Linear(32, 16)), {**config, "algorithm": algorithm})
        with untouched(model), pytest.raises(qc.PlanError, match="share a second range"):
            qc.load_checkpoint(model, state)


@pytest.mark.parametrize("config", FORWARD + STATE_ONLY + SMOOTHED)
def test_resume(config: str) -> None:
    own = partial(prepare, config=config)
    forward = config not in STATE_ONLY
    model = native(own, float_state(), batches())
    assert_native_resume(own, train(model) if forward else model, outputs=forward)


def test_resume_of_a_model_that_was_never_calibrated() -> None:
    trained = train(native(prepare, float_state(), batches()))
    fresh = prepare(scramble(make_float()), (), algorithm=None)
    qc.load_checkpoint(fresh, trained.state_dict())
    assert_same_state(fresh, trained)
    assert_same_output(fresh, trained, batches())


@pytest.mark.parametrize("config", FORWARD + STATE_ONLY)
def test_back_to_float(config: str, tmp_path: Path) -> None:
    model = native(partial(prepare, config=config), float_state(), batches())
    mto.save(model, tmp_path / "mto.pt")
    assert_native_float(model, float_state(), [tmp_path / "mto.pt", qc.save_checkpoint(model, tmp_path / "own.pt")])


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_quantized_weights_are_those_that_the_layers_use(config: str) -> None:
    model = native(partial(prepare, config=config), float_state(), batches())
    back = qc.to_float(model, weights="quantized")
    for name in ("conv1", "conv2", "fc1", "fc2"):
        layer = model.get_submodule(name)
        with torch.no_grad(), layer.quantize_weight():
            assert torch.equal(back[f"{name}.weight"], layer.weight)


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_SMOOTHQUANT_CFG"])
def test_a_file_of_mto_save_into_a_restored_model(config: str, tmp_path: Path) -> None:
    """The file's own record makes the model, without calibration; the weights then come from the file."""
    trained = train(native(partial(prepare, config=config), float_state(), batches()))
    mto.save(trained, tmp_path / "mto.pt")
    restored = mto.restore_from_modelopt_state(scramble(make_float()), mto.modelopt_state(trained))
    report = qc.load_checkpoint(restored, tmp_path / "mto.pt")
    assert (report.synthesized, report.kept) == (0, 0)
    assert_same_state(restored, trained)
    assert_same_output(restored, trained, batches())


def test_a_float_file_into_a_restored_model() -> None:
    """A restored model has quantizers that were never run."""
    restored = mto.restore_from_modelopt_state(scramble(make_float()), mto.modelopt_state(other(prepare)))
    qc.load_checkpoint(restored, float_state(), calibration=batches())
    assert_same_state(restored, native(prepare, float_state(), batches()))


def test_settings_are_in_the_file(tmp_path: Path) -> None:
    model = native(partial(prepare, config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), float_state(), batches())
    mto.save(model, tmp_path / "mto.pt")
    found = settings_of(qc.open_checkpoint(tmp_path / "mto.pt").metadata)
    weight = found["fc1.weight_quantizer"]
    assert (weight.bits, dict(weight.blocks), weight.enabled) == (4, {-1: 128}, True)
    assert not found["fc1.input_quantizer"].enabled
    for name, settings in found.items():
        module = model.get_submodule(name)
        assert settings.enabled == module.is_enabled
        if "_amax" in module._buffers:
            weight = model.get_submodule(name.rpartition(".")[0]).weight
            assert amax_shape(tuple(weight.shape), settings) == tuple(module._amax.shape), name


@pytest.mark.parametrize("config", SMOOTHED)
def test_what_smoothing_made_is_never_taken_for_float(config: str) -> None:
    """The weight is stored as a product with `_pre_quant_scale`: it fits no float model, and no float weight fits."""
    model = native(partial(prepare, config=config), float_state(), batches())
    for source in (model, model.state_dict()):
        with pytest.raises(qc.PlanError, match="_pre_quant_scale"):
            qc.to_float(source)
        with pytest.raises(qc.PlanError, match="_pre_quant_scale"):
            qc.to_float(source, like=make_float())
    with untouched(model), pytest.raises(qc.PlanError, match="smoothing"):
        qc.load_checkpoint(model, float_state(), calibration=batches())
    plain = other(prepare)
    with untouched(plain), pytest.raises(qc.PlanError, match="_pre_quant_scale"):
        qc.load_checkpoint(plain, model.state_dict(), calibration=batches())


def test_an_algorithm_that_the_engine_does_not_run_is_refused() -> None:
    model = prepare(make_float(), batches(), algorithm="mse")
    with untouched(model), pytest.raises(qc.PlanError, match="calibrated with 'mse'"):
        qc.load_checkpoint(model, float_state(), calibration=batches())
    assert_native_resume(partial(prepare, algorithm="mse"), model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fc1.weight_quantizer._amax", torch.full((32, 1), -1.0)),
        ("fc1.weight_quantizer._amax", torch.full((32, 1), float("nan"))),
        ("conv2.input_quantizer._amax", torch.tensor(float("inf"))),
        ("conv2.weight_quantizer._amax", torch.ones(16)),
    ],
)
def test_bad_values(key: str, value: Tensor) -> None:
    model = other(prepare)
    state = native(prepare, float_state(), batches()).state_dict()
    with untouched(model), pytest.raises(qc.QParamError, match=key):
        qc.load_checkpoint(model, {**state, key: value})


def test_another_number_of_channels_is_computed_anew() -> None:
    state = native(prepare, float_state(), batches()).state_dict()
    model = other(prepare)
    report = qc.load_checkpoint(model, {**state, "fc1.weight_quantizer._amax": torch.ones(5, 1)})
    assert_same_state(model.state_dict(), state)
    assert report.synthesized == 1


def test_ranges_of_other_weights_are_refused() -> None:
    state = native(prepare, float_state(), batches()).state_dict()
    stale = {**state, "fc1.weight_quantizer._amax": 100 * state["fc1.weight_quantizer._amax"]}
    model = other(prepare)
    with untouched(model), pytest.raises(qc.PlanError, match="ranges of other weights"):
        qc.load_checkpoint(model, stale)


@pytest.mark.parametrize("calibrated", [False, True])
def test_an_error_in_calibration_takes_everything_back(calibrated: bool) -> None:
    """Also `_amax` buffers that came into being, the switches, and what calibrators had collected."""
    model = other(prepare) if calibrated else prepare(make_float(), (), algorithm=None)
    quantizer = model.fc1.input_quantizer
    collected = copy.deepcopy(quantizer._calibrator._calib_amax)

    def broken(prepared: nn.Module) -> None:
        prepared(batches()[0])
        raise RuntimeError("no more data")

    with untouched(model), pytest.raises(qc.CalibrationError, match="no more data"):
        qc.load_checkpoint(model, float_state(), calibration=broken)
    assert (quantizer._if_quant, quantizer._if_calib) == (True, False)
    assert quantizer._calibrator._calib_amax is collected or torch.equal(quantizer._calibrator._calib_amax, collected)


def test_nan_in_the_data_is_named() -> None:
    model = other(prepare)
    with untouched(model), pytest.raises(qc.CalibrationError, match=r"NaN or inf[^x]*conv1\.input_quantizer"):
        qc.load_checkpoint(model, float_state(), calibration=[torch.full((1, 3, 8, 8), float("nan"))])


def test_nan_in_a_weight_is_named() -> None:
    model = prepare(make_float(), (), "INT8_WEIGHT_ONLY_CFG")
    state = float_state()
    state["fc1.weight"][0, 0] = float("nan")
    with untouched(model), pytest.raises(qc.QParamError, match=r"fc1\.weight_quantizer"):
        qc.load_checkpoint(model, state)


def test_weights_need_no_data() -> None:
    model = other(prepare)
    before = model.fc1.input_quantizer._amax.clone()
    report = qc.load_checkpoint(model, float_state(), calibration="defer")
    assert any("training does not set it" in text for text in report.warnings)
    twin = native(prepare, float_state(), batches())
    assert torch.equal(model.fc1.weight_quantizer._amax, twin.fc1.weight_quantizer._amax)
    assert torch.equal(model.fc1.input_quantizer._amax, before)
    with untouched(model), pytest.raises(qc.CalibrationError, match=r"fc\{1,2\}\.input_quantizer"):
        qc.load_checkpoint(model, float_state())


def test_another_statistic() -> None:
    model = other(prepare)
    data = [torch.randn(32, 3, 16, 16)]
    data[0][0, 0, 0, 0] = 100.0  # far outside, and less than one value in ten thousand
    qc.load_checkpoint(model, float_state(), calibration=data, statistic="percentile")
    twin = native(prepare, float_state(), data)
    assert 3 < model.conv1.input_quantizer._amax < 5
    assert twin.conv1.input_quantizer._amax == 100
    assert torch.equal(model.conv1.weight_quantizer._amax, twin.conv1.weight_quantizer._amax)


def test_a_disabled_quantizer_stays_as_it_is() -> None:
    model = other(prepare)
    mtq.disable_quantizer(model, "*conv1*")
    before = model.conv1.input_quantizer._amax.clone()
    qc.load_checkpoint(model, float_state(), calibration=batches())
    assert torch.equal(model.conv1.input_quantizer._amax, before)


def test_every_key_has_one_entry() -> None:
    model = other(w4a8)
    description = describe_model(model)
    assert [key for key, entry in description.schema.items() if not entry.hidden] == list(model.state_dict())
    needs = {q.name: q.needs for q in description.quantizers}
    assert needs["fc1.weight_quantizer.0"] is needs["fc1.weight_quantizer.1"] is Needs.WEIGHTS
    assert (needs["fc1.input_quantizer"], needs["fc1.output_quantizer"]) == (Needs.DATA, Needs.DEFINITION)


def test_compressed_weights_are_not_float() -> None:
    model = native(partial(prepare, config="FP8_DEFAULT_CFG"), float_state(), batches())
    mtq.compress(model)
    with pytest.raises(qc.PlanError, match="converted"):
        qc.to_float(model)
    with pytest.raises(qc.PlanError, match="converted"):
        qc.load_checkpoint(model, float_state())


class Turned(nn.Module):
    """ModelOpt makes a linear layer of the first one, with the transpose of its weight."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.first, self.last = conv1d(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def test_a_weight_that_modelopt_turned_is_taken_for_no_float_weight(tmp_path: Path) -> None:
    """Square as it is, nothing but the name of its class tells."""
    torch.manual_seed(0)
    data = [torch.randn(5, 8)]
    state = Turned().state_dict()
    trained, model = prepare(Turned(), data), prepare(Turned(), [], algorithm=None)
    with untouched(model), pytest.raises(qc.PlanError, match="as its transpose"):
        qc.load_checkpoint(model, state, calibration=data)
    for like in (None, Turned()):
        with pytest.raises(qc.PlanError, match=r"first\.weight: .* as its transpose"):
            qc.to_float(trained, like=like)
    path = qc.save_checkpoint(trained, tmp_path / "model.safetensors")
    for source in (trained.state_dict(), path):
        model = prepare(Turned(), [], algorithm=None)
        assert qc.load_checkpoint(model, source).synthesized == 0
        assert torch.equal(model(data[0]), trained(data[0]))
