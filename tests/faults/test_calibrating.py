"""Every way in which calibration can fail: a `CalibrationError` that names what and where, and the model as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import FLOWS, HISTOGRAM, PER_TENSOR
from test_apply import CASES, Snapshot, prepared, untouched
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QuantStub, get_default_qat_qconfig, prepare_qat
from zoo import ARCHS

import qat_compat as qc
from qat_compat.frameworks import Needs, describe_model


@cache
def target(flow: str, name: str) -> nn.Module:
    return prepared(flow, name)


def _observed(model: nn.Module) -> nn.Module:
    """A module that every forward of the model, in whatever form it is run, passes through."""
    return [q for q in describe_model(model).quantizers if q.needs is Needs.DATA][-1].module


def _spoilt(flow: str, batches: list[Tensor], value: float) -> list[Tensor]:
    """torchao's quantizers take their range from the first batch alone, every other one from all of them."""
    batches[0 if flow.startswith("torchao") else 1].view(-1)[3] = value
    return batches


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_inf_in_a_batch_names_the_quantizer_and_the_batch(flow: str, name: str, value: float) -> None:
    arch, model = ARCHS[name], target(flow, name)
    batches = _spoilt(flow, arch.batches(), value)
    with untouched(model), pytest.raises(qc.CalibrationError, match="NaN or inf") as caught:
        qc.load_checkpoint(model, arch.state(), calibration=batches)
    names = [q.name for q in describe_model(model).quantizers]
    assert caught.value.key in names
    assert f"in calibration batch {0 if flow.startswith('torchao') else 1}" in str(caught.value)


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_a_weight_names_the_file_and_the_weight(
    flow: str, name: str, value: float, tmp_path: Path
) -> None:
    """Whether or not there is data; some frameworks' observers stop at NaN with an error that names nothing."""
    arch, model = ARCHS[name], target(flow, name)
    state = {key: tensor.clone() for key, tensor in arch.state().items()}
    site = next(q.site for q in describe_model(model).quantizers if q.needs is Needs.WEIGHTS)
    key = site.removeprefix("weight:").removesuffix("+bn") + ".weight"
    state[key].view(-1)[0] = value
    path = qc.save_checkpoint(state, tmp_path / "float.pt")
    with untouched(model), pytest.raises(qc.QParamError, match="hold NaN or inf") as caught:
        qc.load_checkpoint(model, path, calibration="defer")
    assert caught.value.file == str(path)
    assert site in str(caught.value)


