"""Join two schemas into a plan. Reads no tensor; touches no model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from qat_compat.errors import PlanError, Problem, ProblemKind
from qat_compat.frameworks import Needs, Quantizer
from qat_compat.match import Match, canonical
from qat_compat.plan import Copy, Derive, Drop, How, Keep, Plan, Step, Synthesize, sorted_problems
from qat_compat.schema import UNKNOWN, Entry, Role, Schema, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["Goal", "join", "without"]

_CARRIED = (Role.MIN, Role.MAX)


@dataclass(frozen=True)
class Goal:
    """What the caller asks of a plan.

    Args:
        keep: Globs over float entries of the target that may stay as they are.
        data: Where activation ranges may come from: "batches", "record", "defer" or "none".
        recorded: Canonical key -> shape of what a saved calibration holds.
    """

    keep: Sequence[str] = ()
    data: str = "none"
    recorded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class _Draft:
    """A plan in the making."""

    source: Schema
    target: Schema
    goal: Goal
    steps: dict[str, Step] = field(default_factory=dict)  # by target key
    dropped: dict[str, Drop] = field(default_factory=dict)  # by source key
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # source keys that a step reads
    kept_modules: set[str] = field(default_factory=set)  # modules that keep their own values, by float and by own path

    def problem(self, kind: ProblemKind, key: str, detail: str, remedy: str = "") -> None:
        self.problems.append(Problem(kind, key, detail, remedy))

    def copy(self, key: str, source: str, witness: str) -> None:
        self.steps[key] = Copy(key, source, witness)
        self.used.add(source)


def join(
    source: Schema,
    target: Schema,
    found: Match,
    *,
    quantizers: Sequence[Quantizer] = (),
    ties: Mapping[str, Sequence[str]] | None = None,
    goal: Goal | None = None,
    ignored: Sequence[str] = (),
    alias: Callable[[str], Hashable | None] = lambda _key: None,
    unused: frozenset[str] = frozenset(),
    names: tuple[str, str] = ("<source>", "<target>"),
) -> Plan:
    """One step for every target entry and every source key left over.

    Args:
        source: Schema of what is read.
        target: Schema of what is filled.
        found: Pairs of float entries.
        quantizers: The live quantizers of the target.
        ties: Target key -> every name of the same tensor, itself included.
        goal: What the caller asks for.
        ignored: Source keys that the caller dropped; `source` does not hold them any more.
        alias: What source keys have in common that are one tensor.
        unused: Float names that the float model holds, whether or not the target does.
        names: Source and target, for the text.
    """
    draft = _Draft(source, target, goal or Goal())
    draft.problems += found.problems
    draft.warnings += found.notes
    if Stage.CONVERTED in (source.stage, target.stage):
        draft.problems[:] = [_converted(source, target, names)]
        return Plan((), tuple(draft.problems), (), *names)
    for key in ignored:
        draft.dropped[key] = Drop(key, "asked for by drop=")
    _float_entries(draft, found, ties or {})
    _stale_fusions(draft, ignored)
    _quantizer_entries(draft, quantizers, found)
    _leftovers(draft, found, alias, unused)
    ordered = [draft.steps[key] for key in target if key in draft.steps]
    return Plan(
        (*ordered, *draft.dropped.values()),
        sorted_problems(draft.problems),
        tuple(dict.fromkeys(draft.warnings)),
        *names,
    )


def _converted(source: Schema, target: Schema, names: tuple[str, str]) -> Problem:
    if source.stage is Stage.CONVERTED:
        what = f"the source is a converted (integer) checkpoint ({source.framework})"
        remedy = "pass the float or QAT checkpoint that it was converted from"
    else:
        what = f"the target is a converted (integer) model ({target.framework})"
        remedy = "load into the float or prepared model, and convert that"
    return Problem(ProblemKind.MISMATCHED, names[0], f"{what}, which holds no weights to train", remedy)


def _matches(globs: Iterable[str], *names: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def without(schema: Schema, globs: Sequence[str]) -> tuple[Schema, list[str]]:
    """The schema less the keys that match, and those keys; a glob that names nothing is an error."""
    ignored = [key for key in schema if _matches(globs, key)]
    idle = [glob for glob in globs if not any(fnmatchcase(key, glob) for key in ignored)]
    if idle:
        raise PlanError(
            [
                Problem(ProblemKind.MISSING, glob, "drop= names nothing in the source", "check its spelling")
                for glob in idle
            ]
        )
    gone = set(ignored)
    entries = {key: entry for key, entry in schema.items() if key not in gone}
    return replace(schema, entries=entries, _by_quantizer={}), ignored


# --- float entries ----------------------------------------------------------------------------------------------------


def _float_entries(draft: _Draft, found: Match, ties: Mapping[str, Sequence[str]]) -> None:
    target, goal = draft.target, draft.goal
    kept_globs = set(goal.keep)
    missing: list[str] = []
    for key in target.float_keys():
        entry = target[key]
        site = _float_name(key, entry, found)
        if _matches(goal.keep, key, site):
            kept_globs -= {glob for glob in goal.keep if _matches([glob], key, site)}
            draft.steps[key] = Keep(key, "asked for by keep=")
            draft.kept_modules |= {split_path(key)[0], split_path(site)[0]}
            draft.kept_modules |= {one.host for one in target.fused if key.startswith(f"{one.prefix}.")}
            if key in found.pairs:
                origin = found.pairs[key][0]
                draft.dropped[origin] = Drop(origin, "the target keeps its own value (keep=)")
            continue
        pair = found.pairs.get(key)
        if pair is None:
            twin = next((found.pairs[name][0] for name in ties.get(key, ()) if name in found.pairs), None)
            if twin is not None:
                draft.copy(key, twin, "tied in the model")
            elif entry.optional:
                draft.steps[key] = Keep(key, entry.optional)
            elif key not in found.contested:
                missing.append(key)
            continue
        _copy_float(draft, key, entry, pair)
    _missing(draft, missing, found)
    for glob in sorted(kept_globs):
        if not any(_matches([glob], key) for key in target):
            draft.problem(ProblemKind.MISSING, glob, "keep= names nothing in the target", "check its spelling")


def _float_name(key: str, entry: Entry, found: Match) -> str:
    """The site of an entry, with a fused normalization under its float name."""
    parent, leaf = split_path(key)
    return join_path(found.norms[parent][0], leaf) if parent in found.norms else entry.site


def _copy_float(draft: _Draft, key: str, entry: Entry, pair: tuple[str, str]) -> None:
    origin, witness = pair
    theirs = draft.source[origin]
    if entry.role is not Role.EXTRA and entry.shape not in (theirs.shape, UNKNOWN):
        where = "" if origin == key else f" ({origin})"
        detail = f"expected {entry.spec}, found {theirs.spec}{where}"
        remedy = f"keep={key!r} leaves the model's own value, or build the model with the file's size"
        draft.problem(ProblemKind.MISMATCHED, key, detail, remedy)
        draft.used.add(origin)
        return
    if entry.role is not Role.EXTRA:
        _check_cast(draft, key, theirs.spec, entry.spec)
    draft.copy(key, origin, witness)


def _check_cast(draft: _Draft, key: str, theirs: Spec, mine: Spec) -> None:
    """Casts that lose something whatever the values are; the rest is looked at when the values are read."""
    if theirs.dtype.is_complex and not mine.dtype.is_complex:
        detail = f"{theirs} cannot become {mine} without losing its imaginary part"
        draft.problem(ProblemKind.LOSSY, key, detail, "prepare the model in the file's dtype")


def _missing(draft: _Draft, missing: Sequence[str], found: Match) -> None:
    counters = [key for key in missing if split_path(key)[1] == "num_batches_tracked"]
    if counters and not any(split_path(key)[1] == "num_batches_tracked" for key in draft.source):
        # a file older than the counter (torch < 0.4.1): its absence says nothing about the weights
        for key in counters:
            draft.steps[key] = Keep(key, "the file is older than this counter")
        missing = [key for key in missing if key not in set(counters)]
    total = sum(1 for _ in draft.target.float_keys())
    filled = sum(isinstance(step, Copy) for step in draft.steps.values())
    if missing and (not filled or 2 * len(missing) > total):
        detail = f"the source fills {filled} of {total} float entries of the target"
        example = next((key for key in draft.source.float_keys()), "nothing")
        remedy = f"the source holds names like {example}; choose the weights with select=, or map names with rename="
        draft.problem(ProblemKind.MISSING, "<coverage>", detail, remedy)
    for key in missing:
        site = _float_name(key, draft.target[key], found)
        under = "" if site == key else f" (looked for as {site})"
        draft.problem(
            ProblemKind.MISSING,
            key,
            f"{draft.target[key].spec} is not in the source{under}",
            f"rename= maps another name to it, keep={key!r} leaves the model's own value",
        )


# What a reparameterised block (RepVGG, YOLO-NAS, YOLOv6; MobileOne; RepLKNet) is fused into, and the branches of which
# it is made.
_REPARAMETERISED = frozenset({"rbr_reparam", "reparam_conv", "lkb_reparam"})
_BRANCHES = ("rbr_", "branch_", "conv_kxk", "conv_scale", "lkb_origin", "small_conv")


def _stale_fusions(draft: _Draft, ignored: Sequence[str]) -> None:
    """A fused tensor that has its branches beside it is older than they are, and must not be taken in their place."""
    fused: dict[str, list[str]] = {}
    branches: dict[str, list[str]] = {}
    keys = [key.split(".") for key in (*draft.source, *ignored)]
    for parts in keys:
        for end, part in enumerate(parts):
            if part in _REPARAMETERISED:
                fused.setdefault(".".join(parts[:end]), []).append(".".join(parts))
    for parts in keys if fused else ():
        for end, part in enumerate(parts):
            if part.startswith(_BRANCHES) and part not in _REPARAMETERISED and ".".join(parts[:end]) in fused:
                branches.setdefault(".".join(parts[:end]), []).append(".".join(parts))
    for block, parts in branches.items():
        taken = [key for key in fused[block] if key in draft.used]
        if not taken or any(key in draft.used for key in parts):
            continue
        detail = f"the file still holds the branches ({parts[0]}, ...) that this was fused from: it is out of date"
        remedy = "load the file into the unfused float model, fuse that, and pass the fused model as the source"
        draft.problem(ProblemKind.STALE, taken[0], detail, remedy)
        draft.used.update(parts)


# --- quantizers -------------------------------------------------------------------------------------------------------


def _quantizer_entries(draft: _Draft, quantizers: Sequence[Quantizer], match: Match) -> None:
    source_groups = _source_groups(draft, quantizers, match)
    foreign = any(
        origin is not None and quantizer.needs is Needs.WEIGHTS and _granularity_differs(draft, quantizer, origin)
        for quantizer, origin in source_groups
    )
    mine = draft.target.by_quantizer()
    for quantizer, origin in source_groups:
        keys = mine.get(quantizer.name, [])
        if origin is None:
            _synthesize(draft, quantizer, keys, "")
        else:
            _carry(draft, quantizer, keys, origin, foreign)


def _source_groups(
    draft: _Draft, quantizers: Sequence[Quantizer], match: Match
) -> list[tuple[Quantizer, Mapping[str, str] | None]]:
    """Each quantizer of the target with the source's state of it: leaf -> source key."""
    leaves: dict[str, dict[str, str]] = {}
    by_site: dict[str, list[str]] = {}
    for name, keys in draft.source.by_quantizer().items():
        leaves[name] = {draft.source[key].leaf: key for key in keys}
        by_site.setdefault(draft.source[keys[0]].site, []).append(name)
    plain = {canonical(join_path(name.removeprefix(match.prefix), "_")): name for name in leaves}
    numbered = {name for name in plain if _is_numbered(name)}
    wanted = {canonical(join_path(n.removeprefix(match.target_prefix), "_")) for q in quantizers for n in q.names}
    same_graph = numbered == {name for name in wanted if _is_numbered(name)}
    found: list[tuple[Quantizer, Mapping[str, str] | None]] = []
    for quantizer in quantizers:
        origin: str | None = None
        for name in quantizer.names:
            form = canonical(join_path(name.removeprefix(match.target_prefix), "_"))
            if name in leaves and (same_graph or not _is_numbered(form)):
                origin = name
            elif form in plain and (same_graph or not _is_numbered(form)):
                origin = plain[form]
            if origin is not None:
                break
        if origin is None and draft.source.recorded and draft.source.framework == draft.target.framework:
            at_site = by_site.get(quantizer.site, [])
            origin = at_site[0] if len(at_site) == 1 else None
        found.append((quantizer, leaves[origin] if origin is not None else None))
    return found


