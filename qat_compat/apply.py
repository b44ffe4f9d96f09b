"""Carry out a plan: stage, synthesize, verify, commit or roll back. The only code that writes to the user's model.

Every value is read and checked before the model is touched. Then the staged tensors are swapped into the model's own
tensor objects (`tensor.data = staged`), so that optimizers and ties keep pointing at them; scratch copies stand in
for every buffer while data runs. Any exception, KeyboardInterrupt included, puts everything back as it was, storages
included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from qat_compat.driving import Data, Inputs, drive, observe_weights
from qat_compat.errors import CompatError, PlanError, Problem, ProblemKind, QParamError
from qat_compat.frameworks import Description, Quantizer, compute_all_qparams, doubtful, drifts
from qat_compat.isolation import preserved_random_state
from qat_compat.plan import Copy, Derive, How, Keep, Plan, Step, Synthesize
from qat_compat.schema import Role, Schema
from qat_compat.staging import Reading, Staged, stage
from qat_compat.state import Slot, split_path
from qat_compat.text import counted
from qat_compat.transaction import Transaction

__all__ = ["Driving", "Outcome", "apply"]

# observers may be frozen while weights train on, so a range can lag; no training moves a weight by the second factor
# from a range that was once its own, though it may from one that a moving average began with
_DRIFT_NOTED = 2.0
_DRIFT_REFUSED = 16.0


@dataclass(frozen=True)
class Driving:
    """The data that calibrates, and how it is driven through the model."""

    data: Data | None = None
    inputs: Inputs | None = None
    statistic: str = "native"
    advance: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """What happened: batches run, casts that lost something, findings about the values."""

    batches: int
    losses: Mapping[str, str]
    findings: tuple[str, ...]


def apply(plan: Plan, reading: Reading, driving: Driving) -> Outcome:
    """Carry out a plan; on any exception the model is as it was.

    Raises:
        PlanError: The plan has problems, or the values read show one.
        CalibrationError: See :func:`qat_compat.driving.drive`.
        QParamError: A scale or zero_point that no quantizer can use.
    """
    description = reading.description
    _refuse_meta(
        [s.key for s in plan.steps if isinstance(s, (Keep, Synthesize)) or (isinstance(s, Derive) and not s.is_read)],
        plan,
        description,
    )
    # what is made in inference mode could not be trained; what the model has from there can be written in it alone
    fixed = any(slot.tensor.is_inference() for slot in description.view.slots.values())
    with preserved_random_state(), torch.inference_mode(fixed), torch.no_grad():
        staged = stage(plan, reading)
        runs = _runs(plan, staged, description)
        transaction = Transaction(description.view.model, description.view.slots, runs=runs)
        try:
            if runs:
                transaction.scratch(staged.tensors)
            for key, value in staged.tensors.items():
                slot = transaction.slots[key]
                transaction.install(key, value.clone() if runs and not slot.is_parameter else value)
            staged.write_in_place()
            _set_extra(description, staged, transaction)
            _run_post_hooks(description, staged, transaction)
            _adopt(plan, description)
            _set_hidden(description, staged)  # before data runs: a quantizer may refuse to run without it
            batches = _synthesize(plan, description, driving, staged)
            findings = _verify(plan, description)
            if runs:
                transaction.settle(staged.tensors, _written(plan, description))
        except BaseException as error:
            transaction.roll_back()
            if isinstance(error, QParamError):
                error.file = error.file or plan.source
            raise
    return Outcome(batches, staged.losses, findings)


def _runs(plan: Plan, staged: Staged, description: Description) -> bool:
    """Whether anything will run that can write to buffers: quantizers, the model on data, a module's own code."""
    works = any(isinstance(step, (Derive, Synthesize)) for step in plan.steps)
    adopts = any(type(quantizer).adopt is not Quantizer.adopt for quantizer in description.quantizers)
    return works or adopts or bool(staged.extra or staged.hidden) or bool(_hooked(description))


def _set_extra(description: Description, staged: Staged, transaction: Transaction) -> None:
    for key, value in staged.extra.items():
        module = description.view.modules[split_path(key)[0]]
        with suppress(Exception):  # of a module that has none yet
            transaction.undo.append(partial(module.set_extra_state, copy.deepcopy(module.get_extra_state())))
        try:
            module.set_extra_state(value)
        except Exception as error:
            raise CompatError(
                f"{type(module).__name__}.set_extra_state refuses what the source holds: {error}",
                key=key,
                found=type(value).__name__,
                remedy=f"drop={key!r} ignores it",
            ) from error


