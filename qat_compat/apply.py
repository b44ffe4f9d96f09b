"""Stage, verify, commit or roll back: the only code that writes to the user's model.

Every value is read and checked before the model is touched. Then the staged tensors are swapped into the model's own
tensor objects (`tensor.data = staged`), so that optimizers and ties keep pointing at them; scratch copies stand in
for every buffer while data runs. Any exception, KeyboardInterrupt included, puts everything back as it was, storages
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.calibrate import Data, Inputs, drive, observe_weights
from qat_compat.errors import CheckpointError, CompatError, PlanError, Problem, ProblemKind, QParamError
from qat_compat.frameworks import Description, Quantizer
from qat_compat.isolation import preserved_random_state
from qat_compat.match import canonical
from qat_compat.memory import copy_all, empty_like_spec
from qat_compat.plan import Copy, Derive, How, Plan, Synthesize
from qat_compat.schema import Role
from qat_compat.state import Slot, split_path

__all__ = ["Outcome", "Staged", "Work", "apply", "rehearsal", "stage"]

Read = Callable[[str], Tensor]

# observers may be frozen while weights train on, so a range can lag; no training moves a weight by the second factor
_DRIFT_NOTED = 2.0
_DRIFT_REFUSED = 16.0


@dataclass
class Staged:
    """Values read for a plan, before the model is touched."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by first key of the slot
    in_place: dict[str, Tensor] = field(default_factory=dict)  # read, but written only when all else is settled
    hidden: dict[str, Tensor] = field(default_factory=dict)  # state that the state_dict does not hold
    extra: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What is needed to carry out a plan beside the plan itself."""

    description: Description
    read: Read
    name: str = "<source>"
    data: Data | None = None
    inputs: Inputs | None = None
    statistic: str = "native"
    saved: Mapping[str, Tensor] = field(default_factory=dict)  # canonical key -> value of a saved calibration
    inplace: bool = False
    mmap: bool = False
    device: torch.device | None = None
    advance: Callable[[str], None] = lambda _stage: None


@dataclass(frozen=True)
class Outcome:
    """What happened: batches run, casts that lost something, findings about the values."""

    batches: int
    losses: Mapping[str, str]
    findings: tuple[str, ...]


# --- stage ------------------------------------------------------------------------------------------------------------


def stage(plan: Plan, work: Work) -> Staged:
    """Read every tensor that the plan copies, in the dtype and on the device where it will live.

    Raises:
        PlanError: Values that a cast would destroy, or tied names with different values.
    """
    schema, slots = work.description.schema, work.description.view.slots
    staged = Staged()
    problems: list[Problem] = []
    origin: dict[str, str] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for step in plan.steps:
        if isinstance(step, Copy):
            _stage_one(step.key, step.source, work, schema[step.key].role, slots, staged, origin, copies, problems)
            work.advance("read")
        elif isinstance(step, Synthesize) and step.how is How.RECORD:
            value = work.saved[canonical(step.key)]
            slot = slots.get(step.key)
            if slot is None:
                staged.hidden[step.key] = value.clone()
            else:
                staged.tensors[slot.key] = value.to(slot.tensor.device, slot.tensor.dtype, copy=True)
    if problems:
        raise PlanError(problems, file=plan.source)
    copy_all(copies)
    return staged


def _stage_one(
    key: str,
    source: str,
    work: Work,
    role: Role,
    slots: Mapping[str, Slot],
    staged: Staged,
    origin: dict[str, str],
    copies: list[tuple[Tensor, Tensor]],
    problems: list[Problem],
) -> None:
    if role is Role.EXTRA:
        staged.extra[key] = work.read(source)
        return
    value = _read(work, source)
    slot = slots.get(key)
    if slot is None:
        staged.hidden[key] = value.clone()
        return
    if slot.key in origin:
        if origin[slot.key] != source and not _equal(_read(work, origin[slot.key]), value):
            detail = f"{origin[slot.key]} and {source} differ, and the model ties {' and '.join(slot.keys[:2])}"
            problems.append(Problem(ProblemKind.MISMATCHED, key, detail, f"drop={source!r} keeps the other one"))
        return
    origin[slot.key] = source
    target = slot.tensor
    device = target.device if target.device.type != "meta" else work.device or torch.device("cpu")
    if value.dtype != target.dtype:
        loss = _cast_loss(value, target.dtype)
        if loss is not None and loss.fatal:
            problems.append(Problem(ProblemKind.LOSSY, key, loss.text, "prepare the model in the file's dtype"))
            return
        if loss is not None:
            staged.losses[key] = loss.text
    if work.mmap and value.dtype == target.dtype and value.device == device and value.shape == target.shape:
        staged.tensors[slot.key] = value.detach()
        return
    if work.inplace and slot.is_parameter and target.device.type != "meta":
        staged.in_place[slot.key] = value
        return
    like = target if target.device.type != "meta" else None
    fresh = empty_like_spec(tuple(value.shape), target.dtype, device, like)
    staged.tensors[slot.key] = fresh
    copies.append((fresh, value))


def _read(work: Work, source: str) -> Tensor:
    """One tensor with memory of its own; whatever goes wrong is a :class:`CheckpointError`."""
    try:
        value = work.read(source)
    except CompatError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the tensor cannot be read: {type(error).__name__}: {error}", file=work.name, key=source
        ) from error
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise CheckpointError(
            "the tensor holds no plain values",
            file=work.name,
            key=source,
            expected="a dense tensor with data",
            found=f"a {kind} tensor",
            remedy="save a dense, dequantized tensor under this name, or drop= it",
        )
    return value


def _equal(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.is_floating_point():
        return bool(((left == right) | ((left != left) & (right != right))).all())
    return torch.equal(left, right)


@dataclass(frozen=True)
class _Loss:
    text: str
    fatal: bool


def _cast_loss(value: Tensor, dtype: torch.dtype) -> _Loss | None:
    """What a cast changes: rounding to fewer bits is counted; a value that the dtype cannot hold at all is fatal."""
    cast = value.to(dtype)
    names = f"{str(value.dtype).removeprefix('torch.')} to {str(dtype).removeprefix('torch.')}"
    if value.is_floating_point() and dtype.is_floating_point:
        if torch.finfo(dtype).bits > torch.finfo(value.dtype).bits:
            return None
        lost = int((torch.isfinite(value) & ~torch.isfinite(cast)).sum())
        if lost:
            return _Loss(f"{lost} of {value.numel()} values overflow from {names}", True)
        changed = int(((cast.to(value.dtype) != value) & (value == value)).sum())
        return _Loss(f"{changed} of {value.numel()} values rounded from {names}", False) if changed else None
    back = cast.to(value.dtype)
    changed = int((back != value).sum())
    if dtype.is_floating_point and not value.is_complex():
        lost = int((~torch.isfinite(cast)).sum())
        if lost:
            return _Loss(f"{lost} of {value.numel()} values overflow from {names}", True)
        return _Loss(f"{changed} of {value.numel()} values rounded from {names}", False) if changed else None
    return _Loss(f"{changed} of {value.numel()} values cannot be held after {names}", True) if changed else None


# --- the transaction --------------------------------------------------------------------------------------------------


class _Transaction:
    """The model as it was, and the way back to it."""

    def __init__(self, model: nn.Module, slots: Mapping[str, Slot]) -> None:
        self.slots = {slot.key: slot for slot in slots.values()}
        self._modules = [
            (
                m,
                dict(m.__dict__),
                dict(m._parameters),
                dict(m._buffers),
                dict(m._modules),
                set(m._non_persistent_buffers_set),
            )
            for m in model.modules()
        ]
        self._data = {key: slot.tensor.data for key, slot in self.slots.items()}

    def install(self, key: str, value: Tensor) -> None:
        """Make a slot hold `value`; the tensor object stays the same wherever that is possible."""
        slot = self.slots[key]
        if slot.tensor.device.type != "meta":
            for tensor in slot.tensors:
                tensor.data = value
            return
        fresh = nn.Parameter(value, slot.tensor.requires_grad) if slot.is_parameter else value
        for module, name in slot.owners:
            (module._parameters if slot.is_parameter else module._buffers)[name] = fresh  # type: ignore[assignment]

    def scratch(self) -> None:
        """Copies stand in for every buffer, so that nothing that runs can reach the model's own."""
        for key, slot in self.slots.items():
            if not slot.is_parameter and slot.tensor.device.type != "meta":
                self.install(key, slot.tensor.data.clone())

    def settle(self, staged: Mapping[str, Tensor], changed: set[str]) -> None:
        """Keep what quantizers wrote to the buffers in `changed`; every other one gets its staged or its old value."""
        for key, slot in self.slots.items():
            if slot.is_parameter or slot.tensor.device.type == "meta":
                continue
            if key in changed:
                module, name = slot.owners[0]
                current = module._buffers[name]
                if current is not None and current is not slot.tensor:
                    self.install(key, current.data)
            else:
                self.install(key, staged.get(key, self._data[key]))
            by_id = {id(tensor): tensor for tensor in slot.tensors}
            for module, name in slot.owners:
                if id(module._buffers[name]) not in by_id:
                    module._buffers[name] = slot.tensor

    def roll_back(self) -> None:
        for module, attributes, parameters, buffers, children, hidden in self._modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for mapping, saved in (
                (module._parameters, parameters),
                (module._buffers, buffers),
                (module._modules, children),
            ):
                mapping.clear()
                mapping.update(saved)  # type: ignore[arg-type]
            module._non_persistent_buffers_set = hidden
        for key, slot in self.slots.items():
            for tensor in slot.tensors:
                tensor.data = self._data[key]


