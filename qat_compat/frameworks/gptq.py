"""GPTQ and AWQ: linear layers of 2, 4 or 8 bits as `qweight`, `qzeros`, `scales`, read to float.

What is known here, and what it rests on (AutoGPTQ and GPTQModel, AutoAWQ; `quantization_config` of transformers):

* Both hold unsigned values in int32 words, from the lowest bit up, and compute `(q - zero) * scale` in the dtype of the
  scales (groups, out), where the float weight is (out, in).
* GPTQ packs `qweight` (in * bits / 32, out) along the inputs, and `qzeros` (groups, out * bits / 32) along the outputs.
  `g_idx` (in,) is the group of each input. Each zero point is stored less 1, unless `checkpoint_format` is `gptq_v2`:
  without the configuration a file does not tell.
* AWQ packs both along the outputs, `qweight` (in, out / 8), 4 bits each, and of every eight outputs in the order 0, 2,
  4, 6, 1, 3, 5, 7. It has no `g_idx`: groups are neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qat_compat import packing
from qat_compat.frameworks.base import KeyView, plain_entry
from qat_compat.frameworks.key_tables import Decoded, KeyedFramework, Place, decode_each, site_of
from qat_compat.schema import Recipe, Role, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["GPTQ"]

_PARTS: Mapping[str, Role] = {
    "qweight":  Role.PACKED,
    "qzeros":   Role.PACKED,
    "scales":   Role.SCALE,
    "g_idx":    Role.CONSTANT,
}  # fmt: skip
_BITS = (2, 4, 8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_V2 = "gptq_v2"


class GPTQ(KeyedFramework):
    """GPTQ and AWQ."""

    name = "gptq"

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED

    def owns_keys(self, view: KeyView) -> bool:
        return any(
            spec.dtype is torch.int32 and split_path(key)[1] == "qweight" and _parts(split_path(key)[0], view)
            for key, spec in view.specs.items()
        )

    def place(self, key: str, spec: Spec) -> Place | None:
        host, leaf = split_path(key)
        return Place(host, site_of("weight", host), leaf, _PARTS[leaf]) if leaf in _PARTS else None

    def decoded(self, view: KeyView) -> Mapping[str, Decoded | str]:
        hosts = {join_path(split_path(key)[0], "weight"): split_path(key)[0] for key in view.specs if _is_words(key)}
        return decode_each(hosts, view, lambda name: _decode(hosts[name], view))


def _is_words(key: str) -> bool:
    return split_path(key)[1] == "qweight"


def _parts(host: str, view: KeyView) -> dict[str, str]:
    """Part -> key; empty where one of those is missing that both formats have."""
    found = {part: join_path(host, part) for part in _PARTS if join_path(host, part) in view.specs}
    return found if {"qweight", "qzeros", "scales"} <= found.keys() else {}


def _decode(host: str, view: KeyView) -> Decoded | str:
    parts = _parts(host, view)
    if not parts:
        return "qzeros or scales are missing beside its qweight"
    specs = {part: view.specs[key] for part, key in parts.items()}
    if any(len(specs[part].shape) != 2 for part in ("qweight", "qzeros", "scales")):
        return f"its words ({specs['qweight']}) are those of no linear layer"
    form = _awq(specs) or _gptq(specs, view)
    if form is not None and form.needs_config and view.config.get("quant_method") != "gptq":
        return "whether its zero points are stored less 1, only the config.json says that belongs beside a GPTQ file"
    if form is None:
        return f"its words ({specs['qweight']}) and scales ({specs['scales']}) are neither GPTQ of 2, 4, 8 bits nor AWQ"

    def compute(*tensors: Tensor) -> Tensor:
        return form.compute(dict(zip(parts, tensors, strict=True)))

    entry = plain_entry(join_path(host, "weight"), Spec((specs["scales"].shape[1], form.inputs), specs["scales"].dtype))
    return Decoded(entry, Recipe(tuple(parts.values()), form.how, compute))


class _Form(NamedTuple):
    inputs: int
    how: str
    compute: partial[Tensor]
    needs_config: bool = False


def _awq(specs: Mapping[str, Spec]) -> _Form | None:
    (inputs, words), (groups, outputs) = specs["qweight"].shape, specs["scales"].shape
    fits = words * 8 == outputs and specs["qzeros"].shape == (groups, words) and groups and inputs % groups == 0
    return _Form(inputs, "AWQ values times their scale", partial(_from_awq)) if fits and "g_idx" not in specs else None


def _gptq(specs: Mapping[str, Spec], view: KeyView) -> _Form | None:
    (words, outputs), (groups, columns) = specs["qweight"].shape, specs["scales"].shape
    zeros = specs["qzeros"].shape
    said = view.config.get("bits")
    if "g_idx" in specs and specs["g_idx"].shape[0]:
        bits = words * 32 // specs["g_idx"].shape[0]
    else:
        bits = said if isinstance(said, int) else zeros[1] * 32 // max(outputs, 1)
    if bits not in _BITS or outputs != columns or zeros != (groups, packing.packed_size(outputs, bits)):
        return None
    inputs = words * 32 // bits
    less = 0 if view.config.get("checkpoint_format") == _V2 else 1
    if ("g_idx" not in specs and inputs % max(groups, 1)) or said not in (None, bits):
        return None
    return _Form(
        inputs, f"GPTQ values of {bits} bits times their scale", partial(_from_gptq, bits=bits, less=less), True
    )


def _from_gptq(held: Mapping[str, Tensor], *, bits: int, less: int) -> Tensor:
    scale = held["scales"].t()
    # unpacking takes half the range off both, which the difference does not see
    values = packing.unpack(held["qweight"].t(), bits, held["qweight"].shape[0] * 32 // bits)
    zeros = packing.unpack(held["qzeros"], bits, scale.shape[0]).t().to(torch.int16) + less
    if "g_idx" in held:
        groups = held["g_idx"].long()
        scale, zeros = scale[:, groups], zeros[:, groups]
    return packing.dequantize(values, scale, zeros)


def _from_awq(held: Mapping[str, Tensor]) -> Tensor:
    scale = held["scales"].t()
    values, zeros = (_in_order(packing.unpack(held[part], 4, scale.shape[0])).t() for part in ("qweight", "qzeros"))
    return packing.dequantize(values, scale, zeros)


def _in_order(values: Tensor) -> Tensor:
    """The place of each output among the eight of its word."""
    places = torch.tensor([_AWQ_ORDER.index(output) for output in range(8)], device=values.device)
    return values.unflatten(-1, (-1, 8))[..., places].flatten(-2)  # type: ignore[no-untyped-call, no-any-return]