def _hooked(description: Description) -> dict[str, nn.Module]:
    """The modules that work something out when their tensors have been loaded, those inside of others first."""
    modules = reversed(list(description.view.modules.items()))
    return {path: module for path, module in modules if module._load_state_dict_post_hooks}


def _run_post_hooks(description: Description, staged: Staged, transaction: Transaction) -> None:
    """What `load_state_dict` would call; before data runs, which may see what it makes."""
    hooked = _hooked(description)
    for path, module in hooked.items():
        for hook in module._load_state_dict_post_hooks.values():
            try:
                hook(module, _IncompatibleKeys([], []))
            except Exception as error:
                raise CompatError(
                    f"a load_state_dict post-hook of {type(module).__name__} raised {type(error).__name__}: {error}",
                    key=path or "<model>",
                    remedy="see the cause above; without inplace=True the model is as it was",
                ) from error
    inside = tuple(path and f"{path}." for path in hooked)
    for key, slot in transaction.slots.items():
        if not slot.is_parameter and not slot.tensor.is_meta and inside and key.startswith(inside):
            module, name = slot.owners[0]
            if (current := module._buffers[name]) is not None:
                staged.tensors[key] = current.data.clone()


def _adopt(plan: Plan, description: Description) -> None:
    """Tell the quantizers which of their tensors hold what a checkpoint held."""
    if not description.quantizers:
        return
    leaves: dict[str, list[str]] = {}
    for step in plan.steps:
        if _is_taken(step) or (isinstance(step, Synthesize) and step.how is How.RECORD):
            entry = description.schema[step.key]
            leaves.setdefault(entry.quantizer, []).append(entry.leaf)
    known = [quantizer for quantizer in description.quantizers if quantizer.name in leaves]
    _refuse_values(plan, [problem for q in known for problem in q.misshapen(leaves[q.name])])
    for quantizer in known:
        quantizer.adopt(leaves[quantizer.name])


def _theirs(step: Copy | Derive, schema: Schema) -> str:
    """The source's name for the quantizer of which a step takes something."""
    origin = step.source if isinstance(step, Copy) else step.sources[0]
    leaf = f".{schema[step.key].leaf}"
    return origin.removesuffix(leaf) if origin.endswith(leaf) else split_path(origin)[0]


def _is_taken(step: Step) -> TypeGuard[Copy | Derive]:
    """Whether its value is the source's, in whatever terms."""
    return isinstance(step, Copy) or (isinstance(step, Derive) and step.is_read)


def _set_hidden(description: Description, staged: Staged) -> None:
    by_name = {quantizer.name: quantizer for quantizer in description.quantizers}
    for key, value in staged.hidden.items():
        name, leaf = split_path(key)
        by_name[name].restore(leaf, value)


@dataclass(frozen=True)
class _Chosen:
    """What each quantizer is to do: take its range from weights or data, compute its scale from its range, or the
    range from its scale."""

    from_weights: list[Quantizer]
    from_data: list[Quantizer]
    settled: list[Quantizer]
    spanned: list[Quantizer]


def _chosen(plan: Plan, description: Description) -> _Chosen:
    how: dict[str, How] = {}
    settled: set[str] = set()
    spanned: set[str] = set()
    for step in plan.steps:
        if isinstance(step, Synthesize):
            how[step.quantizer] = step.how
        elif isinstance(step, Derive) and not step.is_read:
            entry = description.schema[step.key]
            (spanned if entry.role in (Role.MIN, Role.MAX) else settled).add(entry.quantizer)
    every = description.quantizers
    return _Chosen(
        [q for q in every if how.get(q.name) is How.WEIGHTS],
        [q for q in every if how.get(q.name) is How.CALIBRATION],
        [q for q in every if q.name in settled],
        [q for q in every if q.name in spanned],
    )


def _synthesize(plan: Plan, description: Description, driving: Driving, staged: Staged) -> int:
    if not description.quantizers:
        return 0
    chosen = _chosen(plan, description)
    known = {q.name: found for q in chosen.from_weights if (found := staged.range_of(q)) is not None}
    batches = 0
    if chosen.from_data:
        assert driving.data is not None
        batches = drive(
            description,
            [*chosen.from_weights, *chosen.from_data],
            driving.data,
            inputs=driving.inputs,
            statistic=driving.statistic,
            advance=driving.advance,
            known=known,
        )
    else:
        observe_weights(chosen.from_weights, known)
    compute_all_qparams(chosen.settled)
    for quantizer in chosen.spanned:
        quantizer.compute_range()
    return batches


