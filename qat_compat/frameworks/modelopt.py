"""NVIDIA ModelOpt: `mtq.quantize`, its `mto.save` files, and Ultralytics' ranges beside a plain module.

What is known here, and what it rests on (nvidia-modelopt 0.47, state_dicts of `mtq.quantize` with its INT8, FP8, INT4,
AWQ, SmoothQuant and NVFP4 configurations):

* Float names stay. A quantizer is a module whose name ends in `_quantizer`: `input_quantizer`, `weight_quantizer`,
  `output_quantizer`, and those of attention (`q_bmm_quantizer`, `k_bmm_quantizer`, `v_bmm_quantizer`).
  Two in a row (W4A8) are `weight_quantizer.0` and `weight_quantizer.1`.
* `_amax` is the largest magnitude, () or one per channel with its axes kept, (C, 1, 1, 1); dynamic quantizers have no
  state.
* `_pre_quant_scale` (AWQ, SmoothQuant) multiplies the input, and the stored weight has been divided by it: it is part
  of what the layer computes, so that dropping it with the quantizer would give a wrong model. It is an entry of its
  own, which nothing takes silently.
* After `mtq.compress` the weight is uint8, and its quantizer has a `_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Role, Spec

__all__ = ["ModelOpt"]

LEAVES: Mapping[str, Role] = {
    "_amax":          Role.AMAX,
    "_global_amax":   Role.AMAX,
    "_bias_value":    Role.ZERO_POINT,
    "_scale":         Role.SCALE,
    "_double_scale":  Role.SCALE,
    "_zeros":         Role.ZERO_POINT,
}  # fmt: skip

_QUANTIZER = re.compile(r"(?:(?P<host>.+)\.)?(?P<kind>[A-Za-z]\w*)_quantizer(?:\.\d+)?\.(?P<leaf>_\w+)$")


class ModelOpt(KeyedFramework):
    """NVIDIA ModelOpt."""

    name = "modelopt"

    def place(self, key: str, spec: Spec) -> Place | None:
        if "_quantizer." not in key or (found := _QUANTIZER.match(key)) is None:
            return None
        role = LEAVES.get(found["leaf"])
        if role is None:
            return None
        quantizer = key[: found.start("leaf") - 1]
        return Place(quantizer, site_of(found["kind"], found["host"] or ""), found["leaf"], role)