class Bounded(nn.Module):
    """What its quantizer lets through is finite again."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.quant(x).nan_to_num(0.0).clamp(-1, 1))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "qconfig", [get_default_qat_qconfig("x86"), PER_TENSOR, HISTOGRAM], ids=["x86", "minmax", "histogram"]
)
def test_nan_and_inf_are_seen_where_they_enter(qconfig: QConfig, value: float) -> None:
    """Whatever the rest of the model makes of them; a histogram observer drops infinities without a word."""
    model = Bounded().train()
    model.qconfig = qconfig
    model = prepare_qat(model)
    state = Bounded().state_dict()
    batches = [torch.randn(3, 4), torch.randn(3, 4)]
    batches[1][0, 0] = value
    with untouched(model), pytest.raises(qc.CalibrationError, match="NaN or inf") as caught:
        qc.load_checkpoint(model, state, calibration=batches)
    assert caught.value.key == "quant.activation_post_process"
    assert "in calibration batch 1" in str(caught.value)


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize("data", ["none", "an iterator that is used up", "no rows"])
def test_no_data_at_all(flow: str, name: str, data: str) -> None:
    arch, model = ARCHS[name], target(flow, name)
    batches: Any = [] if data == "none" else iter(()) if data.startswith("an") else [arch.batches()[0][:0]]
    with untouched(model), pytest.raises(qc.CalibrationError) as caught:
        qc.load_checkpoint(model, arch.state(), calibration=batches)
    if data != "no rows":
        assert str(caught.value) == (
            "the calibration data held no batch\n"
            "  expected: at least one batch with at least one element\n"
            "  found:    0 batches\n"
            "  remedy:   pass a non-empty iterable; a generator can be consumed only once"
        )


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), KeyError("x"), KeyboardInterrupt(), SystemExit(2)], ids=lambda e: type(e).__name__
)
def test_a_hook_that_raises_in_the_middle(flow: str, name: str, error: BaseException) -> None:
    arch, model = ARCHS[name], target(flow, name)
    calls: list[int] = []

    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    handle = _observed(model).register_forward_hook(hook)
    expected = qc.CalibrationError if isinstance(error, Exception) else type(error)
    try:
        with untouched(model), pytest.raises(expected) as caught:
            qc.load_checkpoint(model, arch.state(), calibration=arch.batches(3))
    finally:
        handle.remove()
    assert len(calls) == 2
    if isinstance(error, Exception):
        assert caught.value.__cause__ is error
        assert f"the forward raised {type(error).__name__} on calibration batch 1" in str(caught.value)


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_a_batch_that_the_forward_does_not_take(flow: str, name: str) -> None:
    arch, model = ARCHS[name], target(flow, name)
    with untouched(model), pytest.raises(qc.CalibrationError, match="inputs=") as caught:
        qc.load_checkpoint(model, arch.state(), calibration=[torch.ones(2, 3)])
    assert caught.value.found == "float32[2, 3] on cpu"


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), SystemExit(2)], ids=repr)
def test_data_that_raises_while_it_is_read(error: BaseException) -> None:
    arch, model = ARCHS["plain"], target("eager-x86", "plain")

    def data() -> Iterator[Tensor]:
        yield arch.batches()[0]
        raise error

    expected = qc.CalibrationError if isinstance(error, Exception) else type(error)
    with untouched(model), pytest.raises(expected):
        qc.load_checkpoint(model, arch.state(), calibration=data())


@pytest.mark.parametrize("error", [RuntimeError("odd"), KeyboardInterrupt(), SystemExit(2)], ids=repr)
def test_a_callable_that_raises(error: BaseException) -> None:
    arch, model = ARCHS["plain"], target("eager-x86", "plain")

    def run(calibrated: nn.Module) -> None:
        calibrated(arch.batches()[0])
        raise error

    expected = qc.CalibrationError if isinstance(error, Exception) else type(error)
    with untouched(model), pytest.raises(expected):
        qc.load_checkpoint(model, arch.state(), calibration=run)


def test_a_callable_that_runs_nothing() -> None:
    arch, model = ARCHS["plain"], target("eager-x86", "plain")
    with untouched(model), pytest.raises(qc.CalibrationError, match="no quantizer ran on the calibration data"):
        qc.load_checkpoint(model, arch.state(), calibration=lambda _model: None)


def test_a_callable_that_trains_the_model_it_is_given_cannot_leave_a_trace() -> None:
    """Whatever it does to buffers, modes and random state is undone even though the load succeeds."""
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    before = Snapshot(model)

    def run(calibrated: nn.Module) -> None:
        torch.manual_seed(99)
        calibrated.train()
        for batch in arch.batches():
            calibrated(batch)

    qc.load_checkpoint(model, arch.state(), calibration=run)
    rows = Snapshot(model).rows
    assert [row for row in before.rows if row.startswith(("<", "random")) and rows[row] != before.rows[row]] == []
    for key, value in arch.state().items():
        if key.startswith("bn"):
            assert torch.equal(model.state_dict()[key.replace("bn", "conv").replace(".", ".bn.", 1)], value), key


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _two_ways() -> nn.Module:
    model = TwoWays().train()
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model)


def test_quantizers_that_never_run_are_listed_with_two_ways_out() -> None:
    model, state = _two_ways(), TwoWays().state_dict()
    with untouched(model), pytest.raises(qc.CalibrationError) as caught:
        qc.load_checkpoint(model, state, calibration=[torch.ones(2, 4)])
    assert str(caught.value) == (
        "12 quantizers never ran on the calibration data\n"
        "  key:      unused.{0...11}.activation_post_process\n"
        "  expected: every quantizer sees at least one tensor\n"
        "  remedy:   add batches that reach them; load_checkpoint also takes calibration='defer', which leaves all"
        " quantizers to training, and keep= their names, such as 'unused.0.activation_post_process*',"
        " which leaves these as they are"
    )


def test_quantizers_that_no_data_reaches_can_be_kept_by_name() -> None:
    """A glob that names no float entry is for quantizers; one that does is not, since what is kept is quantized too."""
    model, state = _two_ways(), TwoWays().state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("unused")}
    data = [torch.ones(2, 4)]
    with untouched(model), pytest.raises(qc.CalibrationError, match="never ran"):
        qc.load_checkpoint(model, state, calibration=data, keep="unused.*")
    report = qc.load_checkpoint(model, state, calibration=data, keep="unused.*.activation_post_process*")
    assert report.provenance("unused.3.activation_post_process.scale") == "keep: asked for by keep="
    for key, value in model.state_dict().items():
        if "unused" in key and "activation_post_process.scale" in key and "weight" not in key:
            assert torch.equal(value, before[key])
    assert report.provenance("unused.3.weight").startswith("copy")
    assert model.used.activation_post_process.scale != 1


def test_uncalibrated_quantizers_are_all_named_and_collapsed() -> None:
    model, state = _two_ways(), TwoWays().state_dict()
    with untouched(model), pytest.raises(qc.CalibrationError) as caught:
        qc.load_checkpoint(model, state)
    text = str(caught.value).splitlines()
    assert text[0] == "no range for 13 activation quantizers: the source does not hold one and no data was given"
    assert text[2:] == [
        "  key:      unused.{0...11}.activation_post_process, used.activation_post_process",
        "  remedy:   pass calibration=batches, or calibration='defer' to leave them to the first training batches,"
        " or keep= the names of those that are to stay as they are",
    ]


@pytest.mark.parametrize("statistic", ["percentile", "mse", "entropy"])
@pytest.mark.parametrize(("flow", "name"), CASES)
def test_a_statistic_that_a_framework_cannot_take_is_refused_in_the_family(
    flow: str, name: str, statistic: str
) -> None:
    """torchao's quantizers choose their range themselves; every other one takes any statistic."""
    arch = ARCHS[name]
    if not flow.startswith("torchao"):
        qc.load_checkpoint(prepared(flow, name), arch.state(), calibration=arch.batches(), statistic=statistic)
        return
    model = target(flow, name)
    with untouched(model), pytest.raises(qc.CompatError, match="native"):
        qc.load_checkpoint(model, arch.state(), calibration=arch.batches(), statistic=statistic)


