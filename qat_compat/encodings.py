"""What a quantizer's state says in any framework's terms: its range, and on known integers its scale and zero point.

Frameworks hold a largest magnitude, a threshold or a width (see :mod:`qat_compat.conventions`). Read as entries with
recipes, these can be taken by the quantizer of another framework that quantizes the same tensor. Only a live quantizer
tells which convention and which grid its tensors follow; a file that this package writes says it beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat_compat.conventions import CONVENTIONS, Form, Grid
from qat_compat.schema import Entry, Recipe, Role, Schema, Spec
from qat_compat.state import join_path

__all__ = [
    "Encoded",
    "as_amax",
    "encoded_entries",
    "form_from_record",
    "form_to_record",
    "grid_text",
    "grid_words",
    "with_encodings",
]

Read = Callable[..., Mapping[str, Tensor]]
_MOST_BITS = 32


class Encoded(NamedTuple):
    """The range of one quantizer, as a framework wrote it down.

    Args:
        quantizer: Its name.
        site: What it quantizes.
        convention: Name of a row of :data:`qat_compat.conventions.CONVENTIONS`.
        keys: Keys of the tensors that hold it.
        read: Makes the tensors of the convention, by name, from those of `keys`.
        spec: Shape and dtype of the first of them.
        grid: The integers; None where the checkpoint does not tell. A largest magnitude is a range on any grid.
    """

    quantizer: str
    site: str
    convention: str
    keys: Sequence[str]
    read: Read
    spec: Spec
    grid: Grid | None


def as_amax(value: Tensor) -> Mapping[str, Tensor]:
    """The one tensor of a largest magnitude, by its name in the table of conventions."""
    return {"_amax": value}


def grid_text(one: Encoded) -> str:
    """The grid as :meth:`Quantizer.grid` words it, or "".

    Example:
        >>> spec = Spec((), torch.float32)
        >>> grid_text(Encoded("q", "weight:fc", "modelopt.int", ["q._amax"], dict, spec, Grid(8)))
        '-128..127 symmetric'
    """
    return "" if one.grid is None else grid_words(one.convention, one.grid, one.spec.shape)


def grid_words(convention: str, grid: Grid, shape: tuple[int, ...]) -> str:
    """A grid in words, with the axis that has a range per index where that is not the first.

    Example:
        >>> grid_words("brevitas.int", Grid(8, narrow=True), (16, 1, 1, 1))
        '-127..127 symmetric'
        >>> grid_words("nncf.asymmetric", Grid(8, signed=False), (1, 16, 1, 1))
        '0..255 affine along axis 1'
    """
    axes = [str(axis) for axis, size in enumerate(shape) if size > 1]
    along = f" along axis {' and '.join(axes)}" if axes not in ([], ["0"]) else ""
    return f"{grid.low}..{grid.high} {'affine' if CONVENTIONS[convention].is_affine else 'symmetric'}{along}"


def encoded_entries(one: Encoded) -> dict[str, tuple[Entry, Recipe]]:
    """Keys that a checkpoint does not hold, and that can be computed: range, and scale and zero point.

    Example:
        >>> spec = Spec((2, 1), torch.float32)
        >>> read = lambda amax: {"_amax": amax}
        >>> found = encoded_entries(Encoded("q", "weight:fc", "modelopt.int", ["q._amax"], read, spec, Grid(8)))
        >>> list(found), found["q.scale"][1].compute(torch.tensor([[127.0], [254.0]]))
        (['q.min_val', 'q.max_val', 'q.scale', 'q.zero_point'], tensor([1., 2.]))
    """
    convention = CONVENTIONS[one.convention]
    parts: dict[str, tuple[Role, Callable[..., Tensor]]] = {}
    if one.grid is not None or convention.is_magnitude:
        parts = {
            "min_val": (Role.MIN, lambda *t: _range(one, *t)[0]),
            "max_val": (Role.MAX, lambda *t: _range(one, *t)[1]),
        }
    if one.grid is not None:
        parts["scale"] = (Role.SCALE, lambda *t: _flat(_qparams(one, *t)[0]))
        parts["zero_point"] = (Role.ZERO_POINT, lambda *t: _flat(_qparams(one, *t)[1]).to(torch.int32))
    count = torch.Size(one.spec.shape).numel()
    shape = (count,) if one.spec.shape else ()
    found: dict[str, tuple[Entry, Recipe]] = {}
    for name, (role, compute) in parts.items():
        leaf = f"{name}_of_grid" if name in convention.tensors else name  # NNCF calls a magnitude `scale`
        dtype = torch.int32 if role is Role.ZERO_POINT else one.spec.dtype
        how = f"{one.convention.partition('.')[0]}'s {convention.tensors[0]} as {name}" + (
            f", on {grid_text(one)}" if name in ("scale", "zero_point") else ""
        )
        entry = Entry(one.site, role, shape, dtype, one.quantizer, leaf)
        found[join_path(one.quantizer, leaf)] = (entry, Recipe(tuple(one.keys), how, compute))
    return found


def _qparams(one: Encoded, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    assert one.grid is not None
    return CONVENTIONS[one.convention].qparams(one.read(*tensors), one.grid)


def _range(one: Encoded, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The values that the lowest and the highest level stand for; about zero, a signed range is its magnitude."""
    if one.grid is None:
        (magnitude,) = one.read(*tensors).values()
        return _flat(-magnitude.abs()), _flat(magnitude.abs())
    scale, zero_point = _qparams(one, *tensors)
    low = -one.grid.high if one.grid.signed and not CONVENTIONS[one.convention].is_affine else one.grid.low
    return _flat((low - zero_point) * scale), _flat((one.grid.high - zero_point) * scale)


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1) if value.dim() else value


