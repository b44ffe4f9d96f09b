"""One load, from its arguments to its report: open and describe both sides, match, join, apply.

What is decided here is which evidence is asked for, and when: the data only for what nothing else could tell.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_compat.apply import Driving, apply
from qat_compat.calibration import Calibration, fingerprint
from qat_compat.draft import Goal
from qat_compat.driving import Data, batches_of
from qat_compat.errors import CalibrationError, CompatError, PlanError, Problem, ProblemKind
from qat_compat.evidence import contradictions, from_float_model, from_forward, from_statistics
from qat_compat.frameworks import Description, describe_model
from qat_compat.isolation import paused_collector, preserved_random_state
from qat_compat.join import COVERAGE, join, without
from qat_compat.match import match
from qat_compat.names import canonical, idle_patterns
from qat_compat.norms import Evidence, Match
from qat_compat.options import Options, calibration_of, check_options, device_of, globs_of
from qat_compat.plan import Keep, Plan, Synthesize, sorted_problems
from qat_compat.progress import progress_bars
from qat_compat.report import Report
from qat_compat.schema import Schema, Stage
from qat_compat.source import Source, SourceLike, open_any
from qat_compat.staging import Reading
from qat_compat.storage.beside import is_there
from qat_compat.text import collapse, counted, shorten
from qat_compat.unfold import norm_eps, unfold

__all__ = ["load", "planned"]


def planned(model: nn.Module, source: SourceLike, options: Options) -> Plan:
    """The plan of a load; changes nothing, and reads no tensor data."""
    with paused_collector():
        return _prepare(model, source, options, dry=True).plan


def load(model: nn.Module, source: SourceLike, options: Options) -> Report:
    """Plan a load and carry it out."""
    started = time.perf_counter()
    # the collector rests until the plan is gone, unless a model runs meanwhile, which may leave cycles behind
    alone = options.calibration is None or isinstance(options.calibration, str)
    with preserved_random_state(), paused_collector() if alone else nullcontext():  # a shuffling loader draws from it
        return _load(model, source, options, started)


@dataclass(frozen=True)
class _Prepared:
    """A plan with the objects that it was made from."""

    plan: Plan
    source: Source
    description: Description
    data: Data | None
    saved: Calibration | None


def _home(description: Description) -> torch.device:
    """Where tensors of a meta-device model are made, if nobody says: where its others are."""
    held = {slot.tensor.device for slot in description.view.slots.values() if not slot.tensor.is_meta}
    device = held.pop() if len(held) == 1 else torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def _load(model: nn.Module, source: SourceLike, options: Options, started: float) -> Report:
    with paused_collector():
        ready = _prepare(model, source, options)
    _raise_problems(ready.plan)
    totals: dict[str, int | None] = {"read": ready.plan.copied, "calibrate": _length(options.calibration)}
    with progress_bars(options.progress, totals) as advance:
        reading = Reading(
            ready.description,
            ready.source,
            saved=ready.saved.of(ready.description.schema) if ready.saved is not None else {},
            inplace=options.inplace,
            mmap=options.mmap,
            device=device_of(options.device) or _home(ready.description),
            advance=partial(advance, "read"),
        )
        driving = Driving(ready.data, options.inputs, options.statistic, partial(advance, "calibrate"))
        try:
            outcome = apply(ready.plan, reading, driving)
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            raise CompatError(
                "there is not enough memory for what the load changes beside what the model holds",
                file=ready.plan.source,
                found=str(error) or type(error).__name__,
                remedy="free memory, and load into a model that is made anew: this one may be half read"
                if options.inplace
                else "the model is as it was; inplace=True reads into its own parameters, without a second copy",
            ) from error
    findings = outcome.findings
    if ready.saved is not None and ready.saved.weights != fingerprint(ready.description):
        findings += ("the saved calibration was taken with other weights than the ones loaded here",)
    return Report(ready.plan, outcome.batches, outcome.losses, findings, time.perf_counter() - started)


def _is_lack_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for devices; its allocator of host memory raises a bare RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _length(data: object) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except Exception:  # a user's own `__len__` may do anything; the length only sets the end of a progress bar
        return None


def _raise_problems(plan: Plan) -> None:
    if plan.ok:
        return
    if all(problem.kind is ProblemKind.UNCALIBRATED for problem in plan.problems):
        names = [problem.key for problem in plan.problems]
        raise CalibrationError(
            f"no range for {counted(len(names), 'activation quantizer')}: the source does not hold one and no data was"
            " given",
            file=plan.source,
            key=", ".join(shorten(collapse(names), 12)),
            remedy="pass calibration=batches, or calibration='defer' to leave them to the first training batches,"
            " or keep= the names of those that are to stay as they are",
        )
    raise PlanError(plan.problems, file=plan.source)


def _prepare(model: nn.Module, source: SourceLike, options: Options, *, dry: bool = False) -> _Prepared:
    check_options(model, options)
    opened = open_any(source, select=options.select)
    description = describe_model(model)
    data, saved, kind = calibration_of(options.calibration)
    kept, ignored = without(opened.schema, globs_of(options.drop))
    target = _with_float_model(description.schema, options.float_model)
    found, evidence, data = _matched(opened, kept, target, description, data, options, dry)
    norms = norm_eps([m for m in (model, options.float_model) if m is not None])
    kept = unfold(kept, target, found, evidence, norms)
    opened = replace(opened, schema=kept)
    recorded = {key: tuple(value.shape) for key, value in saved.of(target).items()} if saved is not None else {}
    goal = Goal(globs_of(options.keep), kind, recorded)
    plan = join(
        kept,
        target,
        found,
        quantizers=description.quantizers,
        ties={key: slot.keys for key, slot in description.view.slots.items() if len(slot.keys) > 1},
        goal=goal,
        ignored=ignored,
        alias=opened.alias,
        unused=_float_names(options.float_model),
        names=(opened.checkpoint.name, f"{type(model).__name__} ({target.framework})"),
    )
    plan = _with_other_reader(_with_idle_patterns(plan, kept, options), model)
    plan = replace(plan, warnings=(*opened.checkpoint.notes, *plan.warnings, *_notes(plan, description, options, kind)))
    return _Prepared(plan, opened, description, data, saved)


def _with_idle_patterns(plan: Plan, source: Schema, options: Options) -> Plan:
    """A pattern that matches no key is a slip of the pen where something is missing; else it may be for other files."""
    idle = idle_patterns(source, options.rename)
    if plan.ok:
        return replace(plan, warnings=(*plan.warnings, *(f"rename= {p!r} matches no key of the source" for p in idle)))
    detail, remedy = "rename= matches no key of the source", "check its spelling"
    more = [Problem(ProblemKind.MISSING, pattern, detail, remedy) for pattern in idle]
    return replace(plan, problems=sorted_problems([*plan.problems, *more]))


def _with_other_reader(plan: Plan, model: nn.Module) -> Plan:
    """Where most is missing, transformers may know the names: those on its disks are not always those of its models."""
    place = Path(plan.source)
    if plan.ok or not hasattr(type(model), "from_pretrained") or not is_there(place):
        return plan
    folder = place if place.is_dir() else place.parent
    if not is_there(folder / "config.json"):
        return plan
    remedy = f"pass {type(model).__name__}.from_pretrained({str(folder)!r}) as the source, which knows names of its own"
    problems = [replace(one, remedy=remedy) if one.key == COVERAGE else one for one in plan.problems]
    return replace(plan, problems=tuple(problems))


def _matched(
    opened: Source,
    source: Schema,
    target: Schema,
    description: Description,
    data: Data | None,
    options: Options,
    dry: bool,
) -> tuple[Match, list[Evidence], Data | None]:
    """Pair the names, asking the data only what nothing else could tell; the data still begins with its first batch.

    A dry run takes no batch from an iterator and reads no tensor.
    """
    evidence: list[Evidence] = []
    if options.float_model is not None:
        evidence.append(from_float_model(options.float_model))
    elif not description.quantizers and (source.fused or source.stage is Stage.FOLDED):
        evidence.append(from_float_model(description.view.model))
    matched = partial(match, source, target, rename=options.rename, keep=globs_of(options.keep))
    found = matched(evidence=evidence)
    if not (found.is_in_doubt and target.fused) or data is None or callable(data):
        return found, evidence, data
    if dry and isinstance(data, Iterator):
        return found, evidence, data
    batch, data = _peek(data)
    if batch is None:
        return found, evidence, data
    evidence += from_forward(description, options.float_model, batch, options.inputs)
    found = matched(evidence=evidence)
    if found.options and not dry:
        guessed = {p: found.norms[p][0] for p in found.options if p in found.norms}
        several = {p: paths for p, paths in found.options.items() if len(paths) > 1}  # one alone always fits best
        seen = from_statistics(description, found, several, opened.read, batch, options.inputs)
        if found.problems:
            found = matched(evidence=[*evidence, seen])
        hosts = {one.prefix: one.host for one in target.fused}
        found.problems += contradictions(seen, guessed, hosts)
    return found, evidence, data


def _peek(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and data that still begins with it (an iterator can be consumed only once)."""
    if not isinstance(data, Iterator):
        return next(batches_of(data), None), data
    first = next(batches_of(data), None)
    return first, data if first is None else itertools.chain([first], data)


