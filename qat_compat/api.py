"""The public verbs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_compat.apply import Driving, apply
from qat_compat.calibration import Calibration, calibrate, fingerprint
from qat_compat.convert import convert_checkpoint
from qat_compat.draft import Goal
from qat_compat.driving import Data, Inputs
from qat_compat.encodings import form_to_record
from qat_compat.errors import CalibrationError, PlanError, ProblemKind
from qat_compat.evidence import contradictions, from_float_model, from_forward, from_statistics
from qat_compat.floating import float_names, to_float
from qat_compat.frameworks import Description, describe_model
from qat_compat.isolation import paused_collector, preserved_random_state
from qat_compat.join import join, without
from qat_compat.match import match
from qat_compat.names import Rename, canonical
from qat_compat.norms import Evidence, Match
from qat_compat.options import (
    CalibrationLike,
    Globs,
    Options,
    calibration_of,
    check_options,
    device_of,
    globs_of,
)
from qat_compat.plan import Keep, Plan, Synthesize
from qat_compat.progress import progress_bars
from qat_compat.report import Report
from qat_compat.schema import Role, Schema, Stage
from qat_compat.source import Source, SourceLike, forms_of, hidden_state, open_any
from qat_compat.staging import Reading
from qat_compat.storage import Checkpoint, save
from qat_compat.text import collapse, counted, shorten
from qat_compat.unfold import norm_eps, unfold

__all__ = [
    "calibrate",
    "convert_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "plan_load",
    "save_checkpoint",
    "to_float",
]


def open_checkpoint(source: SourceLike, *, select: str | None = None) -> Checkpoint:
    """Open a file, folder or mapping as a lazy mapping of tensors; nothing in it is run.

    Example:
        >>> import torch
        >>> checkpoint = open_checkpoint({"epoch": 3, "state_dict": {"fc.weight": torch.ones(2, 4)}})
        >>> list(checkpoint), checkpoint.spec("fc.weight").shape, checkpoint.metadata["epoch"], checkpoint.framework
        (['fc.weight'], (2, 4), 3, 'plain')

    Args:
        source: Path of a file or folder, a mapping, or a module.
        select: Which of several sets of weights: a dotted path (`"trainer.var_wo_ddp"`), `"ema"` or `"model"`.

    Raises:
        CheckpointError: The source is corrupt, of an unknown format, or has no such part.
    """
    return open_any(source, select=select).checkpoint


def save_checkpoint(obj: SourceLike, path: str | PathLike[str], *, backup: bool = False) -> Path:
    """Write a module or state_dict so that the old file or the new one is there at any moment, never neither.

    A module's sites and the state that its state_dict does not hold are written beside the weights; the file still
    loads with plain torch (`.pt`) or safetensors (`.safetensors`). Of a converted model, a `.pt` file has the objects
    that torch itself would save, and a `.safetensors` file the tensors in them.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(nn.Linear(2, 3), f"{folder}/model.pt")
        ...     sorted(torch.load(path, weights_only=True))
        ['bias', 'weight']

    Args:
        obj: A module, a state_dict or an opened checkpoint.
        path: Destination; its suffix chooses the container.
        backup: Keep what stood there under a dated name.

    Raises:
        SaveError: The file cannot be written; what stood at the destination is unchanged.
    """
    source = open_any(obj)
    about = source.checkpoint
    values = {key: source.read(key) for key, entry in source.schema.items() if entry.role is Role.EXTRA}
    extra = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
    if source.description is None:
        attributes = {"attributes": about.attributes} if about.attributes else {}
        record: dict[str, Any] = {**about.record, **attributes, **({"extra_state": extra} if extra else {})}
        tensors = {key: about[key] for key in about if key not in extra} if extra else about
        objects = obj.state_dict() if isinstance(obj, nn.Module) else None  # a converted model
        return save(
            tensors, path, versions=about.versions or None, record=record or None, objects=objects, backup=backup
        )
    hidden = hidden_state(source.description)
    record = {
        **about.record,
        "sites": _float_sites(source) | {k: e.site for k, e in source.schema.items() if e.quantizer},
        **({"grids": dict(source.schema.grids)} if source.schema.grids else {}),
        **({"encodings": encodings} if (encodings := _encodings(source.description)) else {}),
        **({"aliases": aliases} if (aliases := _aliases(source.description)) else {}),
        **({"hidden": hidden} if hidden else {}),
        **({"extra_state": extra} if extra else {}),
    }
    tensors = {key: about[key] for key in about if key not in hidden and key not in extra}
    assert isinstance(obj, nn.Module)
    versions = getattr(obj.state_dict(), "_metadata", None)
    return save(tensors, path, versions=versions, record=record, backup=backup)


def _encodings(description: Description) -> dict[str, Any]:
    """Quantizer name -> how it writes its range down, which its tensors do not tell."""
    return {name: form_to_record(form) for name, form in forms_of(description).items()}


def _aliases(description: Description) -> dict[str, str]:
    """Further names of a quantizer that stands under several -> its first one."""
    return {name: quantizer.name for quantizer in description.quantizers for name in quantizer.names[1:]}


def _float_sites(source: Source) -> dict[str, str]:
    """Key -> float name, where the model tells all of them."""
    names, problems, _ = float_names(source)
    return names if not problems else {}


def plan_load(model: nn.Module, source: SourceLike, **options: Any) -> Plan:
    """What :func:`load_checkpoint` would do with the same arguments: changes nothing and reads no tensor data.

    Example:
        >>> from torch import nn
        >>> plan = plan_load(nn.Linear(2, 3), nn.Linear(2, 3).state_dict())
        >>> plan.ok, plan.copied
        (True, 2)

    Returns:
        The plan; its `problems` say why it cannot be carried out, if it cannot.
    """
    with paused_collector():
        return _prepare(model, source, Options(**options), dry=True).plan


@dataclass(frozen=True)
class _Prepared:
    """A plan with the objects that it was made from."""

    plan: Plan
    source: Source
    description: Description
    data: Data | None
    saved: Calibration | None


def load_checkpoint(
    model: nn.Module,
    source: SourceLike,
    *,
    calibration: CalibrationLike = None,
    inputs: Inputs | None = None,
    select: str | None = None,
    float_model: nn.Module | None = None,
    rename: Rename = (),
    keep: Globs = (),
    drop: Globs = (),
    statistic: str = "native",
    inplace: bool = False,
    mmap: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Report:
    """Load any checkpoint into a model, QAT-prepared or not, and synthesize what the file cannot hold.

    All or nothing: on any exception the model is as it was, storages included.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.ao.quantization as tq
        >>> trained = nn.Sequential(tq.QuantStub(), nn.Linear(4, 2))
        >>> model = nn.Sequential(tq.QuantStub(), nn.Linear(4, 2))
        >>> model.qconfig = tq.get_default_qat_qconfig("x86")
        >>> model = tq.prepare_qat(model.train())
        >>> report = load_checkpoint(model, trained.state_dict(), calibration=[torch.randn(8, 4)])
        >>> report.copied, report.synthesized
        (2, 12)

    Args:
        model: The target; usually freshly QAT-prepared. May be on the meta device.
        source: Path, state_dict (nested or not), opened checkpoint or module.
        calibration: Batches; a callable that is given the model in eval mode and runs it; a :class:`Calibration` or
            its path; `"defer"` to leave activation ranges to the first training batches; None if nothing needs data.
        inputs: `callable(batch) -> (args, kwargs)`. By default a tensor is the only argument, a mapping becomes
            keywords, a tuple or list is cut to the positional parameters of `forward`.
        select: Which of several sets of weights in the file.
        float_model: The unprepared model: exact evidence for names that fusion took away.
        rename: Ordered (regex, replacement) pairs over source keys.
        keep: Globs over float entries of the model that may stay as they are.
        drop: Globs over source keys to ignore.
        statistic: How activation ranges are chosen: "native", "percentile", "mse" or "entropy".
        inplace: Read straight into the model's own parameters: no second copy, and no way back once reading has begun.
        mmap: Assign file-backed tensors without a copy, where dtype and device agree.
        device: Where tensors of a meta-device model are made.
        progress: Show progress bars; by default on a terminal only.

    Returns:
        A report with the provenance of every value.

    Raises:
        PlanError: Source and model cannot be joined; `problems` lists every reason.
        CalibrationError: Activation quantizers that nothing fills, or data that cannot be used.
        QParamError: A scale or zero_point that no quantizer can use.
        CheckpointError: The source cannot be read.
    """
    started = time.perf_counter()
    options = Options(
        calibration, inputs, select, float_model, rename, keep, drop, statistic, inplace, mmap, device, progress
    )
    # the collector rests until the plan is gone, unless a model runs meanwhile, which may leave cycles behind
    alone = calibration is None or isinstance(calibration, str)
    with preserved_random_state(), paused_collector() if alone else nullcontext():  # a shuffling loader draws from it
        return _load(model, source, options, started)


def _load(model: nn.Module, source: SourceLike, options: Options, started: float) -> Report:
    with paused_collector():
        ready = _prepare(model, source, options)
    _raise_problems(ready.plan)
    totals: dict[str, int | None] = {"read": ready.plan.copied, "calibrate": _length(options.calibration)}
    with progress_bars(options.progress, totals) as advance:
        reading = Reading(
            ready.description,
            ready.source,
            saved=ready.saved.tensors if ready.saved is not None else {},
            inplace=options.inplace,
            mmap=options.mmap,
            device=device_of(options.device),
            advance=partial(advance, "read"),
        )
        driving = Driving(ready.data, options.inputs, options.statistic, partial(advance, "calibrate"))
        outcome = apply(ready.plan, reading, driving)
    findings = outcome.findings
    if ready.saved is not None and ready.saved.weights != fingerprint(ready.description):
        findings += ("the saved calibration was taken with other weights than the ones loaded here",)
    return Report(ready.plan, outcome.batches, outcome.losses, findings, time.perf_counter() - started)


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
            remedy="pass calibration=batches, or calibration='defer' to leave them to the first training batches",
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
    recorded = {key: tuple(value.shape) for key, value in saved.tensors.items()} if saved is not None else {}
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
    plan = replace(plan, warnings=(*opened.checkpoint.notes, *plan.warnings, *_notes(plan, description, options)))
    return _Prepared(plan, opened, description, data, saved)


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
    found = match(source, target, rename=options.rename, evidence=evidence)
    if not (found.options and target.fused) or data is None or callable(data):
        return found, evidence, data
    if dry and isinstance(data, Iterator):
        return found, evidence, data
    batch, data = _peek(data)
    if batch is None:
        return found, evidence, data
    if found.problems:
        evidence += from_forward(description, options.float_model, batch, options.inputs)
        found = match(source, target, rename=options.rename, evidence=evidence)
    if found.options and not dry:
        guessed = {p: found.norms[p][0] for p in found.options if p in found.norms}
        seen = from_statistics(description, found, found.options, opened.read, batch, options.inputs)
        if found.problems:
            found = match(source, target, rename=options.rename, evidence=[*evidence, seen])
        hosts = {one.prefix: one.host for one in target.fused}
        found.problems += contradictions(seen, guessed, hosts)
    return found, evidence, data


def _peek(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and data that still begins with it (an iterator can be consumed only once)."""
    if not isinstance(data, Iterator):
        return next(iter(data), None), data
    first = next(data, None)
    return first, data if first is None else itertools.chain([first], data)


def _with_float_model(schema: Schema, float_model: nn.Module | None) -> Schema:
    """With the float model at hand, which captured tensors its state_dict lacks is known, not supposed."""
    if float_model is None or not any(entry.optional for entry in schema.values()):
        return schema
    held = set(describe_model(float_model).schema)
    entries = {k: replace(e, optional="") if e.optional and e.site in held else e for k, e in schema.items()}
    return replace(schema, entries=entries, _by_quantizer={})


def _float_names(float_model: nn.Module | None) -> frozenset[str]:
    """Names of the float model's tensors, with and without wrapper segments."""
    if float_model is None:
        return frozenset()
    keys = describe_model(float_model).schema
    return frozenset(keys) | frozenset(map(canonical, keys))


def _notes(plan: Plan, description: Description, options: Options) -> list[str]:
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
    if options.calibration is not None and not any(isinstance(s, Synthesize) for s in plan.steps) and plan.copied:
        notes.append("calibration data was not used: nothing needed it")
    return notes