def with_encodings(schema: Schema, forms: Mapping[str, Form]) -> Schema:
    """With the ranges of quantizers in terms that other frameworks' quantizers can take.

    Args:
        schema: Of a model or file.
        forms: Quantizer name -> how it writes its range down.
    """
    entries, recipes, grids = dict(schema.entries), dict(schema.recipes), dict(schema.grids)
    for quantizer, form in forms.items():
        keys = {schema[key].leaf: key for key in schema.by_quantizer().get(quantizer, [])}
        if not set(form.leaves.values()) <= set(keys):
            continue  # it holds no range yet
        held = [keys[leaf] for leaf in form.leaves.values()]
        first = schema[held[0]]
        read = _named(tuple(form.leaves))
        one = Encoded(quantizer, first.site, form.convention, held, read, first.spec, form.grid)
        for key, (entry, recipe) in encoded_entries(one).items():
            entries[key], recipes[key] = entry, recipe
        grids[quantizer] = grid_text(one)
    return replace(schema, entries=entries, recipes=recipes, grids=grids)


def _named(names: tuple[str, ...]) -> Read:
    return lambda *tensors: dict(zip(names, tensors, strict=True))


def form_to_record(form: Form) -> dict[str, Any]:
    """Plain data that a file can hold.

    Example:
        >>> form = Form("brevitas.int", Grid(8, narrow=True), {"value": "tensor_quant.scaling_impl.value"})
        >>> form_from_record(form_to_record(form)) == form
        True
    """
    return {"convention": form.convention, **form.grid._asdict(), "leaves": dict(form.leaves)}


def form_from_record(record: Any) -> Form | None:
    """What :func:`form_to_record` wrote; None for what this version does not know."""
    match record:
        case {
            "convention": str(convention),
            "bits": int(bits),
            "signed": bool(signed),
            "narrow": bool(narrow),
            "leaves": dict(leaves),
        } if (
            1 <= bits <= _MOST_BITS
            and convention in CONVENTIONS
            and set(leaves) == set(CONVENTIONS[convention].tensors)
        ):
            return Form(convention, Grid(bits, signed, narrow), {str(name): str(leaf) for name, leaf in leaves.items()})
    return None