def _with_float_model(schema: Schema, float_model: nn.Module | None) -> Schema:
    """With the float model at hand, which captured tensors its state_dict lacks is known, not supposed."""
    if float_model is None or not any(entry.optional for entry in schema.values()):
        return schema
    held = set(describe_model(float_model).schema)
    entries = {k: e._replace(optional="") if e.optional and e.site in held else e for k, e in schema.items()}
    return replace(schema, entries=entries)


def _float_names(float_model: nn.Module | None) -> frozenset[str]:
    """Names of the float model's tensors, with and without wrapper segments."""
    if float_model is None:
        return frozenset()
    keys = describe_model(float_model).schema
    return frozenset(keys) | frozenset(map(canonical, keys))


def _notes(plan: Plan, description: Description, options: Options, kind: str) -> list[str]:
    notes: list[str] = []
    if options.float_model is None:
        schema = description.schema
        kept = [s.key for s in plan.steps if isinstance(s, Keep) and s.key in schema and schema[s.key].optional]
        if kept:
            names = ", ".join(shorten(collapse(kept), 4))
            notes.append(
                f"not in the source and kept, as tensors that the tracer captured: {names} (float_model= makes it sure)"
            )
    if description.framework is not None:
        notes += description.framework.notes(description.view, options.float_model)
    if kind in ("batches", "record") and not any(isinstance(s, Synthesize) for s in plan.steps) and plan.copied:
        notes.append("calibration data was not used: nothing needed it")
    return notes