def _is_numbered(form: str) -> bool:
    """Whether a quantizer is named by its position in a graph, which means nothing in another graph."""
    leaf = split_path(split_path(form)[0])[1]
    return leaf.startswith("activation_post_process_")


def _spec_of(draft: _Draft, origin: Mapping[str, str], role: Role) -> Spec | None:
    for key in origin.values():
        if draft.source[key].role is role:
            return draft.source[key].spec
    return None


def _granularity_differs(draft: _Draft, quantizer: Quantizer, origin: Mapping[str, str]) -> bool:
    """Whether the source's state has another number of scales than this quantizer must have."""
    expected = quantizer.channels()
    scale = _spec_of(draft, origin, Role.SCALE)
    low = _spec_of(draft, origin, Role.MIN)
    if low is not None and low.shape == (0,):
        return expected == 1 and not _is_old_default(scale)
    shape = low.shape if low is not None else scale.shape if scale is not None else ()
    count = int(torch.Size(shape).numel())
    if expected is None:
        return False
    if low is not None and expected == 1:
        return count != 1
    return count != expected or (expected > 1 and not shape) or (low is not None and shape == () and expected != 1)


def _is_old_default(scale: Spec | None) -> bool:
    return scale is None or scale.shape == (1,)


def _carry(draft: _Draft, quantizer: Quantizer, keys: Sequence[str], origin: Mapping[str, str], foreign: bool) -> None:
    """Take the state that the source holds, as far as it fits this quantizer."""
    target = draft.target
    if quantizer.site.partition(":")[2] in draft.kept_modules:
        _drop(draft, origin, "its module keeps its own value (keep=)")
        _synthesize(draft, quantizer, keys, "its module keeps its own value")
        return
    if _granularity_differs(draft, quantizer, origin):
        if quantizer.needs is Needs.WEIGHTS:
            _drop(draft, origin, "another granularity: recomputed from the weights")
            _synthesize(draft, quantizer, keys, "the source has another granularity")
            return
        _drop(draft, origin, "another granularity: cannot be carried")
        _synthesize(draft, quantizer, keys, "the source has another granularity")
        return
    histograms = [key for key in keys if target[key].role is Role.HISTOGRAM]
    for key in histograms:
        theirs = origin.get(target[key].leaf)
        if theirs is None or draft.source[theirs].shape != target[key].shape:
            why = "no histogram" if theirs is None else f"{draft.source[theirs].shape[0]} histogram bins"
            _drop(draft, origin, f"another observer ({why}): cannot be carried")
            _synthesize(draft, quantizer, keys, f"the source has {why}, not {target[key].shape[0]}")
            return
    ranges = tuple(origin[leaf] for leaf in origin if draft.source[origin[leaf]].role in _CARRIED)
    derive = quantizer.needs is Needs.DATA and len(ranges) == 2 and foreign
    for key in keys:
        entry = target[key]
        theirs = origin.get(entry.leaf)
        if derive and entry.role in (Role.SCALE, Role.ZERO_POINT):
            draft.steps[key] = Derive(key, ranges, "min/max carried over, on this quantizer's own grid")
            if theirs is not None:
                draft.dropped[theirs] = Drop(theirs, "of another quantization grid: derived anew from min/max")
        elif theirs is not None:
            draft.copy(key, theirs, "same quantizer")
        elif entry.role in (Role.ENABLED, Role.EPS, Role.CONSTANT, Role.BUFFER):
            draft.steps[key] = Keep(key, "not in the source: the quantizer's own setting")
        elif entry.role in (Role.SCALE, Role.ZERO_POINT) and len(ranges) == 2:
            draft.steps[key] = Derive(key, ranges, "from min/max of the source")
        else:
            detail = f"the source has other state of {quantizer.name}, but not this"
            draft.problem(ProblemKind.MISSING, key, detail, "drop= the rest of this quantizer to synthesize it")


