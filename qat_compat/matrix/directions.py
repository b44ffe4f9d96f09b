"""The directions of the matrix, each with the check that decides it; the checks share no code with the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.matrix.cases import DTYPES, Case, framework_side
from qat_compat.testing import assert_same_output, assert_same_state, scramble
from qat_compat.testing.comparison import fail_with, full_state, output_tensors
from qat_compat.testing.modes import eval_form, training_modes
from qat_compat.testing.quantizers import fake_quantizers, intx_quantizers, observers

__all__ = ["DIRECTIONS", "Direction"]


@dataclass(frozen=True)
class Direction:
    """One thing that is done with a state.

    Args:
        name: Its name in test ids and reports.
        title: The same in a reader's words.
        means: What is asserted.
        check: Asserts it.
        optional: Whether the library may refuse it, which is shown as not supported and never as a pass.
    """

    name: str
    title: str
    means: str
    check: Callable[[Case], None]
    optional: bool = False


def check_load(case: Case) -> None:
    """Float file -> prepared model: what float load, prepare and native calibration give."""
    twin, model = case.calibrated(), case.fresh()
    source = case.written(case.state)
    modes = training_modes(model)
    qc.load_checkpoint(model, source, calibration=case.batches, **case.witness)
    assert_same_state(model, twin)
    _assert_on_device(case, model)
    now = training_modes(model)
    fail_with([f"{name}: training mode was {mode}" for name, mode in modes.items() if now[name] != mode])
    assert_same_output(model, twin, case.batches[:1], inputs=case.inputs)


def check_resume(case: Case) -> None:
    """QAT file -> an equal prepared model: what was saved, and nothing made anew."""
    saved, model = case.trained(case.calibrated()), case.fresh()
    source = saved if case.flow.hidden else case.written(saved.state_dict())
    report = qc.load_checkpoint(model, source, **case.witness)
    assert_same_state(model, saved)
    _assert_on_device(case, model)
    counts = {"derived": report.derived, "synthesized": report.synthesized}
    fail_with([f"{count} entries were {word}" for word, count in counts.items() if count])
    assert_same_output(model, saved, case.batches[:1], inputs=case.inputs)


def check_back(case: Case) -> None:
    """QAT file -> float: the state_dict that it came from, with its keys, order, dtypes and bits."""
    model = case.calibrated()
    like = scramble(case.declared.make())
    if case.cell.dtype != "fp32":
        like = like.to(DTYPES[case.cell.dtype])
    back = dict(qc.to_float(case.written(model.state_dict()), like=like).items())
    assert_same_state(back, case.state)
    fail_with([f"{a}: in the place of {b}" for a, b in zip(back, case.state, strict=True) if a != b])


def check_converted(case: Case) -> None:
    """File of integers -> float: the model with its weights quantized and its activations not, but for rounding."""
    model = case.calibrated()
    expected = _weight_quantized_outputs(case, copy.deepcopy(model))
    source = case.written(case.converted(model).state_dict())
    float_model = case.declared.make()
    float_model.load_state_dict(dict(qc.to_float(source, like=scramble(case.declared.make())).items()))
    _assert_close(_outputs(case, float_model), expected, 0.01)


def check_transfer(case: Case) -> None:
    """QAT file of another flow -> prepared model: weights and weight quantizers in every bit, outputs but for
    rounding."""
    donor, twin, model = case.calibrated(case.donor), case.calibrated(), case.fresh()
    options = {"float_model": case.declared.make(), **case.witness}
    qc.load_checkpoint(model, case.written(donor.state_dict()), calibration=case.batches, **options)
    theirs = _activation_paths(twin)
    found, wanted = full_state(model), {**full_state(twin), **_carried_scales(donor, twin)}
    assert_same_state(*({k: v for k, v in state.items() if not k.startswith(theirs)} for state in (found, wanted)))
    _assert_on_device(case, model)
    _assert_close(_outputs(case, model), _outputs(case, twin), 0.1)


def _assert_on_device(case: Case, model: nn.Module) -> None:
    """Nothing was left on the CPU by a load onto another device."""
    held = {key: value for key, value in full_state(model).items() if isinstance(value, Tensor)}
    wrong = {key: value.device.type for key, value in held.items() if value.device.type != case.cell.device}
    fail_with([f"{key}: is on {place}, should be on {case.cell.device}" for key, place in wrong.items()])


DIRECTIONS: Mapping[str, Direction] = {
    direction.name: direction
    for direction in (
        Direction("load", "float → QAT", "every key and output equals the native twin's, bit for bit", check_load),
        Direction("resume", "resume", "every key is as saved, bit for bit; nothing is computed anew", check_resume),
        Direction("back", "QAT → float", "keys, order, dtypes and bits of the float file", check_back),
        Direction(
            "converted",
            "converted → float",
            "outputs equal those with quantized weights and float activations, to 1 %",
            check_converted,
            optional=True,
        ),
        Direction(
            "transfer",
            "other flow → QAT",
            "weights equal the twin's and weight quantizers the other flow's, bit for bit; outputs to 10 %",
            check_transfer,
            optional=True,
        ),
    )
}


# --- outputs ----------------------------------------------------------------------------------------------------------


def _outputs(case: Case, model: nn.Module) -> list[Tensor]:
    """In eval mode, on the first batch."""
    args, kwargs = case.declared.arguments(model, case.batches[0])
    with eval_form(model) as form, torch.no_grad():
        return [output.float() for output in output_tensors(form(*args, **kwargs))]


def _weight_quantized_outputs(case: Case, model: nn.Module) -> list[Tensor]:
    with framework_side(), _float_activations(model):
        return _outputs(case, model)


@contextmanager
def _float_activations(model: nn.Module) -> Iterator[None]:
    """Observers off, weights rounded as `convert` rounds them, and no quantizer of activations does anything."""
    for name, quantizer in _named(model, fake_quantizers(model)):
        quantizer.observer_enabled.fill_(0)
        quantizer.fake_quant_enabled.fill_(0)
        if _is_of_weights(name, quantizer):
            quantizer.forward = partial(_rounded, quantizer)
    for name, quantizer in _named(model, intx_quantizers(model)):
        quantizer.enabled = _is_of_weights(name, quantizer)
    yield


def _rounded(quantizer: Any, weight: Tensor) -> Tensor:
    """On the grid of `calculate_qparams`, which `convert` asks; a fused quantizer's own forward makes another."""
    scale, zero_point = quantizer.calculate_qparams()
    observer = quantizer.activation_post_process
    zero_point = zero_point if zero_point.is_floating_point() else zero_point.to(torch.int32)
    if scale.numel() == 1:
        limits = (observer.quant_min, observer.quant_max)
        return torch.fake_quantize_per_tensor_affine(weight, scale, zero_point.to(torch.int32), *limits)
    return torch.fake_quantize_per_channel_affine(
        weight, scale, zero_point, quantizer.ch_axis, observer.quant_min, observer.quant_max
    )


