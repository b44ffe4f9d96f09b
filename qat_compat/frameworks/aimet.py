"""AIMET (`QuantizationSimModel`).

What is known here, and what it rests on (aimet-torch 2.42; `_module_to_wrap` is that of its 1.x wrappers):

* Float names stay. Quantizers are `<m>.param_quantizers.<parameter>` and `<m>.input_quantizers.<n>`,
  `<m>.output_quantizers.<n>`; each has `min` and `max`, Parameters of shape () or one per channel with its axes kept.
* Which of them have been calibrated is in each quantizer's `_extra_state`, a dict of tensors.
* scale = (max - min) / (qmax - qmin).
* An export has plain weights, and its encodings as JSON beside them (:mod:`qat_compat.frameworks.aimet_encodings`).
  Each is taken for a quantizer as the model had it, with two tensors that no state_dict of AIMET has; one of which
  only ONNX's name is known has a site of its own, and one that is no encoding of integers is named in a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch

from qat_compat.conventions import Grid
from qat_compat.encodings import Encoded
from qat_compat.frameworks.aimet_encodings import Numbers, Tensor, grid_of, named, numbers
from qat_compat.frameworks.base import Beside, KeyView
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Role, Spec
from qat_compat.state import split_path
from qat_compat.text import shorten

__all__ = ["AIMET"]

LEAVES: Mapping[str, Role] = {
    "min":     Role.MIN,
    "max":     Role.MAX,
    "scale":   Role.SCALE,
    "offset":  Role.ZERO_POINT,
}  # fmt: skip

_QUANTIZER = re.compile(
    r"(?:(?P<host>.+)\.)?(?P<kind>param|input|output)_quantizers\.(?P<which>\w+)\.(?P<leaf>min|max|scale|offset)$"
)
_WRAPPED = "_module_to_wrap."
_JSON = "aimet_encodings"  # what lies beside the weights, and in a record of ours the grid of each quantizer
_ENCODED: Mapping[str, Role] = {"aimet_encoding.scale": Role.SCALE, "aimet_encoding.offset": Role.ZERO_POINT}


class AIMET(KeyedFramework):
    """AIMET."""

    name = "aimet"

    def place(self, key: str, spec: Spec) -> Place | None:
        if (leaf := next((leaf for leaf in _ENCODED if key.endswith(f".{leaf}")), None)) is not None:
            quantizer = key.removesuffix(f".{leaf}")
            inside = _QUANTIZER.match(f"{quantizer}.scale")
            return Place(quantizer, _site(inside) if inside else f"graph:{quantizer}", leaf, _ENCODED[leaf])
        if "_quantizers." not in key or (found := _QUANTIZER.match(key)) is None:
            return None
        return Place(key[: found.start("leaf") - 1], _site(found), found["leaf"], LEAVES[found["leaf"]])

    def float_site(self, key: str, view: KeyView) -> str:
        return key.replace(_WRAPPED, "")

    def beside(self, view: KeyView) -> Beside | None:
        data = view.metadata.get(_JSON)
        if not isinstance(data, Mapping) or _JSON in view.record:
            return None
        hidden: dict[str, torch.Tensor] = {}
        grids: dict[str, list[int]] = {}
        unread: dict[str, str] = {}
        for tensor in named(data):
            found = numbers(tensor.raw)
            quantizer = _quantizer_of(tensor, view)
            if isinstance(found, str):
                unread[tensor.name] = found
            elif found is not None and not any(f"{quantizer}.{leaf}" in view.specs for leaf in LEAVES):
                grid, affine = grid_of(found)
                grids[quantizer] = [grid.bits, int(grid.signed), int(grid.narrow)]
                hidden |= _tensors(quantizer, found, affine)
        sites = {key: place.site for key, value in hidden.items() if (place := self.place(key, _spec(value)))}
        note = f"of {data.get('file')}, {len(unread)} encodings are not read: "
        shown = "; ".join(shorten([f"{name} ({why})" for name, why in unread.items()], 6))
        return Beside({"hidden": hidden, "sites": sites, _JSON: grids}, (note + shown,) if unread else ())

    def encodings(self, view: KeyView) -> Iterable[Encoded]:
        grids = view.record.get(_JSON)
        for quantizer, (bits, signed, narrow) in grids.items() if isinstance(grids, Mapping) else ():
            keys = [key for leaf in _ENCODED if (key := f"{quantizer}.{leaf}") in view.specs]
            place = self.place(keys[0], view.specs[keys[0]]) if keys else None
            if place is not None:
                names = ("scale", "offset")[: len(keys)]
                grid = Grid(int(bits), bool(signed), bool(narrow))
                convention = "aimet.affine" if len(keys) > 1 else "aimet.symmetric"
                yield Encoded(
                    quantizer, place.site, convention, keys, partial(_by_name, names), view.specs[keys[0]], grid
                )


def _site(found: re.Match[str]) -> str:
    host, which = found["host"] or "", found["which"]
    return site_of(which, host) if found["kind"] == "param" else site_of(found["kind"], host, which)


def _quantizer_of(tensor: Tensor, view: KeyView) -> str:
    """The name that AIMET gives the quantizer of a tensor, or the tensor's own where nothing tells of which module."""
    if tensor.kind in ("input", "output"):
        return f"{tensor.name}.{tensor.kind}_quantizers.{tensor.port}"
    if tensor.kind == "graph" or tensor.name not in view.specs:
        return tensor.name
    host, parameter = split_path(tensor.name)
    return f"{host}.param_quantizers.{parameter}".lstrip(".")


def _tensors(quantizer: str, found: Numbers, affine: bool) -> dict[str, torch.Tensor]:
    scale = torch.tensor(found.scale, dtype=torch.float32, device="cpu")
    offset = torch.tensor(found.offset, dtype=torch.int32, device="cpu")
    held = dict(zip(_ENCODED, (scale, offset) if affine else (scale,), strict=False))
    # one number is one for the whole tensor: a list of one says no more than that
    return {f"{quantizer}.{leaf}": value if len(value) > 1 else value[0] for leaf, value in held.items()}


def _by_name(names: tuple[str, ...], *tensors: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return dict(zip(names, tensors, strict=True))


def _spec(value: torch.Tensor) -> Spec:
    return Spec(tuple(value.shape), value.dtype)