def _drop(draft: _Draft, origin: Mapping[str, str], reason: str) -> None:
    draft.dropped.update({key: Drop(key, reason) for key in origin.values()})


def _synthesize(draft: _Draft, quantizer: Quantizer, keys: Sequence[str], reason: str) -> None:
    """State that the source cannot give: from the weights, from data, or fixed by definition."""
    target, goal = draft.target, draft.goal
    observed = [key for key in keys if target[key].role.is_observed]
    how: How | None = None
    why = ""
    if quantizer.needs is Needs.DEFINITION:
        why = "fixed by the quantizer's definition"
    elif quantizer.needs is Needs.WEIGHTS:
        how = How.WEIGHTS
    elif goal.data == "record" and observed and all(_is_recorded(goal, key, target[key]) for key in observed):
        how = How.RECORD
    elif goal.data == "batches":
        how = How.CALIBRATION
    elif quantizer.needs is Needs.NOTHING:
        why = "dynamic: computed for every batch"
    elif goal.data == "defer":
        why = "deferred to the first training batches (calibration='defer')"
    else:
        detail = f"no calibration data for {quantizer.site}" + (f" ({reason})" if reason else "")
        draft.problem(ProblemKind.UNCALIBRATED, quantizer.name, detail)
        return
    for key in keys:
        role = target[key].role
        if role in (Role.ENABLED, Role.EPS):
            draft.steps[key] = Keep(key, "a setting of the quantizer, not of the checkpoint")
        elif how is None or role in (Role.CONSTANT, Role.BUFFER):
            draft.steps[key] = Keep(key, why or "fixed by the quantizer's definition")
        else:
            draft.steps[key] = Synthesize(key, quantizer.name, how, reason)