def _assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """The distance between two outputs is at most that part of the expected one's size."""
    lines = [] if len(found) == len(expected) else [f"{len(found)} outputs, should be {len(expected)}"]
    for index, (a, b) in enumerate(zip(found, expected, strict=False)):
        distance = float((a - b).norm() / b.norm().clamp_min(1e-6))
        if not distance <= tolerance:
            lines.append(f"output {index}: differs by {distance:.2%} of its size, at most {tolerance:.1%} is rounding")
    fail_with(lines)


# --- quantizers -------------------------------------------------------------------------------------------------------


def _named(model: nn.Module, modules: list[Any]) -> list[tuple[str, Any]]:
    wanted = {id(module) for module in modules}
    return [(name, module) for name, module in model.named_modules() if id(module) in wanted]


def _is_of_weights(name: str, quantizer: Any) -> bool:
    """By its name, or in an exported program by its signed integers."""
    return "weight" in name.rpartition(".")[2] or getattr(quantizer, "dtype", None) in (torch.qint8, torch.int8)


def _carried_scales(donor: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
    """Scale and zero_point of the donor's weight quantizers, under the twin's keys.

    Two flows may make different scales of one range: the `eps` of one holds up what the other lets be. What was trained
    with is then the donor's. A quantizer of the twin is one of the donor if both hold the same range on the same grid.
    """
    theirs = {_range_and_grid(quantizer): quantizer for quantizer in fake_quantizers(donor)}
    carried: dict[str, Tensor] = {}
    for name, quantizer in _named(twin, fake_quantizers(twin)):
        origin = theirs.get(_range_and_grid(quantizer))
        if origin is not None and _is_of_weights(name, quantizer):
            carried |= {f"{name}.scale": origin.scale, f"{name}.zero_point": origin.zero_point}
    return carried


def _range_and_grid(quantizer: Any) -> tuple[Any, ...]:
    observer = quantizer.activation_post_process
    bounds = [getattr(observer, name, None) for name in ("min_val", "max_val")]
    values = [tuple(bound.flatten().tolist()) if isinstance(bound, Tensor) else None for bound in bounds]
    return *values, observer.quant_min, observer.quant_max, str(observer.qscheme)


def _activation_paths(model: nn.Module) -> tuple[str, ...]:
    """How the keys begin of everything that observes or quantizes activations."""
    quantizers = [*fake_quantizers(model), *intx_quantizers(model)]
    paths = [name for name, quantizer in _named(model, quantizers) if not _is_of_weights(name, quantizer)]
    inside = {id(child) for quantizer in quantizers for child in quantizer.modules()}
    paths += [name for name, one in _named(model, observers(model)) if id(one) not in inside]
    return tuple(f"{path}." for path in paths)
