"""Brevitas.

What is known here, and what it rests on (brevitas 0.13.4):

* Float names stay. Quantizers are `weight_quant` and `bias_quant`, `input_quant` and `output_quant` of a layer, and
  `act_quant` of an activation (`QuantReLU`, `QuantIdentity`), whose module is the tensor that it quantizes.
* A weight quantizer has state only with parameter scaling: `weight_quant.tensor_quant.scaling_impl.value`.
  That of an activation is below `fused_activation_quant_proxy`.
* `scaling_impl.value` is a *threshold*, not a scale: a weight's scale is value / 127, a signed activation's
  value / 128, an unsigned one's value / 255. Older files say `learned_value`.
* A bit width that is learnt, and the running statistics of a scale (`buffer`), are settings of the quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Role, Spec

__all__ = ["Brevitas"]

KINDS: Mapping[str, str] = {
    "weight_quant":  "weight",
    "bias_quant":    "bias",
    "input_quant":   "input",
    "output_quant":  "output",
    "act_quant":     "output",
}  # fmt: skip

# last two parts of a key -> role; the rest of a quantizer's state is its own business
LEAVES: Mapping[str, Role] = {
    "scaling_impl.value":             Role.AMAX,
    "scaling_impl.learned_value":     Role.AMAX,
    "scaling_impl.buffer":            Role.AMAX,
    "zero_point_impl.value":          Role.ZERO_POINT,
    "zero_point_impl.learned_value":  Role.ZERO_POINT,
}  # fmt: skip

_QUANTIZER = re.compile(
    r"(?:(?P<host>.+?)\.)?(?P<kind>weight_quant|bias_quant|input_quant|output_quant|act_quant)"
    r"\.(?P<leaf>(?:fused_activation_quant_proxy\.)?(?:tensor_quant|export_handler|activation_impl)\..+)$"
)


class Brevitas(KeyedFramework):
    """Brevitas."""

    name = "brevitas"

    def place(self, key: str, spec: Spec) -> Place | None:
        if "_quant." not in key or (found := _QUANTIZER.match(key)) is None:
            return None
        role = LEAVES.get(".".join(key.rsplit(".", 2)[1:]), Role.CONSTANT)
        quantizer = key[: found.start("leaf") - 1]
        return Place(quantizer, site_of(KINDS[found["kind"]], found["host"] or ""), found["leaf"], role)
