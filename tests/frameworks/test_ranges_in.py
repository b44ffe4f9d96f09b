"""Ranges of torch.ao, torchao and files in quantizers that write them down in their own way.

The oracle is what each package's own quantizer then makes of a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_brevitas
import test_modelopt
import test_nncf
import torch
from native import batches, encoding_of, float_state, make_float, native, other
from test_apply import untouched
from test_translation import WEIGHTS, in_pytorch_quantization, torch_ao
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver, QConfig, prepare_qat
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torchao.quantization import PerAxis, PerGroup, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import qat_compat as qc
from qat_compat.conventions import CONVENTIONS, Grid
from qat_compat.frameworks import describe_model
from qat_compat.plan import Drop
from qat_compat.testing import assert_same_state, scramble

Make = Callable[[], nn.Module]


def brevitas(config: str) -> Make:
    return partial(other, partial(test_brevitas.prepare, build=test_brevitas.CONFIGS[config]))


def modelopt(config: str = "INT8_DEFAULT_CFG") -> Make:
    return partial(other, partial(test_modelopt.prepare, config=config))


def nncf(config: str) -> Make:
    return partial(other, partial(test_nncf.prepare, config=config))


def untrained_modelopt() -> nn.Module:
    return test_modelopt.prepare(scramble(make_float()), (), algorithm=None)


def untrained_brevitas() -> nn.Module:
    build = test_brevitas.CONFIGS["learned per channel"]
    return test_brevitas.prepare(scramble(make_float()), (), build)


TARGETS: dict[str, tuple[Make, str]] = {
    "modelopt": (modelopt(), "-128..127 symmetric"),
    "modelopt, never calibrated": (untrained_modelopt, "-128..127 symmetric"),
    "brevitas": (brevitas("learned per channel"), "-127..127 symmetric"),
    "brevitas, logarithms": (brevitas("learned logarithms"), "-127..127 symmetric"),
    "brevitas, never calibrated": (untrained_brevitas, "-127..127 symmetric"),
    "nncf": (nncf("all levels"), "-127..127 symmetric"),
}
MAGNITUDES = {"modelopt": "_amax", "brevitas": test_brevitas.VALUE, "nncf": "_scale_param_storage"}


def wide(model: nn.Module) -> nn.Module:
    """A torch.ao model of the float state with ranges that its weights would not give, other ones for each channel."""
    qc.load_checkpoint(model, float_state(), calibration=batches())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FakeQuantize):
                factor = 1 + torch.rand(module.scale.shape, generator=generator)
                observer: Any = module.activation_post_process
                for value in (module.scale, observer.min_val, observer.max_val):
                    value.mul_(factor.reshape(value.shape))
    return model


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """Layer -> the one tensor in which the quantizer of its weight writes down its range."""
    found = {}
    for quantizer in describe_model(model).quantizers:
        kind, _, host = quantizer.site.partition(":")
        if kind == "weight":
            encoding = encoding_of(quantizer)
            assert encoding is not None
            (value,) = encoding.tensors.values()
            found[host] = value.flatten().clone()
    return found


def extremes(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name in WEIGHTS:
        observer: Any = model.get_submodule(name.removesuffix(".weight")).weight_fake_quant.activation_post_process
        found[name.removesuffix(".weight")] = torch.maximum(-observer.min_val, observer.max_val)
    return found


@pytest.mark.parametrize("suffix", ["live", "pt", "safetensors"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_target_rounds_weights_as_torch_ao_does(name: str, suffix: str, tmp_path: Path) -> None:
    make, grid = TARGETS[name]
    low, high = map(int, grid.split()[0].split(".."))
    source = wide(torch_ao(low, high))
    target = make()
    form = source if suffix == "live" else qc.save_checkpoint(source, tmp_path / f"qat.{suffix}")
    report = qc.load_checkpoint(target, form, calibration=batches())
    assert report.derived == len(WEIGHTS)
    assert "the scale of the source as" in str(report)
    assert_same_state(dict(qc.to_float(target)), float_state())
    expected, found = qc.to_float(source, weights="quantized"), qc.to_float(target, weights="quantized")
    for key in WEIGHTS:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[key], float_state()[key], rtol=1e-5, atol=1e-6)
    before = magnitudes(target)
    target(batches()[0])  # no first forward of the target's own puts another range in its place
    assert all(torch.equal(value, before[host]) for host, value in magnitudes(target).items())


@pytest.mark.parametrize("name", ["modelopt", "brevitas", "nncf"])
def test_a_scale_of_torchao_is_found_again(name: str, tmp_path: Path) -> None:
    learned: dict[str, Any] = {"is_dynamic": False, "range_learning": True, "zero_point_precision": torch.float32}
    config = IntxFakeQuantizeConfig(torch.int8, PerAxis(0), is_symmetric=True, **learned)
    source = make_float()
    quantize_(source, QATConfig(weight_config=config, step="prepare"))
    qc.load_checkpoint(source, float_state(), calibration=batches())
    with torch.no_grad():
        source.fc1.weight_fake_quantizer.scale.mul_(1.4)
    target, grid = TARGETS[name][0](), TARGETS[name][1]
    qc.load_checkpoint(target, qc.save_checkpoint(source, tmp_path / "qat.pt"), calibration=batches())
    scale, levels = source.fc1.weight_fake_quantizer.scale.detach().flatten(), 127.5
    if grid == "-128..127 symmetric":  # the same integers: the same scale; else the same range
        expected, levels = qc.to_float(source, weights="quantized")["fc1.weight"], 127
        found = qc.to_float(target, weights="quantized")["fc1.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(magnitudes(target)["fc1"], scale * levels, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["brevitas", "nncf"])
def test_a_range_goes_to_a_grid_without_its_lowest_level(name: str) -> None:
    """Of -128..127 to -127..127, the scale cannot; the range can, and the scale is the target's own affair."""
    source, target = wide(torch_ao()), TARGETS[name][0]()
    report = qc.load_checkpoint(target, source, calibration=batches())
    assert "the largest magnitude of the source as" in str(report)
    found = magnitudes(target)
    for host, value in extremes(source).items():
        torch.testing.assert_close(found[host], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("low", [-128, -127])
def test_a_scale_that_was_learnt_goes_before_what_was_observed_once(low: int) -> None:
    source = make_float(5).train()
    weight = _LearnableFakeQuantize.with_args(
        observer=MinMaxObserver, quant_min=low, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
    )
    source.qconfig = QConfig(activation=nn.Identity, weight=weight)
    prepare_qat(source, inplace=True)
    qc.load_checkpoint(source, float_state())
    quantizer: Any = source.fc1.weight_fake_quant
    with torch.no_grad():
        quantizer.scale.mul_(1.5)
    target = brevitas("learned")()
    qc.load_checkpoint(target, source, calibration=batches())
    reach = 127.5 if low == -128 else 127
    torch.testing.assert_close(magnitudes(target)["fc1"], quantizer.scale.detach() * reach, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in TARGETS if "logarithms" not in name])
