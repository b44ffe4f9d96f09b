"""Frameworks that are told by the keys of their checkpoints: what such a framework file has to say, and no more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from qat_compat.encodings import Encoded, encoded_entries, grid_text
from qat_compat.errors import MALFORMED, CheckpointError
from qat_compat.frameworks.base import CAPTURED, Framework, KeyView, ModelView, Quantizer, is_captured, plain_entry
from qat_compat.schema import Entry, Recipe, Role, Rounding, Schema, Spec, Stage
from qat_compat.state import split_path

__all__ = ["Decoded", "KeyedFramework", "Place", "decode_each", "decoded_entries", "holds_integers", "site_of"]

# what a weight is stored as when it is no master weight any more
_INTEGERS = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)


class Place(NamedTuple):
    """Where one tensor of a quantizer's state belongs: its quantizer, what that quantizes, and the tensor's part in
    it."""

    quantizer: str
    site: str
    leaf: str
    role: Role


class Decoded(NamedTuple):
    """A tensor of the float model that the checkpoint holds in another form, and the integers in it, if it has any."""

    entry: Entry
    recipe: Recipe
    grid: Rounding | None = None


class KeyedFramework(Framework):
    """A framework whose checkpoints are told by tables of keys.

    As it is, its models are read as the modules that they are; one that knows them overrides :meth:`owns_model` and
    :meth:`quantizers`.
    """

    folds = False  # whether converting folds normalizations into the layers before them

    def owns_model(self, view: ModelView) -> bool:
        return False

    def quantizers(self, view: ModelView) -> list[Quantizer]:
        return []

    @abstractmethod
    def place(self, key: str, spec: Spec) -> Place | None:
        """The meaning of a tensor of a quantizer's state; None for what the float model holds too."""

    def float_site(self, key: str, view: KeyView) -> str:
        """The float model's name of a tensor that is not a quantizer's."""
        return key

    def decoded(self, view: KeyView) -> Mapping[str, Decoded | str]:
        """Key -> tensor of the float model that is computed from others, or why it cannot be; the key may be that of
        one of them."""
        return {}

    def encodings(self, view: KeyView) -> Iterable[Encoded]:
        """The ranges of quantizers that can be told in other frameworks' terms."""
        return ()

    def owns_keys(self, view: KeyView) -> bool:
        return any(self.place(key, spec) is not None for key, spec in view.kinds)

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED if holds_integers(view.specs) else Stage.PREPARED

    def describe_keys(self, view: KeyView) -> Schema:
        entries: dict[str, Entry] = {}
        for key, spec in view.specs.items():
            place = self.place(key, spec)
            if place is None:
                entry = plain_entry(self.float_site(key, view), spec)
                if holds_integers({key: spec}):
                    entry = entry._replace(role=Role.PACKED)
                entries[key] = entry._replace(role=Role.CONSTANT, optional=CAPTURED) if is_captured(key) else entry
            else:
                entries[key] = Entry(place.site, place.role, *spec, place.quantizer, place.leaf)
        encodings = list(self.encodings(view))
        outcomes = self.decoded(view)
        decoded = {key: one for key, one in outcomes.items() if isinstance(one, Decoded)}
        decoded |= {key: Decoded(*found) for one in encodings for key, found in encoded_entries(one).items()}
        return Schema(
            decoded_entries(entries, decoded),
            self.name,
            self.stage(view),
            recipes={key: one.recipe for key, one in decoded.items()},
            grids={one.quantizer: text for one in encodings if (text := grid_text(one))},
            roundings={key: one.grid for key, one in decoded.items() if one.grid is not None},
            unreadable={key: why for key, why in outcomes.items() if isinstance(why, str)},
            folds=self.folds,
        )


def decode_each(
    names: Iterable[str], view: KeyView, decode: Callable[[str], Decoded | str]
) -> dict[str, Decoded | str]:
    """What each weight is computed from.

    Raises:
        CheckpointError: What the file says of one is not what its framework writes.
    """
    found: dict[str, Decoded | str] = {}
    for name in names:
        try:
            found[name] = one = decode(name)
            if isinstance(one, Decoded):
                _check(one, view)
        except MALFORMED as error:
            raise CheckpointError(
                "what the file says of a quantized weight is malformed",
                key=name,
                found=f"{type(error).__name__}: {error}",
                remedy="get a fresh copy of the file, or convert the model again",
            ) from error
    return found


def _check(one: Decoded, view: KeyView) -> None:
    if any(type(size) is not int or size < 0 for size in one.entry.shape):
        raise ValueError(f"a weight of shape {one.entry.shape}")
    if one.grid is not None and type(one.grid.group) is not int:
        raise TypeError(f"groups of {one.grid.group!r}")
    missing = [key for key in one.recipe.sources if key not in view.specs]
    if missing:
        raise LookupError(f"its tensor {missing[0]} is not in the file")


def decoded_entries(entries: Mapping[str, Entry], decoded: Mapping[str, Decoded]) -> dict[str, Entry]:
    """The entries with what is computed from them, each where the first tensor that it is computed from stands."""
    after: dict[str, list[str]] = {}
    for key, one in decoded.items():
        after.setdefault(one.recipe.sources[0], []).append(key)
    found: dict[str, Entry] = {}
    for key, entry in entries.items():
        if key not in decoded:
            found[key] = entry
        for name in after.get(key, ()):
            found[name] = decoded[name].entry
    return found


def holds_integers(specs: Mapping[str, Spec]) -> bool:
    """Whether a weight is stored as integers, or in 8-bit floating point: what training starts from is gone then.

    Example:
        >>> holds_integers({"fc.weight": Spec((2, 2), torch.int8), "fc.weight_scale": Spec((2, 1), torch.float32)})
        True
    """
    return any(spec.dtype in _INTEGERS and split_path(key)[1] == "weight" for key, spec in specs.items())


def site_of(kind: str, host: str, index: str = "0") -> str:
    """The site of a quantizer of a module; `index` tells its inputs (or outputs) apart.

    Example:
        >>> site_of("input", "fc"), site_of("input", "add", "1"), site_of("input", "")
        ('input:fc', 'input:add#1', 'input:')
    """
    return f"{kind}:{host}" + ("" if index == "0" else f"#{index}")