def _is_recorded(goal: Goal, key: str, entry: Entry) -> bool:
    """Whether a saved calibration holds this value for an observer of this kind."""
    shape = goal.recorded.get(canonical(key))
    return shape is not None and (entry.role is not Role.HISTOGRAM or shape == entry.shape)


# --- what nothing took ------------------------------------------------------------------------------------------------


def _leftovers(draft: _Draft, found: Match, alias: Callable[[str], Hashable | None], unused: frozenset[str]) -> None:
    """A reason for every source key that no step reads, or a problem."""
    source, target = draft.source, draft.target
    hidden = target.non_persistent | {canonical(name) for name in target.non_persistent}
    used_memory = {alias(key): key for key in draft.used}
    filled_sites = {source[origin].site for origin, _ in found.pairs.values() if origin in source}
    for key, entry in source.items():
        if key in draft.used or key in draft.dropped or key in found.contested:
            continue
        parent, leaf = split_path(entry.site)
        twin = used_memory.get(alias(key)) if alias(key) is not None else None
        reason = ""
        if entry.quantizer:
            reason = "state of a quantizer that the target does not have"
        elif entry.site in hidden or canonical(entry.site) in hidden:
            reason = "the target has it as a non-persistent buffer"
        elif twin is not None:
            reason = f"the same tensor as {twin}"
        elif leaf == "num_batches_tracked" and join_path(parent, "running_mean") in filled_sites:
            reason = "the target's normalization does not count batches"
        elif canonical(key) == "n_averaged":
            reason = "the counter of an averaged model"
        elif entry.role is Role.CONSTANT or entry.optional:
            reason = entry.optional or "fixed by a quantizer's definition"
        elif entry.site in unused or canonical(entry.site) in unused:
            reason = "the prepared graph does not use it (float_model=)"
        if reason:
            draft.dropped[key] = Drop(key, reason)
        else:
            detail = f"{entry.spec} is in the source and the target has no place for it"
            remedy = f"rename= maps it to another name, drop={key!r} ignores it"
            draft.problem(ProblemKind.UNEXPECTED, key, detail, remedy)
