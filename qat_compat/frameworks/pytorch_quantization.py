"""NVIDIA pytorch-quantization, which Super-Gradients' QAT builds on.

What is known here, and what it rests on (pytorch-quantization 2.1 and 2.2, checkpoints of super-gradients 3.7.1):

* Float names stay. Quantizers are `_input_quantizer`, `_weight_quantizer`, `_aftergemm_quantizer` and others that end
  in `_quantizer`, with a leading underscore; that is what tells them from ModelOpt's.
* `_amax` is the largest magnitude: () for an input, (C, 1, 1, 1) or (C, 1) for a weight.
* With `learn_amax` a quantizer has `clip.clip_value_min` and `clip.clip_value_max` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from qat_compat.encodings import Encoded, as_amax
from qat_compat.frameworks.base import KeyView
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Role, Spec

__all__ = ["PytorchQuantization"]

LEAVES: Mapping[str, Role] = {
    "_amax":                Role.AMAX,
    "_scale":               Role.SCALE,
    "clip.clip_value_min":  Role.MIN,
    "clip.clip_value_max":  Role.MAX,
}  # fmt: skip

_QUANTIZER = re.compile(r"(?:(?P<host>.+)\.)?_(?P<kind>[A-Za-z]\w*)_quantizer\.(?P<leaf>_amax|_scale|clip\.\w+)$")


class PytorchQuantization(KeyedFramework):
    """NVIDIA pytorch-quantization."""

    name = "pytorch_quantization"

    def encodings(self, view: KeyView) -> Iterable[Encoded]:
        """The largest magnitude; the number of bits is in no file."""
        for key, spec in view.specs.items():
            place = self.place(key, spec)
            if place is not None and place.role is Role.AMAX:
                yield Encoded(place.quantizer, place.site, "modelopt.int", [key], as_amax, spec, None)

    def place(self, key: str, spec: Spec) -> Place | None:
        if "_quantizer." not in key or (found := _QUANTIZER.match(key)) is None:
            return None
        role = LEAVES.get(found["leaf"])
        if role is None:
            return None
        quantizer = key[: found.start("leaf") - 1]
        return Place(quantizer, site_of(found["kind"], found["host"] or ""), found["leaf"], role)
