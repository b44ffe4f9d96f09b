"""The state of quantizers in a plan: carried over from the source where it fits, synthesized where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch

from qat_compat.draft import Draft, Goal
from qat_compat.errors import ProblemKind
from qat_compat.frameworks import Needs, Quantizer, observing_in_training, same_flow
from qat_compat.names import is_named
from qat_compat.norms import Match
from qat_compat.origins import Origin, find_origins, key_of, spec_of
from qat_compat.plan import Derive, Drop, How, Keep, Synthesize
from qat_compat.schema import Entry, Role, Spec
from qat_compat.terms import parse_grid, same_integers, write_down
from qat_compat.text import collapse, counted, shorten

__all__ = ["quantizer_entries"]

_RANGE = (Role.MIN, Role.MAX)


def quantizer_entries(draft: Draft, quantizers: Sequence[Quantizer], match: Match) -> None:
    origins = find_origins(draft, quantizers, match)
    foreign = any(
        origin is not None
        and quantizer.needs is Needs.WEIGHTS
        and not _is_kept(draft, quantizer)
        and _granularity_differs(draft, quantizer, origin)
        for quantizer, origin in origins
    )
    if draft.goal.data == "defer":
        draft.observing = observing_in_training(one for one in quantizers if one.needs is Needs.DATA)
    mine = draft.target.by_quantizer()
    for quantizer, origin in origins:
        keys = mine.get(quantizer.name, [])
        if is_named(draft.quantizer_globs, *quantizer.names, *keys):
            draft.steps.update({key: Keep(key, "asked for by keep=") for key in keys})
            if origin is not None:
                _drop(draft, origin, "the target keeps its own value (keep=)")
        elif origin is None:
            _synthesize(draft, quantizer, keys, "")
        else:
            _carry(draft, quantizer, keys, origin, foreign)
    if draft.idle:
        draft.warnings.append(
            f"{counted(len(draft.idle), 'activation quantizer')} ({', '.join(shorten(collapse(draft.idle), 4))}) still"
            " with the range of the model before this load: training does not set it, so calibrate before training"
        )


def _is_kept(draft: Draft, quantizer: Quantizer) -> bool:
    """Whether its module has its own weights still, which the source's state says nothing of."""
    return quantizer.site.partition(":")[2].partition("+")[0] in draft.kept_modules


def _granularity_differs(draft: Draft, quantizer: Quantizer, origin: Origin) -> bool:
    """Whether the source's state has another number of scales than this quantizer must have, or along another axis."""
    theirs, mine = parse_grid(draft.source.grids.get(origin.name, "")), parse_grid(quantizer.grid())
    if theirs is not None and mine is not None and theirs.along != mine.along:
        return True
    expected = quantizer.channels()
    scale = spec_of(draft, origin, Role.SCALE)
    low = spec_of(draft, origin, Role.MIN) or spec_of(draft, origin, Role.AMAX)
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


def _carry(draft: Draft, quantizer: Quantizer, keys: Sequence[str], origin: Origin, foreign: bool) -> None:
    """Take the state that the source holds, as far as it fits this quantizer."""
    refused = _refused(draft, quantizer, keys, origin)
    if refused is not None:
        dropped, reason = refused
        _drop(draft, origin, dropped)
        _synthesize(draft, quantizer, keys, reason)
        return
    match _way(draft, quantizer, keys, origin, foreign):
        case _Way.TERMS:
            form = quantizer.form()
            assert form is not None
            if why := write_down(draft, quantizer, form, keys, origin):
                _drop(draft, origin, f"{why}: cannot be carried")
                _synthesize(draft, quantizer, keys, why)
            else:
                _drop_rest(draft, origin)
        case _Way.RANGE_OR_SCALE:
            _translate(draft, quantizer, keys, origin)
        case _Way.RANGE:
            _carry_leaves(draft, keys, origin, derive=True)
        case _Way.LEAVES:
            _carry_leaves(draft, keys, origin, derive=False)


