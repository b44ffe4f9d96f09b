"""Join two schemas into a plan. Reads no tensor; touches no model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from qat_compat.carry import quantizer_entries
from qat_compat.draft import Draft, Goal
from qat_compat.errors import PlanError, Problem, ProblemKind
from qat_compat.frameworks import Quantizer
from qat_compat.names import canonical, is_named
from qat_compat.norms import Match
from qat_compat.plan import Copy, Derive, Drop, Keep, Plan, sorted_problems
from qat_compat.schema import UNKNOWN, Entry, Role, Schema, Stage
from qat_compat.state import join_path, split_path

__all__ = ["COVERAGE", "Goal", "doubts", "join", "without"]

COVERAGE = "<coverage>"  # stands for a key, where most keys are missing


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
    draft = Draft(source, target, goal or Goal())
    draft.problems += found.problems
    draft.warnings += found.notes
    refused = _converted(source, target, names)
    if refused is not None:
        return Plan((), (refused,), (), *names)
    for key in ignored:
        draft.dropped[key] = Drop(key, "asked for by drop=")
    _float_entries(draft, found, ties or {})
    draft.problems += doubts(source, [origin for origin, _ in found.pairs.values()])
    _stale_fusions(draft, ignored)
    quantizer_entries(draft, quantizers, found)
    _leftovers(draft, found, alias, unused)
    ordered = [draft.steps[key] for key in target if key in draft.steps]
    return Plan(
        (*ordered, *draft.dropped.values()),
        sorted_problems(draft.problems),
        tuple(dict.fromkeys(draft.warnings)),
        *names,
    )


def _converted(source: Schema, target: Schema, names: tuple[str, str]) -> Problem | None:
    """Integers are never taken for float weights unasked, nor is a model of integers filled with them."""
    if target.stage is Stage.CONVERTED:
        detail = f"the target is a converted (integer) model ({target.framework}), which holds no weights to train"
        remedy = "load into the float or prepared model, and convert that"
        return Problem(ProblemKind.MISMATCHED, names[1], detail, remedy)
    if source.stage is Stage.CONVERTED:
        detail = f"the source is a converted (integer) checkpoint ({source.framework}), which holds rounded weights"
        remedy = "pass the float or QAT checkpoint that it was converted from, or to_float(source) to dequantize it"
        return Problem(ProblemKind.MISMATCHED, names[0], detail, remedy)
    return None


def doubts(source: Schema, taken: Iterable[str]) -> Iterator[Problem]:
    """What would be taken and may be out of use."""
    remedy = "pass the float model (float_model=, or like= of to_float), or the converted module instead of its file"
    for key in taken:
        if key in source.doubtful:
            detail = "it may be folded into a convolution and out of use, which the file does not tell"
            yield Problem(ProblemKind.AMBIGUOUS, key, detail, remedy)


def _idle_drop(schema: Schema, glob: str) -> Problem:
    meant = next((key for key in schema if is_named([f"*.{glob}"], key)), None)  # without a wrapper's prefix, say
    remedy = "check its spelling" if meant is None else f"the source's own name is longer: {meant}"
    return Problem(ProblemKind.MISSING, glob, "drop= names nothing in the source", remedy)


def without(schema: Schema, globs: Sequence[str]) -> tuple[Schema, list[str]]:
    """The schema less the keys that match and what is computed from them, and those keys; a glob that names nothing is
    an error."""
    if not globs:
        return schema, []
    ignored = [key for key in schema if is_named(globs, key)]
    idle = [glob for glob in globs if not any(is_named([glob], key) for key in ignored)]
    if idle:
        raise PlanError([_idle_drop(schema, glob) for glob in idle])
    gone = set(ignored)
    gone |= {key for key, recipe in schema.recipes.items() if not gone.isdisjoint(recipe.sources)}
    entries = {key: entry for key, entry in schema.items() if key not in gone}
    return replace(schema, entries=entries), ignored


# --- float entries ----------------------------------------------------------------------------------------------------


def _float_entries(draft: Draft, found: Match, ties: Mapping[str, Sequence[str]]) -> None:
    target, goal = draft.target, draft.goal
    kept_globs = set(goal.keep)
    hosts = {one.prefix: one.host for one in target.fused}
    missing: list[str] = []
    same_constants = _same_constants(draft)
    sites = {key: _float_name(key, target[key], found) for key in target.float_keys()}
    asked = {key for key, site in sites.items() if goal.keep and is_named(goal.keep, key, site)}
    tied = {name for key in asked for name in ties.get(key, ())} - asked
    for key, site in sites.items():
        entry = target[key]
        if key in asked or key in tied:
            kept_globs -= {glob for glob in goal.keep if is_named([glob], key, site)}
            draft.steps[key] = Keep(key, "asked for by keep=" if key in asked else "tied to what keep= names")
            draft.kept_modules |= {split_path(key)[0], split_path(site)[0]}
            if (host := hosts.get(split_path(key)[0])) is not None:
                draft.kept_modules.add(host)
            if key in found.pairs:
                origin = found.pairs[key][0]
                draft.dropped[origin] = Drop(origin, "the target keeps its own value (keep=)")
            continue
        pair = found.pairs.get(key)
        if pair is None:
            twin = next((found.pairs[name][0] for name in ties.get(key, ()) if name in found.pairs), None)
            if twin is not None:
                draft.copy(key, twin, "tied in the model")
            elif key in same_constants:
                draft.copy(key, key, "exact key")
            elif entry.optional:
                draft.steps[key] = Keep(key, entry.optional)
            elif key not in found.contested:
                missing.append(key)
            continue
        _copy_float(draft, key, entry, pair)
    _missing(draft, missing, found)
    draft.quantizer_globs = kept_globs
    for glob in sorted(kept_globs):
        if not any(is_named([glob], key) for key in target):
            draft.problem(ProblemKind.MISSING, glob, "keep= names nothing in the target", "check its spelling")


def _same_constants(draft: Draft) -> set[str]:
    """Numbered constants that a tracer captured, where source and target have the same ones: it is the same graph."""
    theirs = {key: entry.spec for key, entry in draft.source.items() if entry.role is Role.CONSTANT and entry.optional}
    mine = {key: draft.target[key].spec for key in theirs if key in draft.target}
    return set(mine) if mine == theirs else set()


def _float_name(key: str, entry: Entry, found: Match) -> str:
    """The site of an entry, with a fused normalization under its float name."""
    parent, leaf = split_path(key)
    return join_path(found.norms[parent][0], leaf) if parent in found.norms else entry.site


def _copy_float(draft: Draft, key: str, entry: Entry, pair: tuple[str, str]) -> None:
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
        _check_cast(draft, key, theirs, entry)
    draft.copy(key, origin, witness)


def _check_cast(draft: Draft, key: str, theirs: Entry, mine: Entry) -> None:
    """Casts that lose something whatever the values are; the rest is looked at when the values are read."""
    if theirs.dtype.is_complex and not mine.dtype.is_complex:
        detail = f"{theirs.spec} cannot become {mine.spec} without losing its imaginary part"
        draft.problem(ProblemKind.LOSSY, key, detail, "prepare the model in the file's dtype")
    if theirs.dtype is not mine.dtype and "float4" in str(theirs.dtype):
        detail = f"{theirs.spec} holds two numbers in each element, which torch cannot convert to {mine.spec}"
        draft.problem(ProblemKind.MISMATCHED, key, detail, "unpack it with the package that wrote it")


def _missing(draft: Draft, missing: Sequence[str], found: Match) -> None:
    counters = [key for key in missing if split_path(key)[1] == "num_batches_tracked"]
    if counters and not any(split_path(key)[1] == "num_batches_tracked" for key in draft.source):
        # a file older than the counter (torch < 0.4.1): its absence says nothing about the weights
        for key in counters:
            draft.steps[key] = Keep(key, "the file is older than this counter")
        missing = [key for key in missing if key not in draft.steps]
    total = len(draft.target.float_keys())
    filled = sum(isinstance(step, (Copy, Derive)) for step in draft.steps.values())
    if missing and (not filled or 2 * len(missing) > total):
        detail = f"the source fills {filled} of {total} float entries of the target"
        example = next(iter(draft.source.float_keys()), "nothing")
        remedy = f"the source holds names like {example}; choose the weights with select=, or map names with rename="
        draft.problem(ProblemKind.MISSING, COVERAGE, detail, remedy)
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


def _stale_fusions(draft: Draft, ignored: Sequence[str]) -> None:
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


# --- what nothing took ------------------------------------------------------------------------------------------------


def _leftovers(draft: Draft, found: Match, alias: Callable[[str], Hashable | None], unused: frozenset[str]) -> None:
    """A reason for every source key that no step reads, or a problem."""
    source, target = draft.source, draft.target
    hidden = target.non_persistent | {canonical(name) for name in target.non_persistent}
    filled_sites = {source[origin].site for origin, _ in found.pairs.values() if origin in source}
    left = [key for key in source if not (key in draft.used or key in draft.dropped or key in found.contested)]
    used_memory = {alias(key): key for key in draft.used} if left else {}
    for key in left:
        entry = source[key]
        if entry.quantizer and key in source.recipes:
            continue  # nothing of the file: another way to tell what a quantizer holds
        parent, leaf = split_path(entry.site)
        twin = used_memory.get(alias(key)) if alias(key) is not None else None
        reason = ""
        if entry.role is Role.SMOOTHING:
            detail = "the source's weights are made for it, and the target has no place for it"
            remedy = "pass the checkpoint from before smoothing; dropping this would leave a wrong model"
            draft.problem(ProblemKind.MISMATCHED, key, detail, remedy)
            continue
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
