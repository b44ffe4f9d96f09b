"""Converted models: integers where the weights were. They are told apart here so that none is taken for float.

What is known here, and what it rests on (torch 2.13, torchao 0.18):

* torch.ao eager and FX: `weight` of a quantized dtype, `scale` and `zero_point` of the output beside it; a linear
  layer packs its weight and bias into `_packed_params._packed_params`, which reads as `.0` and `.1`.
* PT2E: `_frozen_param0` int8 with `_scale_0` and `_zero_point_0`, beside the float originals.
* torchao: the inner tensors of a tensor subclass, by the names of its own flat form: `_weight_qdata`, `_weight_scale`.
  In memory the tensor itself is the subclass, which has a list of these names as `tensor_data_names`.
* GPTQ and AWQ: `qweight`, `qzeros`, `scales`. bitsandbytes: `weight.absmax` and `weight.quant_map`, or `SCB`.
"""

from __future__ import annotations

import re

import torch

from qat_compat.frameworks.base import KeyView, ModelView
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Role, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["Converted", "ConvertedPT2E", "ConvertedTorchAO"]

_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
_PACKED_PARAMS = re.compile(r"(?:(?P<host>.+?)\.)?_packed_params(?:\.\w+)*$")
_FROZEN = re.compile(r"(?:.+\.)?_frozen_param\d+$")
_CONSTANT = re.compile(r"(?:.+\.)?_(?:scale|zero_point)_\d+$")
_INNER = re.compile(
    r"(?:(?P<host>.+)\.)?_+(?P<name>[a-z]\w*?)_(?:tensor_impl_)?"
    r"(?P<part>qdata|qdata_and_metadata|int_data|float8_data|packed_weights?|scale|group_scale|row_scale|zero_point"
    r"|group_zero|scale_and_zero|sparse_metadata|act_pre_scale|act_quant_scale|act_quant_zero_point"
    r"|per_tensor_scale|act_per_tensor_scale)$"
)
_DATA = ("qdata", "qdata_and_metadata", "int_data", "float8_data", "packed_weights", "packed_weight")
_OTHERS = ("qweight", "qzeros", "weight.absmax", "weight.quant_map", "SCB")


class _Converted(KeyedFramework):
    live_stage = Stage.CONVERTED

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED


class Converted(_Converted):
    """torch.ao eager and FX after `convert`, and the integer layouts of others."""

    name = "converted"

    def owns_model(self, view: ModelView) -> bool:
        return any(_is_converted_class(type(module)) for module in view.modules.values())

    def owns_keys(self, view: KeyView) -> bool:
        return any(
            spec.dtype in _QUANTIZED or "_packed_params." in key or _is_others(key, spec)
            for key, spec in view.specs.items()
        )

    def place(self, key: str, spec: Spec) -> Place | None:
        parent, leaf = split_path(key)
        if found := _PACKED_PARAMS.match(key) if "_packed_params" in key else None:
            host = found["host"] or ""
            return Place(host, site_of("weight", host), key[len(host) :].lstrip("."), Role.PACKED)
        if spec.dtype in _QUANTIZED or _is_others(key, spec):
            return Place(parent, site_of("weight", parent), leaf, Role.PACKED)
        if leaf in ("scale", "zero_point") and spec.shape in ((), (1,)):
            return Place(parent, site_of("output", parent), leaf, Role.SCALE if leaf == "scale" else Role.ZERO_POINT)
        return None


def _is_converted_class(kind: type) -> bool:
    """Whether torch's `convert` made a module of this class; `FloatFunctional` stands among them and is float."""
    inside = kind.__module__.startswith(("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized."))
    return inside and not kind.__name__.endswith("FloatFunctional")


def _is_others(key: str, spec: Spec) -> bool:
    return key.endswith(_OTHERS) and (key.rpartition(".")[2] != "qweight" or not spec.dtype.is_floating_point)


class ConvertedPT2E(_Converted):
    """torchao's export flow after `convert_pt2e`."""

    name = "pt2e"

    def owns_model(self, view: ModelView) -> bool:
        return any(slot.tensor.dtype is torch.int8 and _FROZEN.match(key) for key, slot in view.slots.items())

    def owns_keys(self, view: KeyView) -> bool:
        return any(spec.dtype is torch.int8 and _FROZEN.match(key) is not None for key, spec in view.specs.items())

    def place(self, key: str, spec: Spec) -> Place | None:
        if _FROZEN.match(key) is not None:
            return Place(key, f"constant:{key}", "", Role.PACKED)
        if _CONSTANT.match(key) is not None:
            return Place(key, f"constant:{key}", "", Role.SCALE if "_scale_" in key else Role.ZERO_POINT)
        return None


class ConvertedTorchAO(_Converted):
    """torchao's tensor subclasses after `quantize_(model, QATConfig(..., step="convert"))`."""

    name = "torchao"

    def owns_model(self, view: ModelView) -> bool:
        return any(hasattr(type(slot.tensor), "tensor_data_names") for slot in view.slots.values())

    def owns_keys(self, view: KeyView) -> bool:
        found = (_INNER.match(key) for key in view.specs if "._" in key or key.startswith("_"))
        return bool(view.attributes) or any(one is not None and one["part"] in _DATA for one in found)

    def place(self, key: str, spec: Spec) -> Place | None:
        found = _INNER.match(key)
        if found is None:
            return None
        host, name = found["host"] or "", found["name"]
        role = Role.SCALE if found["part"].endswith("scale") else Role.PACKED
        return Place(join_path(host, name), site_of(name, host), found["part"], role)