class _Way(Enum):
    """How the state of one quantizer becomes that of another."""

    TERMS = "what it means, written down in this quantizer's own terms"
    RANGE_OR_SCALE = "its range, or its scale where both have the same integers"
    RANGE = "leaf by leaf, but scale and zero point anew from the range, on this quantizer's grid"
    LEAVES = "leaf by leaf"


def _way(draft: Draft, quantizer: Quantizer, keys: Sequence[str], origin: Origin, foreign: bool) -> _Way:
    same = same_flow(draft.source, draft.target)
    if not same and quantizer.form() is not None:
        return _Way.TERMS
    theirs, mine = draft.source.grids.get(origin.name, ""), quantizer.grid()
    same_grid = theirs == mine if theirs and mine else None  # None: not known
    keeps_range = any(draft.target[key].role is Role.MIN for key in keys)
    if not keeps_range and not (same if same_grid is None else same_grid):
        return _Way.RANGE_OR_SCALE
    absent = any(leaf not in origin.leaves for leaf in _observed_leaves(draft, keys))
    if absent and (not same or _has_range(draft, origin)):
        return _Way.RANGE_OR_SCALE
    if same_grid is None:  # the range of a weight goes with its own grid; of activations, a file of one flow has one
        same_grid = quantizer.needs is not Needs.DATA or (same and not foreign)
    return _Way.LEAVES if same_grid else _Way.RANGE


def _has_range(draft: Draft, origin: Origin) -> bool:
    return all(key_of(draft, origin, role) is not None for role in _RANGE)


def _observed_leaves(draft: Draft, keys: Sequence[str]) -> list[str]:
    return [draft.target[key].leaf for key in keys if draft.target[key].role.is_observed]


def _refused(draft: Draft, quantizer: Quantizer, keys: Sequence[str], origin: Origin) -> tuple[str, str] | None:
    """Why nothing of the source's state can be taken: for its own keys, and for the quantizer's."""
    target = draft.target
    if _is_kept(draft, quantizer):
        return "its module keeps its own value (keep=)", "its module keeps its own value"
    if _granularity_differs(draft, quantizer, origin):
        means = "recomputed from the weights" if quantizer.needs is Needs.WEIGHTS else "cannot be carried"
        return f"another granularity: {means}", "the source has another granularity"
    for key in keys:
        if target[key].role is Role.HISTOGRAM:
            spec = spec_of(draft, origin, Role.HISTOGRAM)
            if spec is None or spec.shape != target[key].shape:
                why = "no histogram" if spec is None else f"{spec.shape[0]} histogram bins"
                return (
                    f"another observer ({why}): cannot be carried",
                    f"the source has {why}, not {target[key].shape[0]}",
                )
    return None


def _carry_leaves(draft: Draft, keys: Sequence[str], origin: Origin, *, derive: bool) -> None:
    """Take the state of a quantizer of the same make, leaf by leaf."""
    same = same_flow(draft.source, draft.target)
    ranges = tuple(key for key in origin.leaves.values() if draft.source[key].role in _RANGE)
    derive = derive and len(ranges) == 2
    for key in keys:
        entry = draft.target[key]
        theirs = origin.leaves.get(entry.leaf)
        if derive and entry.role in (Role.SCALE, Role.ZERO_POINT):
            draft.steps[key] = Derive(key, ranges, "min/max carried over, on this quantizer's own grid")
            if theirs is not None:
                draft.dropped[theirs] = Drop(theirs, "of another quantization grid: derived anew from min/max")
        elif theirs is not None and (same or entry.role is not Role.EPS):
            draft.copy(key, theirs, "same quantizer")
        elif entry.role in (Role.ENABLED, Role.EPS, Role.CONSTANT, Role.BUFFER):
            draft.steps[key] = Keep(key, "the quantizer's own setting")
            if theirs is not None:
                draft.dropped[theirs] = Drop(theirs, "a setting of another flow's quantizer")
        else:
            detail = f"the source has other state of {entry.quantizer}, but not this"
            draft.problem(ProblemKind.MISSING, key, detail, "drop= the rest of this quantizer to synthesize it")


