"""The state of quantizers in a plan: carried over from the source where it fits, synthesized where it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from qat_compat.draft import Draft, Goal
from qat_compat.errors import ProblemKind
from qat_compat.frameworks import Needs, Quantizer
from qat_compat.names import canonical, canonical_path, is_positional
from qat_compat.norms import Match
from qat_compat.plan import Derive, Drop, How, Keep, Synthesize
from qat_compat.schema import Entry, Role, Spec

__all__ = ["quantizer_entries"]

_CARRIED = (Role.MIN, Role.MAX)


def quantizer_entries(draft: Draft, quantizers: Sequence[Quantizer], match: Match) -> None:
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
    draft: Draft, quantizers: Sequence[Quantizer], match: Match
) -> list[tuple[Quantizer, Mapping[str, str] | None]]:
    """Each quantizer of the target with the source's state of it: leaf -> source key."""
    leaves: dict[str, dict[str, str]] = {}
    by_site: dict[str, list[str]] = {}
    for name, keys in draft.source.by_quantizer().items():
        leaves[name] = {draft.source[key].leaf: key for key in keys}
        by_site.setdefault(draft.source[keys[0]].site, []).append(name)
    plain = {canonical_path(name.removeprefix(match.prefix)): name for name in leaves}
    numbered = {name for name in plain if is_positional(name)}
    wanted = {canonical_path(n.removeprefix(match.target_prefix)) for q in quantizers for n in q.names}
    same_graph = numbered == {name for name in wanted if is_positional(name)}
    same_flow = draft.source.recorded and draft.source.framework == draft.target.framework
    sites = Counter(quantizer.site for quantizer in quantizers)
    by_number, weights_too = 0, False
    found: list[tuple[Quantizer, Mapping[str, str] | None]] = []
    for quantizer in quantizers:
        origin: str | None = None
        at_site = by_site.get(quantizer.site, []) if same_flow else []
        if len(at_site) == 1 and sites[quantizer.site] == 1:
            found.append((quantizer, leaves[at_site[0]]))
            continue
        for name in quantizer.names:
            form = canonical_path(name.removeprefix(match.target_prefix))
            if name in leaves and (same_graph or not is_positional(form)):
                origin = name
            elif form in plain and (same_graph or not is_positional(form)):
                origin = plain[form]
            if origin is not None:
                break
        if origin is not None and is_positional(canonical_path(quantizer.name)):
            by_number += 1
            weights_too |= quantizer.needs is Needs.WEIGHTS
        found.append((quantizer, leaves[origin] if origin is not None else None))
    if weights_too:  # a number that is off by one gives a weight another's range
        draft.warnings.append(
            f"{by_number} quantizers are matched by their number, which exporters of other versions may give otherwise;"
            " files that save_checkpoint writes say what each one quantizes"
        )
    return found


def _spec_of(draft: Draft, origin: Mapping[str, str], role: Role) -> Spec | None:
    for key in origin.values():
        if draft.source[key].role is role:
            return draft.source[key].spec
    return None


def _granularity_differs(draft: Draft, quantizer: Quantizer, origin: Mapping[str, str]) -> bool:
    """Whether the source's state has another number of scales than this quantizer must have."""
    expected = quantizer.channels()
    scale = _spec_of(draft, origin, Role.SCALE)
    low = _spec_of(draft, origin, Role.MIN) or _spec_of(draft, origin, Role.AMAX)
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


def _carry(draft: Draft, quantizer: Quantizer, keys: Sequence[str], origin: Mapping[str, str], foreign: bool) -> None:
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


def _drop(draft: Draft, origin: Mapping[str, str], reason: str) -> None:
    draft.dropped.update({key: Drop(key, reason) for key in origin.values()})


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
    elif goal.data == "defer":
        why = "deferred to the first training batches (calibration='defer')"
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
    shape = goal.recorded.get(canonical(key))
    return shape is not None and (entry.role is not Role.HISTOGRAM or shape == entry.shape)
