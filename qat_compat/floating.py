"""The way back: QAT state to the original float keys."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from qat_compat.casting import cast_loss
from qat_compat.errors import CompatError, PlanError, Problem, ProblemKind
from qat_compat.evidence import from_float_model
from qat_compat.frameworks.base import is_captured, plain_entry, uncompiled
from qat_compat.join import doubts, join
from qat_compat.match import match
from qat_compat.names import is_positional
from qat_compat.norms import Evidence, resolve_alone
from qat_compat.plan import Copy, Derive, Keep
from qat_compat.schema import UNKNOWN, Entry, Role, Schema, Spec, Stage
from qat_compat.source import Source, SourceLike, open_any
from qat_compat.state import join_path, split_path
from qat_compat.storage import Checkpoint, Extent
from qat_compat.storage.encodings_file import ENCODINGS
from qat_compat.text import collapse, counted, shorten
from qat_compat.unfold import norm_eps, unfold
from qat_compat.weights import check_ties, reader

__all__ = ["float_names", "to_float"]

Like = nn.Module | Mapping[str, Any] | str | PathLike[str] | Iterable[str]


def to_float(
    source: SourceLike,
    *,
    like: Like | None = None,
    weights: Literal["latent", "quantized"] = "latent",
    select: str | None = None,
) -> Checkpoint:
    """Turn a QAT model, its state_dict or its file into a checkpoint of the original float keys.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.ao.quantization as tq
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
        >>> before = {key: value.clone() for key, value in net.state_dict().items()}
        >>> net = tq.fuse_modules_qat(net, [["0", "1"]])
        >>> net.qconfig = tq.get_default_qat_qconfig("x86")
        >>> after = to_float(tq.prepare_qat(net))
        >>> list(after) == list(before), all(torch.equal(after[key], before[key]) for key in before)
        (True, True)

    Args:
        source: Path, state_dict, opened checkpoint or module.
        like: The float layout where the source alone does not tell the names: a float model, a state_dict, a path, or
            keys. It also sets the order, and the dtypes where it has any.
        weights: "latent" gives the master weights, "quantized" what the weight quantizers make of them (of a module,
            or of what :func:`qat_compat.save_checkpoint` wrote of one that torchao prepared).
        select: Which of several sets of weights in the file.

    Returns:
        A lazy checkpoint; tensors of a module or mapping are shared with it, not copied.

    Raises:
        PlanError: A name cannot be known, or the source does not fit `like`.
        CheckpointError: The source cannot be read.
    """
    opened = _decoded(open_any(_unwrapped(source), select=select))
    opened, layout = _layout_of(opened, like) if like is not None else (opened, _own_layout(opened))
    read = reader(opened, weights)
    specs: dict[str, Spec] = {}
    for name, key in layout.names.items():
        if key is None:
            specs[name] = layout.kept.spec(name) if layout.kept is not None else Spec((), torch.int64)
        else:
            shape, dtype = opened.spec(key)
            specs[name] = Spec(shape, layout.dtypes.get(name, dtype))

    def fetch(name: str) -> Tensor:
        key = layout.names[name]
        if key is None:
            return layout.kept[name] if layout.kept is not None else torch.zeros((), dtype=torch.int64, device="cpu")
        value = read(key)
        if not isinstance(value, Tensor) or value.dtype == specs[name].dtype:
            return value
        loss = cast_loss(value, specs[name].dtype)
        if loss is not None and loss.fatal:
            remedy = "pass like= in the source's dtype"
            raise PlanError([Problem(ProblemKind.LOSSY, name, loss.text, remedy)], file=opened.checkpoint.name)
        return value.to(specs[name].dtype)

    def extent(name: str) -> Extent | None:
        key = layout.names[name]
        return opened.extent(key) if key is not None and specs[name] == opened.spec(key) else None

    def alias(name: str) -> Hashable | None:
        key = layout.names[name]
        same = key is not None and weights == "latent" and specs[name] == opened.spec(key)
        return opened.alias(key) if key is not None and same else None

    check_ties(opened, layout.names, layout.ties, fetch, weights)
    result = Checkpoint(
        specs,
        fetch,
        extent=extent,
        alias=alias,
        name=f"float({opened.checkpoint.name})",
        metadata={name: value for name, value in opened.checkpoint.metadata.items() if name != ENCODINGS},
        notes=(*opened.checkpoint.notes, *layout.notes),
    )
    stage = Stage.FOLDED if like is None and _is_folded(opened.schema) else Stage.FLOAT
    result.framework, result.stage = "plain", stage.value
    if stage is Stage.FOLDED:
        result.record = {"stage": stage.value}
    return result


def _unwrapped(source: SourceLike) -> SourceLike:
    """The model in a wrapper that is around it only while it runs; of a file the names are those that it has."""
    while isinstance(source, nn.Module):
        if isinstance(source, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            source = source.module
        elif (inner := uncompiled(source)) is not source:
            source = inner
        else:
            break
    return source


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The float side: its names in order.

    Args:
        names: Float name -> source key, or None for a counter that the source does not hold.
        dtypes: Float name -> dtype, where `like` has one.
        kept: Where counters that the source does not hold come from.
        notes: What was decided on the way.
        ties: Float name -> every float name of the same tensor, where `like` has one tensor under several.
    """

    names: Mapping[str, str | None]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    kept: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    ties: Mapping[str, list[str]] = field(default_factory=dict)


