"""Folders that ModelOpt exports for inference (`export_hf_checkpoint`), read to float.

What is known here, and what it rests on (nvidia-modelopt 0.47):

* `config.json` has a `quantization_config` with `quant_method` "modelopt". Float names stay; beside `weight` a layer
  has `weight_scale`, and `input_scale`, `k_scale`, `v_scale` of activations.
* FP8 and INT8 have one element each and one scale per tensor or per row. NVFP4 has two E2M1 values to a byte, E4M3
  scales of 16 neighbours, and `weight_scale_2`, by which these are multiplied in float32. INT4 (AWQ) packs two *rows*
  to a byte, (out / 2, in), the even one in the low nibble, with scales (out, in / group).
* `pre_quant_scale` (in,) multiplies the layer's input (AWQ, SmoothQuant): a float layer has it in its weight. What was
  folded into the normalization before it needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from qat_compat import packing
from qat_compat.frameworks.base import KeyView, plain_entry
from qat_compat.frameworks.key_tables import Decoded, KeyedFramework, Place, decode_each, holds_integers, site_of
from qat_compat.schema import Recipe, Role, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["ModelOptExport"]

_LEAVES: Mapping[str, tuple[str, Role]] = {
    "weight_scale":     ("weight", Role.SCALE),
    "weight_scale_2":   ("weight", Role.SCALE),
    "input_scale":      ("input", Role.SCALE),
    "k_scale":          ("k", Role.SCALE),
    "v_scale":          ("v", Role.SCALE),
    "pre_quant_scale":  ("input", Role.CONSTANT),
}  # fmt: skip
_FP4_BLOCK = 16
Compute = Callable[[Mapping[str, Tensor]], Tensor]


class ModelOptExport(KeyedFramework):
    """What `export_hf_checkpoint` of ModelOpt writes."""

    name = "modelopt"

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED

    def owns_keys(self, view: KeyView) -> bool:
        scaled = [key for key in view.specs if key.endswith(".weight_scale") and _is_quantized(key[:-6], view)]
        return bool(scaled) and (
            view.config.get("quant_method") == "modelopt"
            or any(f"{key}_2" in view.specs or _smoothing(key) in view.specs for key in scaled)
            or any(_has_paired_rows(key[:-6], view) for key in scaled)
        )

    def place(self, key: str, spec: Spec) -> Place | None:
        parent, leaf = split_path(key)
        if leaf not in _LEAVES:
            return None
        kind, role = _LEAVES[leaf]
        return Place(join_path(parent, kind), site_of(kind, parent), leaf, role)

    def decoded(self, view: KeyView) -> Mapping[str, Decoded | str]:
        names = [key for key in view.specs if _is_quantized(key, view)]
        return decode_each(names, view, lambda name: _decode(name, view))


def _is_quantized(key: str, view: KeyView) -> bool:
    return key in view.specs and holds_integers({key: view.specs[key]})


def _smoothing(key: str) -> str:
    return join_path(split_path(key)[0], "pre_quant_scale")


def _has_paired_rows(key: str, view: KeyView) -> bool:
    weight, scale = view.specs[key], view.specs[f"{key}_scale"]
    return weight.dtype is torch.uint8 and len(scale.shape) == 2 and scale.shape[0] == 2 * weight.shape[0]


def _decode(key: str, view: KeyView) -> Decoded | str:
    names = {"weight": key, "scale": f"{key}_scale", "second": f"{key}_scale_2", "smoothing": _smoothing(key)}
    keys = {part: name for part, name in names.items() if name in view.specs}
    specs = {part: view.specs[name] for part, name in keys.items()}
    if "scale" not in specs:
        return f"there is no {key}_scale beside it"
    found = _form(specs)
    if found is None:
        shown = ", ".join(f"{part} {spec}" for part, spec in specs.items())
        return f"its tensors ({shown}) are those of no format that is known of ModelOpt's export"
    shape, how, compute = found
    if "smoothing" in specs:
        if specs["smoothing"].shape != shape[1:]:
            return f"its pre_quant_scale ({specs['smoothing']}) is not one number for each input of {list(shape)}"
        how += ", times pre_quant_scale"
    recipe = Recipe(tuple(keys.values()), how, partial(_computed, tuple(keys), compute))
    return Decoded(plain_entry(key, Spec(shape, torch.float32)), recipe)


def _form(specs: Mapping[str, Spec]) -> tuple[tuple[int, ...], str, Compute] | None:
    """Shape, words and computation of the float weight."""
    weight, scale = specs["weight"], specs["scale"]
    if len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    if weight.dtype is not torch.uint8:
        fits = "second" not in specs and scale.shape in ((), (1,), (rows,), (rows, 1))
        how = f"{str(weight.dtype).removeprefix('torch.')} values times their scale"
        return (weight.shape, how, _from_values) if fits else None
    if "second" in specs:
        blocks = (rows, columns * 2 // _FP4_BLOCK)
        fits = scale.dtype is torch.float8_e4m3fn and scale.shape == blocks and columns * 2 % _FP4_BLOCK == 0
        return ((rows, columns * 2), "NVFP4 values times their two scales", _from_fp4) if fits else None
    fits = len(scale.shape) == 2 and scale.shape[0] == 2 * rows and columns % max(scale.shape[1], 1) == 0
    return ((2 * rows, columns), "int4 values times their scale", _from_pairs) if fits and scale.shape[1] else None


def _computed(parts: tuple[str, ...], compute: Compute, *tensors: Tensor) -> Tensor:
    held = dict(zip(parts, tensors, strict=True))
    value = compute(held)
    return value if "smoothing" not in held else value * held["smoothing"].float()


def _from_values(held: Mapping[str, Tensor]) -> Tensor:
    return packing.dequantize(held["weight"], held["scale"].float())


def _from_fp4(held: Mapping[str, Tensor]) -> Tensor:
    values = packing.unpack_fp4(held["weight"], torch.float32)
    return packing.dequantize(values, held["scale"].float() * held["second"].float())


def _from_pairs(held: Mapping[str, Tensor]) -> Tensor:
    packed = held["weight"].view(torch.int8)
    # shifting left and back keeps the sign of the low nibble
    values = torch.stack([packed << 4 >> 4, packed >> 4], dim=1).flatten(0, 1)
    return packing.dequantize(values, held["scale"].float())