@contextmanager
def rehearsal(description: Description, values: Mapping[str, Callable[[], Tensor]] | None = None) -> Iterator[None]:
    """Run the model on scratch copies of its buffers; afterwards everything is as it was, whatever happened.

    Args:
        description: The model.
        values: Key -> reads the value that stands in for the model's own meanwhile.
    """
    with preserved_random_state(), torch.no_grad():
        transaction = _Transaction(description.view.model, description.view.slots)
        try:
            transaction.scratch()
            for key, read in (values or {}).items():
                slot = description.view.slots[key]
                transaction.install(slot.key, read().to(slot.tensor.device, slot.tensor.dtype, copy=True))
            yield
        finally:
            transaction.roll_back()


def apply(plan: Plan, work: Work) -> Outcome:
    """Carry out a plan; on any exception the model is as it was.

    Raises:
        PlanError: The plan has problems, or the values read show one.
        CalibrationError: See :func:`qat_compat.calibrate.drive`.
        QParamError: A scale or zero_point that no quantizer can use.
    """
    description = work.description
    with preserved_random_state(), torch.no_grad():
        staged = stage(plan, work)
        transaction = _Transaction(description.view.model, description.view.slots)
        try:
            transaction.scratch()
            for key, value in staged.tensors.items():
                slot = transaction.slots[key]
                transaction.install(key, value if slot.is_parameter else value.clone())
            copy_all((transaction.slots[key].tensor.data, value) for key, value in staged.in_place.items())
            _set_extra(description, staged)
            batches = _synthesize(plan, work)
            _set_hidden(description, staged)
            written = _written(plan, description)
            findings = _verify(plan, description)
            transaction.settle(staged.tensors, written)
        except BaseException:
            transaction.roll_back()
            raise
    return Outcome(batches, staged.losses, findings)