def _own_layout(source: Source) -> _Layout:
    """The names that the source itself tells, in the order of the float model as far as the source knows it."""
    sites, problems, notes = float_names(source)
    problems += doubts(source.schema, sites)
    if problems:
        raise PlanError(
            problems, file=source.checkpoint.name, summary="the float names cannot be known from the source alone"
        )
    position = {path: index for index, path in enumerate(source.module_order)}
    first: dict[str, int] = {}
    for key, site in sites.items():
        parent = split_path(site)[0]
        first.setdefault(parent, position.get(parent, position.get(split_path(key)[0], len(position))))
    ordered = sorted(sites, key=lambda key: first[split_path(sites[key])[0]])
    if _is_folded(source.schema):
        notes = [*notes, "normalizations, where there were any, are folded into convolutions; like= writes them back"]
    return _Layout({sites[key]: key for key in ordered}, notes=tuple(notes))


def _is_folded(schema: Schema) -> bool:
    """Whether normalizations may be gone; a network without convolutions has none that could be folded."""
    return schema.stage is Stage.FOLDED and (
        not schema.recipes or any(len(schema[key].shape) > 2 for key in schema.recipes if key.endswith("weight"))
    )


def _decoded(source: Source) -> Source:
    """A converted source as the float tensors that can be computed from it."""
    schema = source.schema
    if schema.stage is not Stage.CONVERTED and not schema.unreadable:
        return source
    remedy = "pass the QAT checkpoint that it was converted from"
    if schema.stage is not Stage.CONVERTED:
        remedy = "pass the float checkpoint that it was made from"
    problems = [Problem(ProblemKind.MISMATCHED, key, why, remedy) for key, why in schema.unreadable.items()]
    if (left := schema.undecoded()) and not problems:
        what = f"{counted(len(left), 'tensor')} of a converted checkpoint ({schema.framework})"
        problems = [
            Problem(
                ProblemKind.MISMATCHED,
                ", ".join(shorten(collapse(left), 4)),
                f"{what} cannot be read back to float",
                remedy,
            )
        ]
    if problems:
        raise PlanError(problems, file=source.checkpoint.name)
    return replace(source, schema=replace(schema, stage=Stage.FOLDED if schema.folds else Stage.FLOAT))


def float_names(source: Source) -> tuple[dict[str, str], list[Problem], list[str]]:
    """Source key -> float name, for every tensor that the float model holds; what cannot be known, and notes."""
    schema = source.schema
    found = resolve_alone(schema)
    sites: dict[str, str] = {}
    taken: dict[str, str] = {}
    problems = list(found.problems)
    for key, entry in schema.items():
        if entry.role is Role.SMOOTHING:
            detail = "the weight is stored as a product with this, which no rounding undoes to the bit"
            problems.append(Problem(ProblemKind.MISMATCHED, key, detail, "pass the checkpoint from before smoothing"))
    left: list[str] = []
    for key in schema.float_keys():
        entry = schema[key]
        if entry.optional:
            left += [] if is_captured(key) else [key]
            continue
        parent, leaf = split_path(entry.site)
        site = join_path(found.norms[parent][0], leaf) if parent in found.norms else entry.site
        if site in taken:
            detail = f"{taken[site]} and {key} would both be {site}"
            problems.append(Problem(ProblemKind.AMBIGUOUS, site, detail, "pass like= (the float model or its keys)"))
        taken[site] = key
        sites[key] = site
    notes = list(found.notes)
    if left:
        notes.append(
            f"left out, as the graph does not tell whether the float model saves them: {', '.join(shorten(left, 6))}"
            " (like= does)"
        )
    return sites, problems, notes