def test_a_constant_activation_is_a_finding() -> None:
    """A range that holds one value has a documented scale, and the report says which quantizer it is."""
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    state = arch.state()
    state["fc.weight"].zero_()
    state["fc.bias"].zero_()
    report = qc.load_checkpoint(model, state, calibration=arch.batches())
    assert any("fc.activation_post_process" in text and "one value" in text for text in report.findings)
    scale = model.fc.activation_post_process.scale
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


# --- saved calibrations -----------------------------------------------------------------------------------------------


@cache
def _saved() -> qc.Calibration:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    qc.load_checkpoint(model, arch.state(), calibration="defer")
    return qc.calibrate(model, arch.batches())


def _with(key_end: str, change: Callable[[Tensor], Tensor]) -> qc.Calibration:
    tensors = dict(_saved().tensors)
    key = next(key for key in tensors if key.endswith(key_end))
    tensors[key] = change(tensors[key])
    return dataclasses.replace(_saved(), tensors=tensors)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_saved_calibration_with_a_bad_scale(value: float) -> None:
    arch, model = ARCHS["plain"], target("eager-x86", "plain")
    bad = _with("fc.activation_post_process.scale", lambda scale: torch.full_like(scale, value))
    with untouched(model), pytest.raises(qc.QParamError, match=r"fc\.activation_post_process"):
        qc.load_checkpoint(model, arch.state(), calibration=bad)