def _set_extra(description: Description, staged: Staged) -> None:
    for key, value in staged.extra.items():
        module = description.view.modules[split_path(key)[0]]
        try:
            module.set_extra_state(value)
        except Exception as error:
            raise CompatError(
                f"{type(module).__name__}.set_extra_state refuses what the source holds: {error}",
                key=key,
                found=type(value).__name__,
                remedy=f"drop={key!r} ignores it",
            ) from error


def _set_hidden(description: Description, staged: Staged) -> None:
    by_name = {quantizer.name: quantizer for quantizer in description.quantizers}
    for key, value in staged.hidden.items():
        name, leaf = split_path(key)
        by_name[name].restore(leaf, value)


def _chosen(plan: Plan, description: Description) -> tuple[list[Quantizer], list[Quantizer], list[Quantizer]]:
    """Quantizers that take their range from weights, from data, and those that only recompute scale and zero_point."""
    how: dict[str, How] = {}
    derived: set[str] = set()
    for step in plan.steps:
        if isinstance(step, Synthesize):
            how[step.quantizer] = step.how
        elif isinstance(step, Derive):
            derived.add(description.schema[step.key].quantizer)
    every = description.quantizers
    return (
        [q for q in every if how.get(q.name) is How.WEIGHTS],
        [q for q in every if how.get(q.name) is How.CALIBRATION],
        [q for q in every if q.name in derived],
    )