def _written(plan: Plan, description: Description) -> set[str]:
    """First keys of the slots whose value the quantizers computed."""
    slots = description.view.slots
    keys = {
        s.key
        for s in plan.steps
        if (isinstance(s, Derive) and not s.is_read) or (isinstance(s, Synthesize) and s.how is not How.RECORD)
    }
    written = {slots[key].key for key in keys if key in slots}
    schema = description.schema
    filled = (Copy, Derive, Synthesize)
    touched = {schema[s.key].quantizer for s in plan.steps if isinstance(s, filled) and s.key in schema} - {""}
    # what a quantizer works out from its state and does not save, its levels say, goes with that state
    return written | {slot.key for slot in slots.values() if not slot.persistent and split_path(slot.key)[0] in touched}


def _verify(plan: Plan, description: Description) -> tuple[str, ...]:
    """Look at the result: quantizers that can be used, and no tensor left without storage."""
    touched = _touched(plan, description) if description.quantizers else set()
    suspects = doubtful(quantizer for quantizer in description.quantizers if quantizer.name in touched)
    _refuse_values(plan, [problem for quantizer in suspects for problem in quantizer.check()])
    _refuse_meta(list(description.view.slots), plan, description)
    findings = [finding for quantizer in suspects for finding in quantizer.findings()]
    return (*findings, *_stale(plan, description))


def _refuse_values(plan: Plan, problems: Sequence[Problem]) -> None:
    if problems:
        first = problems[0]
        raise QParamError(
            f"{counted(len(problems), 'quantizer value')} cannot be used: {first.detail}",
            file=plan.source,
            key=", ".join(p.key for p in problems[:8]),
            expected="finite, positive scales and zero points within the quantizer's range",
            found=first.detail,
            remedy=first.remedy,
        )


def _touched(plan: Plan, description: Description) -> set[str]:
    """Names of the quantizers of which a step writes something."""
    entries = description.schema.entries
    steps = (step for step in plan.steps if isinstance(step, (Copy, Derive, Synthesize)))
    return {entries[step.key].quantizer for step in steps if step.key in entries}


def _refuse_meta(keys: Sequence[str], plan: Plan, description: Description) -> None:
    """Raise where tensors that the source does not give have no data in the model either."""
    slots = description.view.slots
    problems = [
        Problem(
            ProblemKind.MISSING,
            key,
            "still on the meta device: the source does not hold it",
            "build it on a real device before loading; quantizers, too: only parameters can be made by the load",
        )
        for key in keys
        if key in slots and key == slots[key].key and _is_meta(slots[key])
    ]
    if problems:
        raise PlanError(problems, file=plan.source)


def _is_meta(slot: Slot) -> bool:
    """Whether the tensor that the model now holds in a slot has no data."""
    if not slot.tensor.is_meta:
        return False  # what has data is never replaced by what has none
    module, name = slot.owners[0]
    held = (module._parameters if slot.is_parameter else module._buffers).get(name)
    return held is not None and held.is_meta


def _stale(plan: Plan, description: Description) -> list[str]:
    """Copied ranges of weight quantizers that do not belong to the weights they now stand beside."""
    if not description.quantizers:
        return []
    schema = description.schema
    ranges = (Role.MIN, Role.AMAX)
    taken = {schema[s.key].quantizer: s for s in plan.steps if _is_taken(s) and schema[s.key].role in ranges}
    findings: list[str] = []
    problems: list[Problem] = []
    known = [quantizer for quantizer in description.quantizers if quantizer.name in taken]
    for quantizer, factor in drifts(known).items():
        if 1 / _DRIFT_NOTED < factor < _DRIFT_NOTED:
            continue
        detail = f"the weight reaches {factor:.3g} times the range that the source holds for it"
        if 1 / _DRIFT_REFUSED < factor < _DRIFT_REFUSED or quantizer.has_moving_average():
            findings.append(f"{quantizer.name}: {detail}")
        else:
            theirs = escape(_theirs(taken[quantizer.name], schema))
            remedy = f"drop='{theirs}.*' recomputes the range from the weight"
            problems.append(Problem(ProblemKind.STALE, quantizer.name, detail, remedy))
    if problems:
        raise PlanError(problems, file=plan.source, summary="the source holds ranges of other weights")
    return findings