def test_a_saved_calibration_that_lacks_a_part_of_a_quantizer() -> None:
    arch, model = ARCHS["plain"], target("eager-x86", "plain")
    tensors = {key: v for key, v in _saved().tensors.items() if not key.endswith("fc.activation_post_process.scale")}
    with untouched(model), pytest.raises(qc.CompatError, match=r"fc\.activation_post_process"):
        qc.load_checkpoint(model, arch.state(), calibration=dataclasses.replace(_saved(), tensors=tensors))


def test_a_saved_calibration_that_lacks_a_quantizer_is_as_good_as_none_for_it() -> None:
    arch, model = ARCHS["plain"], target("eager-x86", "plain")
    tensors = {key: v for key, v in _saved().tensors.items() if not key.startswith("fc.")}
    with untouched(model), pytest.raises(qc.CalibrationError) as caught:
        qc.load_checkpoint(model, arch.state(), calibration=dataclasses.replace(_saved(), tensors=tensors))
    assert caught.value.key == "fc.activation_post_process"


def test_a_saved_calibration_of_another_observer() -> None:
    """A histogram cannot be made from a minimum and a maximum."""
    arch, model = ARCHS["plain"], target("eager-histogram", "plain")
    with untouched(model), pytest.raises(qc.CompatError):
        qc.load_checkpoint(model, arch.state(), calibration=_saved())


def test_a_file_that_is_no_saved_calibration(tmp_path: Path) -> None:
    model = target("eager-x86", "plain")
    path = qc.save_checkpoint(nn.Linear(2, 2), tmp_path / "weights.pt")
    with untouched(model), pytest.raises(qc.CheckpointError, match="this is not a saved calibration") as caught:
        qc.load_checkpoint(model, ARCHS["plain"].state(), calibration=path)
    assert caught.value.remedy == "make one with qat_compat.calibrate(model, batches).save(path)"


@pytest.mark.parametrize("statistic", ["median", "", None, 3])
def test_an_unknown_statistic(statistic: Any) -> None:
    model = target("eager-x86", "plain")
    with untouched(model), pytest.raises(qc.CalibrationError, match=r"native \| percentile \| mse \| entropy"):
        qc.calibrate(model, ARCHS["plain"].batches(), statistic=statistic)


# --- qc.calibrate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize("fault", ["none", "nan", "interrupt"])
def test_calibrate_never_changes_the_model(flow: str, name: str, fault: str) -> None:
    arch, model = ARCHS[name], target(flow, name)
    batches = _spoilt(flow, arch.batches(), float("nan")) if fault == "nan" else arch.batches()

    def interrupt(_model: nn.Module) -> None:
        raise KeyboardInterrupt

    with untouched(model):
        if fault == "none":
            assert qc.calibrate(model, batches).tensors
        elif fault == "nan":
            with pytest.raises(qc.CalibrationError):
                qc.calibrate(model, batches)
        else:
            with pytest.raises(KeyboardInterrupt):
                qc.calibrate(model, interrupt)


def test_a_model_without_activation_quantizers_cannot_be_calibrated() -> None:
    for model in (nn.Linear(2, 2), target("torchao-int8-int4", "transformer")):
        with pytest.raises(qc.CalibrationError, match="no quantizer that data could calibrate"):
            qc.calibrate(model, [torch.ones(1, 2)])


def test_every_framework_is_here() -> None:
    assert {FLOWS[flow].kind for flow, _ in CASES} == {"eager", "fx", "pt2e", "torchao"}