def test_a_largest_magnitude_of_unknown_bits_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    """pytorch-quantization's files, weights and inputs."""
    source = native(test_modelopt.prepare, float_state(), batches())
    with torch.no_grad():
        for path, module in source.named_modules():
            if path.endswith(("weight_quantizer", "input_quantizer")) and hasattr(module, "_amax"):
                module._amax.mul_(1.25)
    state = {in_pytorch_quantization(key): value for key, value in source.state_dict().items()}
    torch.save(state, tmp_path / "quantized.pth")
    target = TARGETS[name][0]()
    qc.load_checkpoint(target, tmp_path / "quantized.pth", calibration=batches())
    for host, value in magnitudes(target).items():
        assert torch.equal(value, state[f"{host}._weight_quantizer._amax"].flatten())
    if name.startswith("modelopt"):  # the whole file is the same quantizers under other names
        assert_same_state(target, source)


PAIRS = [(one, other) for one in MAGNITUDES for other in MAGNITUDES if one != other]


@pytest.mark.parametrize(("origin", "name"), PAIRS)
def test_from_each_to_each_by_its_file(origin: str, name: str, tmp_path: Path) -> None:
    """A file that we save says how its ranges are to be read, which its keys do not."""
    source = TARGETS[origin][0]()
    with torch.no_grad():
        for path, tensor in (*source.named_parameters(), *source.named_buffers()):
            if path.endswith(MAGNITUDES[origin]):
                tensor.mul_(1.25)
    path = qc.save_checkpoint(source, tmp_path / "qat.pt")
    target, again = TARGETS[name][0](), TARGETS[name][0]()
    qc.load_checkpoint(target, path, calibration=batches())
    qc.load_checkpoint(again, source, calibration=batches())
    assert_same_state(target, again)
    theirs, mine = magnitudes(source), magnitudes(target)
    assert len(theirs) == len(WEIGHTS)
    for host, value in theirs.items():
        torch.testing.assert_close(mine[host], value, rtol=1e-6, atol=0)
    if origin != "modelopt":  # every integer of the source is one of the target
        expected, found = qc.to_float(source, weights="quantized"), qc.to_float(target, weights="quantized")
        for key in WEIGHTS:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


