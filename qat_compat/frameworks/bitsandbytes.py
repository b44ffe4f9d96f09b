"""bitsandbytes: NF4, FP4 and int8 weights, read to float.

What is known here, and what it rests on (bitsandbytes 0.50; `QuantState.as_dict(packed=True)`, `Linear8bitLt`):

* 4 bits: `weight` holds two codes to a byte, the first in the high nibble, in bytes of whatever dtype they are stored
  in. A value is `quant_map[code] * absmax[block]`, blocks counted over the flattened weight, computed in float32 and
  rounded to the dtype that it had. Which dtype, shape and block size that are is JSON, as bytes in
  `weight.quant_state.bitsandbytes__nf4` (or `__fp4`).
* Nested, `absmax` is itself codes: `nested_quant_map[code] * nested_absmax[block] + nested_offset`.
* 8 bits: `weight` int8 (out, in) and `SCB` (out,), the largest magnitude of each row: `weight * SCB / 127`, where
  `weight_format`, if it is there, is 0; others are of kernels that are gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat_compat.frameworks.base import KeyView, plain_entry
from qat_compat.frameworks.key_tables import Decoded, KeyedFramework, Place, decode_each, site_of
from qat_compat.schema import Recipe, Role, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["BitsAndBytes"]

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MAX_STATE = 4096  # bytes of JSON about one tensor
_PARTS: Mapping[str, Role] = {
    "absmax":            Role.SCALE,
    "quant_map":         Role.CONSTANT,
    "nested_absmax":     Role.SCALE,
    "nested_quant_map":  Role.CONSTANT,
}  # fmt: skip
_ROWS: Mapping[str, Role] = {"SCB": Role.SCALE, "weight_format": Role.CONSTANT}
_PER_LEVEL = 7.874015718698502e-3  # 1 / 127, as the package writes it


class BitsAndBytes(KeyedFramework):
    """bitsandbytes."""

    name = "bitsandbytes"

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED

    def consults(self, key: str, spec: Spec) -> bool:
        return _STATE in key and spec.dtype is torch.uint8 and len(spec.shape) == 1 and spec.shape[0] <= _MAX_STATE

    def owns_keys(self, view: KeyView) -> bool:
        return any(
            _STATE in key or key.endswith(".weight.absmax") or (split_path(key)[1] == "SCB" and _rows(key, view))
            for key in view.specs
        )

    def place(self, key: str, spec: Spec) -> Place | None:
        parent, leaf = split_path(key)
        if leaf in _ROWS:
            return Place(parent, site_of("weight", parent), leaf, _ROWS[leaf])
        name = key.partition(_STATE)[0] if _STATE in key else parent
        if name == key or not (_STATE in key or leaf in _PARTS):
            return None
        host, parameter = split_path(name)
        return Place(name, site_of(parameter, host), leaf, _PARTS.get(leaf, Role.CONSTANT))

    def decoded(self, view: KeyView) -> Mapping[str, Decoded | str]:
        scales: dict[str, str] = {}  # weight -> key of its scales
        for key in view.specs:
            if key.endswith(".absmax"):
                scales[split_path(key)[0]] = key
            elif split_path(key)[1] == "SCB" and (weight := _rows(key, view)):
                scales[weight] = key

        def decode(name: str) -> Decoded | str:
            by_row = split_path(scales[name])[1] == "SCB"
            return _decode_rows(name, scales[name], view) if by_row else _decode_codes(name, view)

        return decode_each(scales, view, decode)


def _rows(key: str, view: KeyView) -> str:
    """The int8 weight beside an `SCB`, or ""."""
    weight = join_path(split_path(key)[0], "weight")
    return weight if weight in view.specs and view.specs[weight].dtype is torch.int8 else ""


def _decode_rows(weight: str, scale: str, view: KeyView) -> Decoded | str:
    shape = view.specs[weight].shape
    if len(shape) != 2 or view.specs[scale].shape != shape[:1]:
        return f"its SCB ({view.specs[scale]}) is not one number for each row of {list(shape)}"
    layout = join_path(split_path(weight)[0], "weight_format")
    sources = (weight, scale, *([layout] if layout in view.specs else []))
    recipe = Recipe(sources, "int8 values times the magnitude of their row", _from_rows)
    return Decoded(plain_entry(weight, Spec(shape, torch.float32)), recipe)


def _from_rows(values: Tensor, magnitude: Tensor, layout: Tensor | None = None) -> Tensor:
    if layout is not None and int(layout) != 0:
        raise ValueError(f"weight_format is {int(layout)}: the rows are laid out for a kernel")
    return values * magnitude.float().unsqueeze(1) * _PER_LEVEL


def _decode_codes(name: str, view: KeyView) -> Decoded | str:
    said = next((view.numbers[key] for kind in _KINDS if (key := f"{name}{_STATE}{kind}") in view.numbers), None)
    state = _state(said) if said is not None else None
    parts = {part: f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in view.specs}
    if state is None or name not in view.specs or "quant_map" not in parts:
        return "its quant_state, which says its shape, or its quant_map is missing or malformed"
    shape, dtype, block = state["shape"], state["dtype"], state["blocksize"]
    count, packed = torch.Size(shape).numel(), view.specs[name]
    if torch.Size(packed.shape).numel() * packed.dtype.itemsize != -(-count // 2):
        return f"its bytes ({packed}) are not two to each of {shape} values"
    if torch.Size(view.specs[parts["absmax"]].shape).numel() != -(-count // block):
        return f"its absmax ({view.specs[parts['absmax']]}) is not one number for each {block} of {shape} values"
    nested = "nested_absmax" in parts
    if nested and not ("nested_quant_map" in parts and "nested_offset" in state):
        return "its absmax is of codes whose nested_quant_map or nested_offset is missing"
    compute = partial(_from_codes, state, ("weight", *parts))
    how = f"{state['quant_type']} codes times the magnitude of their block"
    return Decoded(plain_entry(name, Spec(tuple(shape), dtype)), Recipe((name, *parts.values()), how, compute))


def _state(said: tuple[int, ...]) -> dict[str, Any] | None:
    """The JSON that is in these bytes, with its dtype; None where it does not say what is needed."""
    try:
        found = json.loads(bytes(said).decode())
        dtype = getattr(torch, found["dtype"])
        if not isinstance(dtype, torch.dtype):
            return None
        shape = [int(size) for size in found["shape"]]
        return {
            **found,
            "dtype": dtype,
            "shape": shape,
            "blocksize": int(found["blocksize"]),
            "quant_type": found["quant_type"],
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _from_codes(state: Mapping[str, Any], parts: tuple[str, ...], *tensors: Tensor) -> Tensor:
    held = dict(zip(parts, tensors, strict=True))
    magnitude = held["absmax"]
    if "nested_absmax" in held:
        values = held["nested_quant_map"][magnitude.int()]
        magnitude = values * _spread(held["nested_absmax"], int(state["nested_blocksize"]), len(values))
        magnitude = magnitude + state["nested_offset"]
    packed = held["weight"].contiguous().view(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten()
    count = torch.Size(state["shape"]).numel()
    value = held["quant_map"][codes[:count].int()]
    value *= _spread(magnitude.float(), state["blocksize"], count)
    return value.reshape(state["shape"]).to(state["dtype"])


def _spread(scale: Tensor, block: int, count: int) -> Tensor:
    return scale.repeat_interleave(block)[:count]
