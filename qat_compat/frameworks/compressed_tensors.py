"""compressed-tensors: what llm-compressor writes and vLLM reads.

What is known here, and what it rests on (compressed-tensors 0.20):

* Float names stay; beside `weight` a layer has `weight_scale` (out, 1), (out, in/group) or (1,), `weight_zero_point`,
  `input_scale` (1,), `input_zero_point`, and likewise for outputs and for the keys and values of attention.
* Before compression `weight` is the master weight, in floating point. Compressed, it is int8 or float8
  (`int-quantized`, `float-quantized`, `naive-quantized`), or gone: `weight_packed` holds it in int32 words
  (`pack-quantized`, 1 to 8 bits) or two E2M1 values to a byte (NVFP4, MXFP4), and `weight_shape` its true shape.
* A float model's own tensor may be called `weight_scale` too; what tells is the `quantization_config` beside the file,
  or the tensor's shape and its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qat_compat.frameworks.base import KeyView
from qat_compat.frameworks.compressed_layers import PARTS, Groups, decode_layer
from qat_compat.frameworks.key_tables import Decoded, KeyedFramework, Place, decode_each, holds_integers, site_of
from qat_compat.schema import Role, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["CompressedTensors"]

KINDS = ("weight", "input", "output", "q", "k", "v")
LEAVES: Mapping[str, tuple[str, Role]] = {f"{k}_{part}": (k, role) for k in KINDS for part, role in PARTS.items()}
_METHOD = "compressed-tensors"  # `quant_method` of the configuration beside the file
_COMPRESSED = ("weight_packed", "weight_scale_inv")


class CompressedTensors(KeyedFramework):
    """compressed-tensors."""

    name = "compressed_tensors"

    def place(self, key: str, spec: Spec) -> Place | None:
        parent, leaf = split_path(key)
        if leaf not in LEAVES:
            return None
        kind, role = LEAVES[leaf]
        return Place(join_path(parent, kind), site_of(kind, parent), leaf.removeprefix(f"{kind}_"), role)

    def consults(self, key: str, spec: Spec) -> bool:
        return key.endswith("_shape") and spec.dtype in (torch.int32, torch.int64) and spec.shape in ((2,), (3,))

    def owns_keys(self, view: KeyView) -> bool:
        if view.config.get("quant_method") == _METHOD and super().owns_keys(view):
            return True
        return any(_tells(key, view) for key in view.specs if key.endswith(("weight_scale", *_COMPRESSED)))

    def stage(self, view: KeyView) -> Stage:
        packed = any(key.endswith(_COMPRESSED) for key in view.specs)
        return Stage.CONVERTED if packed or holds_integers(view.specs) else Stage.PREPARED

    def decoded(self, view: KeyView) -> Mapping[str, Decoded | str]:
        names: list[str] = []
        groups = Groups.of(view.config)
        for key, spec in view.specs.items():
            parent, leaf = split_path(key)
            if leaf == "weight_packed" or (leaf == "weight" and holds_integers({"weight": spec})):
                names.append(join_path(parent, "weight"))
        return decode_each(names, view, lambda name: decode_layer(name, view, groups))


def _tells(key: str, view: KeyView) -> bool:
    """Whether this is a quantizer's scale for the weight beside it, rather than a tensor of the float model's own."""
    parent, leaf = split_path(key)
    spec, weight = view.specs[key], view.specs.get(join_path(parent, "weight"))
    if leaf == "weight_packed":
        return spec.dtype in (torch.int32, torch.uint8)
    if leaf == "weight_scale_inv":
        return weight is not None and holds_integers({"weight": weight})
    if leaf != "weight_scale":
        return False
    if weight is None:
        return join_path(parent, "weight_packed") in view.specs
    rows = weight.shape[0] if weight.shape else 0
    if holds_integers({"weight": weight}):
        return True
    return (
        spec.shape == (1,)
        or (len(spec.shape) == 2 and spec.shape[0] == rows)
        or (join_path(parent, "weight_zero_point") in view.specs)
    )