def _translate(draft: Draft, quantizer: Quantizer, keys: Sequence[str], origin: Origin) -> None:
    """Take the state of a quantizer of another make: its range, or its scale where both have the same integers."""
    known = {role: key for role in (*_RANGE, Role.SCALE, Role.ZERO_POINT) if (key := key_of(draft, origin, role))}
    if "zero_point" in origin.leaves:  # one that is always 0 is a constant of its quantizer
        known.setdefault(Role.ZERO_POINT, origin.leaves["zero_point"])
    theirs, mine = draft.source.grids.get(origin.name, ""), quantizer.grid()
    wanted = {draft.target[key].role for key in keys if draft.target[key].role.is_observed}
    if Role.SCALE in known and Role.ZERO_POINT in known and same_integers(theirs, mine):
        direct, how = (Role.SCALE, Role.ZERO_POINT), "the range that scale and zero_point span"
    elif _has_range(draft, origin) and Role.MIN in wanted:
        direct, how = _RANGE, "from the range that the source holds"
    else:
        why = "the source's grid is not known"
        if theirs and mine:
            why = f"the source has the grid {theirs}, not {mine}"
        elif not mine:
            why = quantizer.refuses_transfer()
        _drop(draft, origin, f"{why}: cannot be carried")
        _synthesize(draft, quantizer, keys, why)
        return
    sources = tuple(known[role] for role in direct)
    for key in keys:
        role = draft.target[key].role
        alike = role in direct and len(draft.source[known[role]].shape) == len(draft.target[key].shape)
        if alike and origin.leaves.get(draft.target[key].leaf) == known[role]:
            draft.copy(key, known[role], "same quantizer")
        elif role in direct:
            recipe = draft.source.recipes.get(known[role])
            where = recipe.sources if recipe else (known[role],)
            text = recipe.how if recipe else f"{role.value} of {origin.name}"
            draft.steps[key] = Derive(key, where, text, known[role])
            draft.used.update((*where, known[role]))
        elif role.is_observed:
            draft.steps[key] = Derive(key, sources, how)
        else:
            draft.steps[key] = Keep(key, "a setting of the quantizer, not of the checkpoint")
    _drop_rest(draft, origin)


def _drop_rest(draft: Draft, origin: Origin) -> None:
    for key in origin.leaves.values():
        if key not in draft.used and key not in draft.source.recipes:
            draft.dropped[key] = Drop(key, "what it says is carried over in this quantizer's own terms")


def _drop(draft: Draft, origin: Origin, reason: str) -> None:
    held = [key for key in origin.leaves.values() if key not in draft.source.recipes]
    draft.dropped.update({key: Drop(key, reason) for key in held})


def _synthesize(draft: Draft, quantizer: Quantizer, keys: Sequence[str], reason: str) -> None:
    """State that the source cannot give: from the weights, from data, or fixed by definition."""
    target, goal = draft.target, draft.goal
    for key in keys:
        if target[key].role is Role.SMOOTHING:
            draft.problem(
                ProblemKind.MISMATCHED,
                key,
                "the target's weights are made for it, and the source's are not",
                "prepare the target without smoothing, or load the float model and smooth that",
            )
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
    elif goal.data == "defer" and quantizer.name in draft.observing:
        why = "deferred to the first training batches (calibration='defer')"
    elif goal.data == "defer":
        why = "deferred (calibration='defer'), and training does not set it"
        draft.idle.append(quantizer.name)
    else:
        detail = f"no calibration data for {quantizer.site}" + (f" ({reason})" if reason else "")
        draft.problem(ProblemKind.UNCALIBRATED, quantizer.name, detail)
        return
    if how in (How.WEIGHTS, How.CALIBRATION) and observed and (refusal := quantizer.refusal()):
        remedy = f"load the float model, prepare that with {target.framework}, or take a file of this quantizer's state"
        draft.problem(ProblemKind.MISMATCHED, quantizer.name, refusal, remedy)
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
    shape = goal.recorded.get(key)
    return shape is not None and (entry.role is not Role.HISTOGRAM or shape == entry.shape)
