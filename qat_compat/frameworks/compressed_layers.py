"""One compressed weight of compressed-tensors: what its tensors say, and what they compute to.

What is known here, and what it rests on (compressed-tensors 0.20):

* Decompressed, it is `(q - zero_point) * scale`, computed in the dtype of the scale. The zero points of packed weights
  are packed themselves, along the rows. NVFP4 divides its scales by `weight_global_scale`; scales of MXFP4 and MXFP8
  are the exponents of powers of two; these three decompress to bfloat16.
* `weight_g_idx` (in,) is the group of each column, where columns were reordered; -1 where they were not.
* `weight_scale_inv` is the same as `weight_scale`, for blocks of a float8 weight; 128 x 128 where neither
  `weight_block_size` nor `block_structure` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat_compat import packing
from qat_compat.frameworks.base import KeyView, plain_entry
from qat_compat.frameworks.key_tables import Decoded
from qat_compat.schema import Integers, Recipe, Role, Rounding, Spec
from qat_compat.state import join_path, split_path

__all__ = ["PARTS", "Groups", "decode_layer"]

PARTS: Mapping[str, Role] = {
    "scale":         Role.SCALE,
    "scale_inv":     Role.SCALE,
    "global_scale":  Role.SCALE,
    "zero_point":    Role.ZERO_POINT,
    "g_idx":         Role.CONSTANT,
    "packed":        Role.PACKED,
    "shape":         Role.PACKED,
}  # fmt: skip
_BLOCK = (128, 128)


@dataclass(frozen=True)
class _Layer:
    """One compressed weight.

    Args:
        name: Its name in the float model.
        keys: Part -> key; the part of the values themselves is "weight" or "packed".
        specs: Part -> spec.
        schemes: What the configuration says of the weights of the layers that this may be one of.
        shape: What `weight_shape` says, where there is one.
        inputs: What becomes of the layer's inputs, in the words of :class:`Rounding`.
    """

    name: str
    keys: Mapping[str, str]
    specs: Mapping[str, Spec]
    schemes: tuple[Mapping[str, Any], ...]
    shape: tuple[int, ...] | None
    inputs: str

    @property
    def has_rows(self) -> bool:
        """Whether it is a matrix with scales along its rows."""
        values = self.specs.get("packed", self.specs.get("weight"))
        return values is not None and len(values.shape) == 2 and "scale" in self.specs

    def said(self, what: str) -> list[Any]:
        """What the schemes say of one thing, each answer once."""
        found: list[Any] = []
        for scheme in self.schemes:
            if scheme.get(what) is not None and scheme[what] not in found:
                found.append(scheme[what])
        return found


@dataclass(frozen=True)
class Groups:
    """The `config_groups` of a configuration: all of them, and by the layers that they name."""

    all: tuple[Mapping[str, Any], ...]
    by_name: Mapping[str, list[Mapping[str, Any]]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Groups:
        groups = config.get("config_groups")
        found = [one for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []
        by_name: dict[str, list[Mapping[str, Any]]] = {}
        for group in found:
            for target in group.get("targets") or ():
                by_name.setdefault(str(target), []).append(group)
        return cls(tuple(found), by_name)

    def of_layer(self, module: str) -> Sequence[Mapping[str, Any]]:
        """Those that name it; else all, since a class cannot be told from a key."""
        return self.by_name.get(module) or self.all


def _layer(name: str, view: KeyView, known: Groups) -> _Layer:
    keys = {part: f"{name}_{part}" for part in PARTS if f"{name}_{part}" in view.specs}
    if "packed" not in keys:
        keys = {"weight": name, **keys}
    specs = {part: view.specs[key] for part, key in keys.items()}
    groups = known.of_layer(split_path(name)[0])
    schemes = [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]
    if isinstance(view.config.get("weight_block_size"), list):  # the "fp8" method of transformers
        schemes.append({"block_structure": view.config["weight_block_size"]})
    static = join_path(split_path(name)[0], "input_scale") in view.specs
    inputs = {"static"} if static else {_inputs(group.get("input_activations")) for group in groups} or {""}
    return _Layer(
        name, keys, specs, tuple(schemes), view.numbers.get(f"{name}_shape"), inputs.pop() if len(inputs) == 1 else "?"
    )


def _inputs(args: Any) -> str:
    if not isinstance(args, Mapping):
        return ""
    known = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    if all(args.get(name) == value for name, value in known.items()):
        return "symmetric" if args.get("symmetric", True) else "asymmetric"
    return "otherwise quantized"


def decode_layer(name: str, view: KeyView, known: Groups) -> Decoded | str:
    """The float weight of one layer, or why it cannot be computed."""
    layer = _layer(name, view, known)
    scale = layer.specs.get("scale", layer.specs.get("scale_inv"))
    if scale is None:
        return f"there is no {layer.name}_scale beside it"
    values = layer.specs.get("packed", layer.specs.get("weight"))
    assert values is not None
    if values.dtype is torch.int32:
        return _decode_words(layer, values, scale)
    if values.dtype is torch.uint8:
        return _decode_fp4(layer, values, scale)
    return _decode_values(layer, values, scale)


def _decode_values(layer: _Layer, values: Spec, scale: Spec) -> Decoded | str:
    """One element each: int8 or float8."""
    block = _block(layer, values.shape, scale.shape)
    if isinstance(block, str):
        return block
    exponents = scale.dtype is torch.uint8
    how = f"{str(values.dtype).removeprefix('torch.')} values times their scale"
    compute = partial(_from_values, block=block, exponents=exponents)
    decoded = _recipe(layer, values.shape, torch.bfloat16 if exponents else scale.dtype, how, compute)
    if values.dtype is not torch.int8 or block is not None or not layer.has_rows:
        return decoded
    return decoded._replace(grid=_grid(layer, 8, decoded, lambda held: held["weight"]))


def _decode_words(layer: _Layer, words: Spec, scale: Spec) -> Decoded | str:
    """Signed integers in int32 words."""
    if layer.shape is None:
        return f"there is no {layer.name}_shape beside it, which says how many values are packed"
    fitting = {bits for bits in range(1, 9) if packing.packed_size(layer.shape[-1], bits) == words.shape[-1]}
    said = {bits for bits in layer.said("num_bits") if bits in fitting} or fitting
    if len(said) != 1:
        return f"its {words.shape[-1]} words of {layer.shape[-1]} values do not tell of how many bits these are"
    if layer.shape[:-1] != words.shape[:-1]:
        return f"its {words} words are not those of the shape {list(layer.shape)} that stands beside them"
    block = _block(layer, layer.shape, scale.shape) if "g_idx" not in layer.keys else None
    if isinstance(block, str):
        return block
    bits: int = said.pop()
    compute = partial(_from_words, bits=bits, block=block)
    decoded = _recipe(layer, layer.shape, scale.dtype, f"{bits}-bit values times their scale", compute)
    if block is not None or "g_idx" in layer.keys or not layer.has_rows:
        return decoded
    columns = layer.shape[-1]
    return decoded._replace(
        grid=_grid(layer, bits, decoded, lambda held: packing.unpack(held["packed"], bits, columns))
    )


def _decode_fp4(layer: _Layer, pairs: Spec, scale: Spec) -> Decoded | str:
    """Two E2M1 values to a byte."""
    shape = (*pairs.shape[:-1], pairs.shape[-1] * 2)
    group = shape[-1] // scale.shape[-1] if scale.shape else 0
    exponents = scale.dtype is torch.uint8
    if scale.shape[:-1] != shape[:-1] or group != (32 if exponents else 16) or group * scale.shape[-1] != shape[-1]:
        return f"its bytes ({pairs}) and scales ({scale}) are neither NVFP4 nor MXFP4"
    how = "MXFP4 values times powers of two" if exponents else "NVFP4 values times their scale"
    return _recipe(layer, shape, torch.bfloat16, how, partial(_from_fp4, exponents=exponents))


def _block(layer: _Layer, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | str | None:
    """Rows and columns that share a scale, where the shapes alone do not tell; or why they do not fit."""
    rows, columns = shape[-2:] if len(shape) > 1 else (shape[0], 1)
    if len(scale) < 2 or scale[-2] == rows:
        divides = len(scale) < 2 or columns % scale[-1] == 0
        fits = divides if len(scale) != 1 else scale[0] in (1, rows)
        return None if fits else f"its {list(scale)} scales do not divide its {list(shape)} values"
    blocks = [tuple(block) for block in layer.said("block_structure") if len(block) == 2] or [_BLOCK]
    for block in blocks:
        if scale[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
            return int(block[0]), int(block[1])
    if scale[-2:] == (1, 1):
        return None
    return (
        f"its {list(scale)} scales are not those of blocks of {blocks[0][0]} x {blocks[0][1]} in {list(shape)} values"
    )


def _recipe(layer: _Layer, shape: tuple[int, ...], dtype: torch.dtype, how: str, compute: Any) -> Decoded:
    parts = tuple(layer.keys)

    def run(*tensors: Tensor) -> Tensor:
        value: Tensor = compute(dict(zip(parts, tensors, strict=True)))
        return value

    return Decoded(plain_entry(layer.name, Spec(shape, dtype)), Recipe(tuple(layer.keys.values()), how, run))


def _grid(layer: _Layer, bits: int, decoded: Decoded, values: Callable[[Mapping[str, Tensor]], Tensor]) -> Rounding:
    rows, columns = decoded.entry.shape
    scale = layer.specs["scale"]
    groups = scale.shape[-1] if len(scale.shape) > 1 else 1

    def integers(*tensors: Tensor) -> Integers:
        held = dict(zip(layer.keys, tensors, strict=True))
        found = values(held)
        zero = _zero_point(held, bits, rows)
        return Integers(found, _by_row(held["scale"], rows), None if zero is None else _by_row(zero, rows))

    symmetric = True if "zero_point" not in layer.keys else None
    return Rounding(bits, columns // groups, scale.dtype, layer.inputs, symmetric, decoded.recipe.sources, integers)


def _by_row(scale: Tensor, rows: int) -> Tensor:
    return scale.reshape(1, 1).expand(rows, 1) if scale.numel() == 1 else scale.reshape(rows, -1)


def _zero_point(held: Mapping[str, Tensor], bits: int, rows: int) -> Tensor | None:
    """One for each scale; those of packed values are packed themselves, along the rows."""
    zero = held.get("zero_point")
    if zero is not None and "packed" in held and zero.dtype is torch.int32:
        return packing.unpack(zero.transpose(-2, -1), bits, rows).transpose(-2, -1)
    return zero


# --- what they compute to ---------------------------------------------------------------------------------------------


def _scale(held: Mapping[str, Tensor], exponents: bool = False) -> Tensor:
    scale = held["scale"] if "scale" in held else held["scale_inv"]
    return packing.power_of_two(scale) if exponents else scale


def _from_values(held: Mapping[str, Tensor], *, block: tuple[int, int] | None, exponents: bool) -> Tensor:
    return packing.dequantize(held["weight"], _scale(held, exponents), held.get("zero_point"), block)


def _from_words(held: Mapping[str, Tensor], *, bits: int, block: tuple[int, int] | None) -> Tensor:
    rows, columns = held["shape"].tolist()[-2:]
    values, scale, zero = packing.unpack(held["packed"], bits, columns), _scale(held), _zero_point(held, bits, rows)
    groups = held.get("g_idx")
    if groups is not None and bool((groups >= 0).all()):
        of = groups.long()
        scale, zero = scale[..., of], zero[..., of] if zero is not None else None
    return packing.dequantize(values, scale, zero, block)


def _from_fp4(held: Mapping[str, Tensor], *, exponents: bool) -> Tensor:
    values = packing.unpack_fp4(held["packed"] if "packed" in held else held["weight"], torch.bfloat16)
    scale = _scale(held, exponents).to(torch.bfloat16)
    if "global_scale" in held:
        scale = scale / held["global_scale"]
    return packing.dequantize(values, scale, held.get("zero_point")).to(torch.bfloat16)
