"""AIMET (`QuantizationSimModel`).

What is known here, and what it rests on (aimet-torch 2.42; `_module_to_wrap` is that of its 1.x wrappers):

* Float names stay. Quantizers are `<m>.param_quantizers.<parameter>` and `<m>.input_quantizers.<n>`,
  `<m>.output_quantizers.<n>`; each has `min` and `max`, Parameters of shape () or one per channel with its axes kept.
* Which of them have been calibrated is in each quantizer's `_extra_state`, a dict of tensors.
* scale = (max - min) / (qmax - qmin).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qat_compat.frameworks.base import KeyView
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Role, Spec

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


class AIMET(KeyedFramework):
    """AIMET."""

    name = "aimet"

    def place(self, key: str, spec: Spec) -> Place | None:
        if "_quantizers." not in key or (found := _QUANTIZER.match(key)) is None:
            return None
        host, which = found["host"] or "", found["which"]
        site = site_of(which, host) if found["kind"] == "param" else site_of(found["kind"], host, which)
        return Place(key[: found.start("leaf") - 1], site, found["leaf"], LEAVES[found["leaf"]])

    def float_site(self, key: str, view: KeyView) -> str:
        return key.replace(_WRAPPED, "")