def _synthesize(plan: Plan, work: Work) -> int:
    from_weights, from_data, derived = _chosen(plan, work.description)
    batches = 0
    if from_data:
        assert work.data is not None
        batches = drive(
            work.description,
            [*from_weights, *from_data],
            work.data,
            inputs=work.inputs,
            statistic=work.statistic,
            advance=lambda: work.advance("calibrate"),
        )
    else:
        observe_weights(from_weights)
    for quantizer in derived:
        quantizer.settle()
    return batches


def _written(plan: Plan, description: Description) -> set[str]:
    """First keys of the slots whose value the quantizers computed."""
    slots = description.view.slots
    keys = {
        s.key for s in plan.steps if isinstance(s, Derive) or (isinstance(s, Synthesize) and s.how is not How.RECORD)
    }
    return {slots[key].key for key in keys if key in slots}


def _verify(plan: Plan, description: Description) -> tuple[str, ...]:
    """Look at the result: quantizers that can be used, and no tensor left without storage."""
    schema = description.schema
    touched = {
        schema[step.key].quantizer
        for step in plan.steps
        if isinstance(step, (Copy, Derive, Synthesize)) and step.key in schema
    }
    problems = [p for q in description.quantizers if q.name in touched for p in q.check()]
    if problems:
        first = problems[0]
        raise QParamError(
            f"{len(problems)} quantizer value(s) cannot be used: {first.detail}",
            file=plan.source,
            key=", ".join(p.key for p in problems[:8]),
            expected="finite, positive scales and zero points within the quantizer's range",
            found=first.detail,
            remedy=first.remedy,
        )
    model = description.view.model
    meta = [k for k, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if meta:
        raise PlanError(
            [
                Problem(
                    ProblemKind.MISSING,
                    key,
                    "still on the meta device: the source does not hold it",
                    "build this buffer on a real device before loading",
                )
                for key in meta
            ],
            file=plan.source,
        )
    findings = [finding for q in description.quantizers if q.name in touched for finding in q.findings()]
    return (*findings, *_stale(plan, description))


def _stale(plan: Plan, description: Description) -> list[str]:
    """Copied ranges of weight quantizers that do not belong to the weights they now stand beside."""
    schema = description.schema
    copied = {schema[s.key].quantizer for s in plan.steps if isinstance(s, Copy) and schema[s.key].role is Role.MIN}
    findings: list[str] = []
    problems: list[Problem] = []
    for quantizer in description.quantizers:
        factor = quantizer.drift() if quantizer.name in copied else None
        if factor is None or 1 / _DRIFT_NOTED < factor < _DRIFT_NOTED:
            continue
        detail = f"the weight reaches {factor:.3g} times the range that the source holds for it"
        if 1 / _DRIFT_REFUSED < factor < _DRIFT_REFUSED:
            findings.append(f"{quantizer.name}: {detail}")
        else:
            remedy = f"drop='{quantizer.name}.*' recomputes the range from the weight"
            problems.append(Problem(ProblemKind.STALE, quantizer.name, detail, remedy))
    if problems:
        raise PlanError(problems, file=plan.source, summary="the source holds ranges of other weights")
    return findings