def affine() -> nn.Module:
    return _torch_ao(PerChannelMinMaxObserver, torch.per_channel_affine)


def per_tensor() -> nn.Module:
    return _torch_ao(MinMaxObserver, torch.per_tensor_symmetric)


def _torch_ao(observer: Any, scheme: torch.qscheme) -> nn.Module:
    model = make_float(5).train()
    model.qconfig = QConfig(activation=nn.Identity, weight=_weight(observer, scheme))
    return prepare_qat(model)


def _weight(observer: Any, scheme: torch.qscheme, low: int = -128, axis: int = 0) -> Any:
    along = {"ch_axis": axis} if "per_channel" in str(scheme) else {}
    return FakeQuantize.with_args(
        observer=observer, quant_min=low, quant_max=127, dtype=torch.qint8, qscheme=scheme, **along
    )


def bare() -> dict[str, Tensor]:
    return dict(wide(torch_ao()).state_dict())


REFUSED: dict[str, tuple[Callable[[], Any], Make, str]] = {
    "asymmetric": (lambda: wide(affine()), modelopt(), "grid -128..127 affine, not -128..127 symmetric"),
    "other bits": (lambda: wide(torch_ao(-8, 7)), nncf("all levels"), "grid -8..7 symmetric, not -127..127 symmetric"),
    "four bits here": (lambda: wide(torch_ao()), brevitas("four bits"), "another granularity"),
    "one range for all": (lambda: wide(per_tensor()), brevitas("learned per channel"), "another granularity"),
    "no grid in the file": (bare, modelopt(), "the source's grid is not known"),
    "floating point": (
        lambda: wide(per_tensor()), modelopt("FP8_DEFAULT_CFG"), "its levels are floating-point numbers, E4M3",
    ),
    "powers of two": (lambda: wide(per_tensor()), brevitas("learned powers of two"), "its scales are powers of two"),
    "half of the levels": (
        lambda: wide(torch_ao()), nncf("half of the levels"), "it leaves half of its levels unused, against overflow",
    ),
    "no state": (lambda: wide(per_tensor()), brevitas("default"), "it works its range out anew for every tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_is_made_anew_and_said(case: str) -> None:
    source, make, reason = REFUSED[case]
    held, target, twin = source(), make(), make()
    report = qc.load_checkpoint(target, held, calibration=batches())
    said = {step.reason for step in report.steps if isinstance(step, Drop) and "weight" in step.key}
    assert any(reason in text for text in said), said
    qc.load_checkpoint(twin, float_state(), calibration=batches())
    assert_same_state(target, twin)


def test_ranges_of_floating_point_are_never_those_of_integers() -> None:
    """448 is not 127."""
    source = native(partial(test_modelopt.prepare, config="FP8_DEFAULT_CFG"), float_state(), batches())
    target, twin = per_tensor(), per_tensor()
    qc.load_checkpoint(target, source)
    qc.load_checkpoint(twin, float_state())
    assert_same_state(target, twin)


@pytest.mark.parametrize("axis", [0, 1])
def test_ranges_are_taken_along_their_own_axis(axis: int) -> None:
    """As many ranges of inputs as of outputs."""

    def build() -> nn.Module:
        options = {**test_brevitas.LEARNED, "weight_quant": test_brevitas.bq.Int8WeightPerChannelFloat}
        return nn.Sequential(test_brevitas.qnn.QuantLinear(4, 4, bias=False, **options))

    source, prepared = build(), nn.Sequential(nn.Linear(4, 4, bias=False)).train()
    source(torch.randn(1, 4))
    threshold = source[0].weight_quant.tensor_quant.scaling_impl.value.detach()
    threshold.mul_(torch.tensor([[1.2], [1.3], [1.4], [1.5]]))
    weight = _weight(PerChannelMinMaxObserver, torch.per_channel_symmetric, -127, axis)
    prepared.qconfig = QConfig(activation=nn.Identity, weight=weight)
    prepare_qat(prepared, inplace=True)
    for held, target in ((source, prepared), (prepared, build())):
        report = qc.load_checkpoint(target, held)
        assert (report.derived > 0) == (axis == 0)
        reasons = {step.reason for step in report.steps if isinstance(step, Drop)}
        assert any("granularity" in why or "along axis 1" in why for why in reasons) == (axis == 1)


def test_groups_of_torchao_are_blocks_of_modelopt() -> None:
    static: dict[str, Any] = {"is_dynamic": False, "range_learning": True, "zero_point_precision": torch.float32}
    config = IntxFakeQuantizeConfig(torch.int4, PerGroup(128), is_symmetric=True, **static)
    source = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 128))
    state = copy.deepcopy(source.state_dict())
    only = lambda module, name: name == "0"  # noqa: E731
    quantize_(source, QATConfig(weight_config=config, step="prepare"), filter_fn=only)
    qc.load_checkpoint(source, state)
    with torch.no_grad():
        source[0].weight_fake_quantizer.scale.mul_(1.25)
    target = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 128))
    blocks = copy.deepcopy(test_modelopt.mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    target = test_modelopt.mtq.quantize(target, blocks, lambda model: model(torch.randn(4, 256)))
    qc.load_checkpoint(target, source)
    scale = source[0].weight_fake_quantizer.scale.detach()
    assert scale.shape == (8, 2)
    torch.testing.assert_close(target[0].weight_quantizer._amax, (scale * 7).reshape(16, 1))
    expected = qc.to_float(source, weights="quantized")["0.weight"]
    torch.testing.assert_close(target[0].weight_quantizer(target[0].weight), expected)


@pytest.mark.parametrize("bad", ["modelopt.other", 10**9, {}, None], ids=str)
def test_a_record_that_is_not_known_is_as_none(bad: Any, tmp_path: Path) -> None:
    """A newer version's convention, no number of bits, no names: the file is read, its ranges are not."""
    source = TARGETS["brevitas"][0]()
    opened = qc.open_checkpoint(qc.save_checkpoint(source, tmp_path / "qat.pt"))
    forms = opened.record["encodings"]
    part = {str: "convention", int: "bits", dict: "leaves"}.get(type(bad))
    changed = {name: {**form, part: bad} if part else bad for name, form in forms.items()}
    record = {**opened.record, "encodings": changed, "grids": dict.fromkeys(forms, "1e99..2 symmetric")}
    held = qc.Checkpoint({key: opened.spec(key) for key in opened}, opened.__getitem__, name="x", record=record)
    report = qc.load_checkpoint(torch_ao(), held)
    assert_same_state(dict(qc.to_float(held)), dict(qc.to_float(source)))
    assert report.derived == 0


def test_a_zero_point_is_never_lost() -> None:
    """A file whose grid says symmetric and whose zero points say otherwise."""
    source = wide(torch_ao())
    source.fc1.weight_fake_quant.zero_point += 1
    target = modelopt()()
    with untouched(target), pytest.raises(qc.QParamError, match=r"fc1\.weight_fake_quant\.zero_point"):
        qc.load_checkpoint(target, source, calibration=batches())


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", [name for name, row in CONVENTIONS.items() if row.written])
def test_what_is_written_down_is_read_again(name: str, bits: int, signed: bool, narrow: bool) -> None:
    """In float64, every scale and every zero point of the grid."""
    row, grid = CONVENTIONS[name], Grid(bits, signed, narrow and signed)
    generator = torch.Generator().manual_seed(bits)
    levels = torch.arange(grid.low, grid.high + 1, dtype=torch.float64)
    scale = torch.rand(len(levels), generator=generator, dtype=torch.float64).exp2() * 1e-2
    zero_point = levels if row.is_affine else torch.zeros_like(levels)
    assert row.written is not None
    tensors = row.written(scale, zero_point, grid)
    assert set(tensors) == set(row.tensors)
    found, zeros = row.qparams(tensors, grid)
    torch.testing.assert_close(found, scale, rtol=1e-12, atol=0)
    assert torch.equal(zeros, zero_point)
