"""Ranges of one framework in quantizers of another: weights, where both quantize the same tensor on the same integers.

The oracle is the framework that the range comes from: the target then rounds a weight to the values that it does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import pytest
import test_brevitas
import test_modelopt
import test_nncf
import torch
from native import batches, float_state, make_float, native
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver, QConfig, prepare_qat

import qat_compat as qc
from qat_compat.source import open_any
from qat_compat.testing import assert_same_state

WEIGHTS = ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]


def torch_ao(low: int = -128, high: int = 127) -> nn.Module:
    """A torch.ao model, unfused, with one symmetric range per output channel of each weight."""
    model = make_float(5).train()
    weight = FakeQuantize.with_args(
        observer=PerChannelMinMaxObserver,
        quant_min=low,
        quant_max=high,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    model.qconfig = QConfig(activation=nn.Identity, weight=weight)
    return prepare_qat(model)


def modelopt_int8(state: dict[str, Tensor]) -> nn.Module:
    return native(partial(test_modelopt.prepare, config="INT8_DEFAULT_CFG"), state, batches())


def brevitas_int8(state: dict[str, Tensor]) -> nn.Module:
    return native(partial(test_brevitas.prepare, build=test_brevitas.CONFIGS["learned per channel"]), state, batches())


def nncf_int8(state: dict[str, Tensor]) -> nn.Module:
    return native(partial(test_nncf.prepare, config="all levels"), state, batches())


MAKERS: dict[str, Callable[[dict[str, Tensor]], nn.Module]] = {
    "modelopt": modelopt_int8,
    "brevitas": brevitas_int8,
    "nncf": nncf_int8,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_target_rounds_weights_as_the_source_does(name: str) -> None:
    source = MAKERS[name](float_state())
    expected = qc.to_float(source, weights="quantized")
    schema = open_any(source).schema
    quantizers = {entry.quantizer for entry in schema.values() if entry.site.startswith("weight:")}
    (grid,) = {schema.grids[name] for name in quantizers}
    low, high = map(int, grid.split()[0].split(".."))
    target = torch_ao(low, high)
    report = qc.load_checkpoint(target, source)
    assert report.derived == 4 * len(WEIGHTS)
    assert_same_state(dict(qc.to_float(target)), dict(qc.to_float(source)))
    found = qc.to_float(target, weights="quantized")
    for key in WEIGHTS:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
        assert not torch.equal(found[key], qc.to_float(source)[key])


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """Of ModelOpt, with ranges that its weights would not give."""
    model = modelopt_int8(float_state())
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith("weight_quantizer"):
                module._amax.mul_(1.25)
    return model


def amax_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        path.removesuffix(".weight_quantizer"): module._amax.flatten()
        for path, module in model.named_modules()
        if path.endswith("weight_quantizer")
    }


def test_a_file_that_says_how_many_bits_gives_the_scale(source: nn.Module, tmp_path: Path) -> None:
    mto.save(source, tmp_path / "int8.pt")
    target = torch_ao()
    qc.load_checkpoint(target, tmp_path / "int8.pt")
    for path, amax in amax_of(source).items():
        quantizer: Any = target.get_submodule(path).weight_fake_quant
        assert torch.equal(quantizer.scale, amax / 127)
        assert torch.equal(quantizer.zero_point, torch.zeros_like(quantizer.zero_point))
        low, high = quantizer.activation_post_process.min_val, quantizer.activation_post_process.max_val
        torch.testing.assert_close(high, amax / 127 * 127.5)
        assert torch.equal(low, -high)
        again, _ = quantizer.calculate_qparams()  # what training goes on from
        torch.testing.assert_close(again, quantizer.scale, rtol=1e-6, atol=0)


def in_pytorch_quantization(key: str) -> str:
    return key.replace("weight_quantizer", "_weight_quantizer").replace("input_quantizer", "_input_quantizer")


@pytest.mark.parametrize("rename", [str, in_pytorch_quantization])
def test_a_file_without_bits_gives_the_range(source: nn.Module, rename: Callable[[str], str], tmp_path: Path) -> None:
    """A largest magnitude is a range on any grid; the scale is then the target's own affair."""
    torch.save({rename(key): value for key, value in source.state_dict().items()}, tmp_path / "state.pt")
    target = torch_ao()
    report = qc.load_checkpoint(target, tmp_path / "state.pt")
    for path, amax in amax_of(source).items():
        quantizer: Any = target.get_submodule(path).weight_fake_quant
        assert torch.equal(quantizer.activation_post_process.max_val, amax)
        assert torch.equal(quantizer.activation_post_process.min_val, -amax)
        assert torch.equal(quantizer.scale, quantizer.calculate_qparams()[0])
    assert "modelopt's _amax as max_val" in str(report)
    assert not any(key.endswith((".min_val", ".scale")) for key in report_keys(report, "Drop"))