def _layout_of(source: Source, like: Like) -> tuple[Source, _Layout]:
    """The layout of `like`, and the source with all that it takes to fill it."""
    side, evidence = _like_source(like)
    found = match(source.schema, side.schema, evidence=evidence)
    norms = norm_eps([like] if isinstance(like, nn.Module) else [])
    source = replace(source, schema=unfold(source.schema, side.schema, found, evidence, norms))
    plan = join(
        source.schema,
        side.schema,
        found,
        ties=_ties(side.checkpoint),
        alias=source.alias,
        names=(source.checkpoint.name, "like="),
    )
    if source.description is None and any(map(is_positional, source.schema.by_quantizer())):
        # a graph module saves every tensor that it captured, and like= says which of them the float model saves
        extra = [problem for problem in plan.problems if problem.kind is ProblemKind.UNEXPECTED]
        plan = replace(plan, problems=tuple(p for p in plan.problems if p.kind is not ProblemKind.UNEXPECTED))
        captured = tuple(
            f"{problem.key} is not in like=: taken for a tensor that the tracer captured" for problem in extra
        )
    else:
        captured = ()
    if not plan.ok:
        problems = [_of_like(problem, like, source.schema) for problem in plan.problems]
        raise PlanError(problems, file=source.checkpoint.name)
    names: dict[str, str | None] = {}
    absent: list[str] = []
    for step in plan.steps:
        if isinstance(step, Copy):
            names[step.key] = step.source
        elif isinstance(step, Derive):
            names[step.key] = step.value
        elif isinstance(step, Keep):
            names[step.key] = None
            absent.append(step.key)
    only_names = any(entry.shape == UNKNOWN for entry in side.schema.values())
    notes = tuple(f"{key} is not in the source: taken from like=, or 0" for key in shorten(collapse(absent), 4))
    notes += captured
    if only_names:
        return source, _Layout(names, notes=notes)
    dtypes = {key: side.schema[key].dtype for key in names}
    return source, _Layout(names, dtypes, side.checkpoint, notes, _ties(side.checkpoint))


_REMEDIES = {
    ProblemKind.MISSING: "pass the source that holds it, or a like= without it",
    ProblemKind.UNEXPECTED: "pass a like= that has it",
    ProblemKind.MISMATCHED: "pass a like= of the source's sizes",
    ProblemKind.AMBIGUOUS: "pass the float model itself as like=",
}


_UNTRACED = (
    "a trace of the model in like= does not tell it: pass one whose normalizations are named after their convolutions"
    " (conv1 and bn1, convs.0 and bns.0), and rename the keys of the result"
)


def _of_like(problem: Problem, like: Like, schema: Schema) -> Problem:
    """The problem with a next step that a caller of `to_float` can take, who has no `rename=`, `keep=` or `drop=`."""
    theirs = any(f"{option}=" in problem.remedy for option in ("rename", "keep", "drop"))
    if isinstance(like, nn.Module) and any(problem.key == one.prefix for one in schema.fused):
        return replace(problem, remedy=_UNTRACED)
    return replace(problem, remedy=_REMEDIES.get(problem.kind, "")) if theirs else problem


def _ties(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Key -> every key of the same tensor, for tensors with several keys."""
    groups: dict[Hashable, list[str]] = {}
    for key in checkpoint:
        memory = checkpoint.alias(key)
        if memory is not None:
            groups.setdefault(memory, []).append(key)
    return {key: keys for keys in groups.values() if len(keys) > 1 for key in keys}


def _like_source(like: Like) -> tuple[Source, list[Evidence]]:
    if isinstance(like, nn.Module):
        side = open_any(like)
        if side.description is not None and side.description.quantizers:
            raise CompatError(
                "like= is a prepared model", key="like", expected="the float model", found=side.schema.framework
            )
        return side, [from_float_model(like)]
    if isinstance(like, (str, PathLike, Mapping)):
        side = open_any(like)
        if side.schema.stage is not Stage.FLOAT:
            raise CompatError(
                "like= is a prepared checkpoint", key="like", expected="float keys", found=side.schema.framework
            )
        return side, []
    try:
        unknown = {str(key): _unknown_entry(str(key)) for key in like}
    except TypeError as error:
        expected = "a float model, a state_dict, a path, or keys"
        found = type(like).__name__
        raise CompatError("this is no float layout", key="like", expected=expected, found=found) from error
    return Source(Checkpoint({}, _no_tensor, name="like="), Schema(unknown)), []


def _no_tensor(key: str) -> Tensor:
    raise KeyError(key)


def _unknown_entry(key: str) -> Entry:
    shape = () if split_path(key)[1] == "num_batches_tracked" else UNKNOWN
    entry = plain_entry(key, Spec(shape, torch.float32))
    return entry._replace(shape=UNKNOWN) if entry.role is Role.PARAMETER else entry
