"""Whether the range of one quantizer can be told in the terms of another, and the plan for it.

Two quantizers mean the same by one scale where every integer of the source's grid is one of the target's. On another
grid of as many bits a symmetric range is still a range: its largest magnitude. All else would be a guess.

Frameworks divide by a scale, multiply by its inverse, or round it first: a value half-way between two levels may go to
the other one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qat_compat.conventions import CONVENTIONS, Form
from qat_compat.draft import Draft
from qat_compat.encodings import grid_words
from qat_compat.errors import QParamError
from qat_compat.frameworks import Quantizer
from qat_compat.origins import Origin, key_of
from qat_compat.plan import Derive, Keep
from qat_compat.schema import Role, Schema

__all__ = ["Levels", "parse_grid", "same_integers", "write_down", "written"]

_GRID = re.compile(r"(-?\d{1,10})\.\.(-?\d{1,10}) (symmetric|affine|centred)( along axis .+)?")
_RANGE = (Role.MIN, Role.MAX)
_QPARAMS = (Role.SCALE, Role.ZERO_POINT)


class Levels(NamedTuple):
    """A grid, read off its words.

    Args:
        low: The lowest integer.
        high: The highest.
        centred: "symmetric" (the zero point is 0), "affine", or "centred" (the zero point is in the middle).
        along: The axis that has a range per index, where that is not the first.
    """

    low: int
    high: int
    centred: str
    along: str


def parse_grid(words: str) -> Levels | None:
    """What the words of a grid say (see :meth:`qat_compat.frameworks.Quantizer.grid`); None where they say nothing.

    Example:
        >>> parse_grid("0..255 affine along axis 1")
        Levels(low=0, high=255, centred='affine', along=' along axis 1')
    """
    found = _GRID.fullmatch(words)
    return None if found is None else Levels(int(found[1]), int(found[2]), found[3], found[4] or "")


def same_integers(theirs: str, mine: str) -> bool:
    """Whether a scale and zero point of one grid mean the same on another.

    Example:
        >>> same_integers("-127..127 symmetric", "-128..127 symmetric"), same_integers("", "-128..127 symmetric")
        (True, False)
        >>> same_integers("-128..127 symmetric", "-127..127 symmetric")  # -128 would become -127
        False
    """
    one, other = parse_grid(theirs), parse_grid(mine)
    if one is None or other is None or one == other:
        return one is not None and one == other
    wider = one.high == other.high and one.low >= other.low and one.along == other.along
    return wider and one.centred == "symmetric" and other.centred != "centred"


def write_down(draft: Draft, quantizer: Quantizer, form: Form, keys: Sequence[str], origin: Origin) -> str:
    """Plan to tell the source's range in the quantizer's own terms.

    Returns:
        Why that cannot be exact; "" where it can, and is planned.
    """
    leaves = {draft.target[key].leaf: key for key in keys}
    if refusal := quantizer.refuses_transfer():
        return refusal
    if not set(form.leaves.values()) <= set(leaves):
        return "the quantizer here holds no range"
    shape = draft.target[leaves[next(iter(form.leaves.values()))]].shape
    theirs, mine = draft.source.grids.get(origin.name, ""), grid_words(form.convention, form.grid, shape)
    roles = _roles(draft, origin, form, theirs, mine)
    if roles is None:
        return f"the source has the grid {theirs}, not {mine}" if theirs else "the source's grid is not known"
    terms = tuple(key for role in roles if (key := _key(draft, origin, role)) is not None)
    held = [name for term in terms for name in (_sources(draft, term))]
    how = f"the {'scale' if roles is _QPARAMS else 'largest magnitude'} of the source as {_words(form)}"
    for key in keys:
        if draft.target[key].leaf in form.leaves.values():
            draft.steps[key] = Derive(key, tuple(dict.fromkeys(held)), how, terms=terms)
        else:
            draft.steps[key] = Keep(key, "a setting of the quantizer, not of the checkpoint")
    draft.used.update((*held, *terms))
    return ""


def _roles(draft: Draft, origin: Origin, form: Form, theirs: str, mine: str) -> tuple[Role, ...] | None:
    """What of the source's state says its range exactly in the terms of the target."""
    known = {role for role in (*_RANGE, *_QPARAMS) if _key(draft, origin, role) is not None}
    if same_integers(theirs, mine) and known.issuperset(_QPARAMS):
        return _QPARAMS
    if not CONVENTIONS[form.convention].is_magnitude:
        return None
    one, other = parse_grid(theirs), parse_grid(mine)
    if one is None or other is None:  # a recipe gives the range of an unknown grid where it is a largest magnitude
        return _RANGE if key_of(draft, origin, Role.MAX) in draft.source.recipes else None
    alike = one._replace(low=0) == other._replace(low=0) and one.centred == "symmetric"
    if not alike or one.low >= 0 or other.low >= 0:
        return None
    # what an observer holds beside a scale that was learnt is out of date; what is computed never is
    if Role.SCALE in known and key_of(draft, origin, Role.MAX) not in draft.source.recipes:
        return (Role.SCALE,)
    return _RANGE if known.issuperset(_RANGE) else None


def written(schema: Schema, form: Form, terms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a convention, by name, that say what :func:`write_down` planned.

    Args:
        schema: Of the source.
        form: How the target's quantizer writes its range down.
        terms: Keys of the source, as planned, with their tensors.
    """
    first, *rest = terms
    if schema[first].role is Role.MIN:
        magnitude = torch.maximum(terms[first].abs(), terms[rest[0]].abs())
        return dict.fromkeys(form.leaves, magnitude)
    if not rest:
        levels = parse_grid(schema.grids[schema[first].quantizer])
        assert levels is not None
        return dict.fromkeys(form.leaves, terms[first] * ((levels.high - levels.low) / 2))
    zero_point = terms[rest[0]]
    if bool(zero_point.any()) and not CONVENTIONS[form.convention].is_affine:
        raise QParamError(
            "the grid is symmetric by its record, and its zero point is another than 0",
            key=rest[0],
            expected="0",
            found=f"{int(zero_point.count_nonzero())} of {zero_point.numel()} that are not",
            remedy="drop= the state of this quantizer to work it out anew",
        )
    return form.written(terms[first], zero_point)


def _key(draft: Draft, origin: Origin, role: Role) -> str | None:
    """The source's tensor of a role; a zero point that is always 0 is a constant of its quantizer."""
    found = key_of(draft, origin, role)
    return origin.leaves.get("zero_point") if found is None and role is Role.ZERO_POINT else found


def _sources(draft: Draft, term: str) -> tuple[str, ...]:
    recipe = draft.source.recipes.get(term)
    return recipe.sources if recipe is not None else (term,)


def _words(form: Form) -> str:
    return f"{form.convention.partition('.')[0]}'s {' and '.join(form.leaves)}"