def report_keys(report: qc.Report, step: str) -> list[str]:
    return [one.key for one in report.steps if type(one).__name__ == step]


def test_lowest_and_highest_values_give_the_range(tmp_path: Path) -> None:
    """AIMET's keys; (C, 1, 1, 1) there is (C,) here."""
    state = float_state()
    keys = dict(state)
    for name in WEIGHTS:
        weight = state[name]
        shape = [-1, *([1] * (weight.dim() - 1))]
        high = 1.5 * weight.abs().flatten(1).amax(1).reshape(shape)
        host = name.removesuffix(".weight")
        keys[f"{host}.param_quantizers.weight.min"] = -high
        keys[f"{host}.param_quantizers.weight.max"] = high
    torch.save(keys, tmp_path / "aimet.pt")
    target = torch_ao()
    qc.load_checkpoint(target, tmp_path / "aimet.pt")
    for name in WEIGHTS:
        quantizer: Any = target.get_submodule(name.removesuffix(".weight")).weight_fake_quant
        expected = keys[name.replace("weight", "param_quantizers.weight.max")].flatten()
        assert torch.equal(quantizer.activation_post_process.max_val, expected)
        torch.testing.assert_close(quantizer.scale, expected / 127.5)


def test_another_granularity_is_worked_out_from_the_weights(source: nn.Module) -> None:
    state = {key: v.max() if "weight_quantizer" in key else v for key, v in source.state_dict().items()}
    target, twin = torch_ao(), torch_ao()
    report = qc.load_checkpoint(target, state)
    qc.load_checkpoint(twin, qc.to_float(source))
    assert_same_state(target, twin.state_dict())
    assert "another granularity: recomputed from the weights" in str(report)


def test_four_bit_groups_go_to_torchao() -> None:
    from torchao.quantization import PerGroup, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config: Any = copy.deepcopy(test_modelopt.mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 128))
    state = copy.deepcopy(float_model.state_dict())
    source = test_modelopt.mtq.quantize(float_model, config, lambda model: model(torch.randn(4, 256)))
    with torch.no_grad():
        source[0].weight_quantizer._amax.mul_(1.25)
    weight_config = IntxFakeQuantizeConfig(
        torch.int4, PerGroup(128), is_symmetric=True, is_dynamic=False, range_learning=True,
        zero_point_precision=torch.float32,
    )  # fmt: skip
    target = nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 128))
    only = lambda module, name: isinstance(module, nn.Linear) and name == "0"  # noqa: E731
    quantize_(target, QATConfig(weight_config=weight_config, step="prepare"), filter_fn=only)
    qc.load_checkpoint(target, source)
    amax = source[0].weight_quantizer._amax
    assert torch.equal(target[0].weight_fake_quantizer.scale, (amax / 7).reshape(8, 2))
    assert torch.equal(target[0].weight, state["0.weight"])
    expected = source[0].weight_quantizer(state["0.weight"])
    torch.testing.assert_close(qc.to_float(target, weights="quantized")["0.weight"], expected)
