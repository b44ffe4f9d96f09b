"""What a quantizer's state says in any framework's terms: its range, and on known integers its scale and zero point.

Frameworks hold a largest magnitude, a threshold or a width (see :mod:`qat_compat.conventions`). Read as entries with
recipes, these can be taken by the quantizer of another framework that quantizes the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qat_compat.conventions import CONVENTIONS, Grid
from qat_compat.schema import Entry, Recipe, Role, Spec
from qat_compat.state import join_path

__all__ = ["Encoded", "as_amax", "encoded_entries", "grid_text"]

Read = Callable[..., Mapping[str, Tensor]]


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
    if one.grid is None:
        return ""
    centred = "affine" if _is_affine(one) else "symmetric"
    return f"{one.grid.low}..{one.grid.high} {centred}"


def _is_affine(one: Encoded) -> bool:
    return len(CONVENTIONS[one.convention].tensors) > 1


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
    for leaf, (role, compute) in parts.items():
        dtype = torch.int32 if role is Role.ZERO_POINT else one.spec.dtype
        how = f"{one.convention.partition('.')[0]}'s {convention.tensors[0]} as {leaf}" + (
            f", on {grid_text(one)}" if leaf in ("scale", "zero_point") else ""
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
    low = -one.grid.high if one.grid.signed and not _is_affine(one) else one.grid.low
    return _flat((low - zero_point) * scale), _flat((one.grid.high - zero_point) * scale)


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1) if value.dim() else value
