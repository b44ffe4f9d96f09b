"""Converted models: integers where the weights were. They are told apart here so that none is taken for float.

What is known here, and what it rests on (torch 2.13):

* torch.ao eager and FX: `weight` of a quantized dtype, `scale` and `zero_point` of the output beside it; a linear
  layer packs its weight and bias into `_packed_params._packed_params`, which reads as `.0` and `.1`; an embedding packs
  its weight into `_packed_params._packed_weight`. A quantized tensor carries its own scales, so that its float values
  are its own `dequantize()`.
* FX keeps the scale of an input or of a function at the root, `conv1_input_scale_0`, `_scale_3`, as scalars.
* The batch normalization after a converted convolution is folded into it, and gone.
* `qweight` and `qzeros` that are not whole layers of GPTQ or AWQ are told, and not computed from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from qat_compat.frameworks.base import KeyView, ModelView, plain_entry
from qat_compat.frameworks.fake_quant_names import LEAVES, quantizer_of
from qat_compat.frameworks.key_tables import Decoded, KeyedFramework, Place, site_of
from qat_compat.frameworks.torch_ao_lstm import lstm_name
from qat_compat.schema import Recipe, Role, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["Converted"]

_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
_PACKED_PARAMS = re.compile(r"(?:(?P<host>.+?)\.)?_packed_params(?:\.\w+)*$")
_SCALAR = re.compile(r"(?P<name>(?:\w+\.)*?\w*?)_(?P<part>scale|zero_point)_(?P<number>\d+)$")
_WORDS = ("qweight",)  # by which such layers are told
_OTHERS = (*_WORDS, "qzeros")


class Converted(KeyedFramework):
    """torch.ao eager and FX after `convert`, and the integer layouts of others."""

    name = "converted"
    live_stage = Stage.CONVERTED
    folds = True

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED

    def owns_model(self, view: ModelView) -> bool:
        return any(_is_converted_class(type(module)) for module in view.kinds)

    def owns_keys(self, view: KeyView) -> bool:
        return any(
            spec.dtype in _QUANTIZED or "_packed_params." in key or _is_others(key, spec, _WORDS)
            for key, spec in view.kinds
        )

    def place(self, key: str, spec: Spec) -> Place | None:
        parent, leaf = split_path(key)
        if (left := quantizer_of(key)) is not None:  # a module that was prepared and that `convert` passed by
            (host, name), inner = split_path(left[0]), left[1]
            kind = "weight" if name == "weight_fake_quant" else "output"
            return Place(left[0], site_of(kind, host), inner, LEAVES[inner])
        if found := _PACKED_PARAMS.match(key) if "_packed_params" in key else None:
            host = found["host"] or ""
            return Place(host, site_of("weight", host), key[len(host) :].lstrip("."), Role.PACKED)
        if spec.dtype in _QUANTIZED or _is_others(key, spec):
            return Place(parent, site_of("weight", parent), leaf, Role.PACKED)
        if leaf in ("scale", "zero_point") and spec.shape in ((), (1,)):
            return Place(parent, site_of("output", parent), leaf, Role.SCALE if leaf == "scale" else Role.ZERO_POINT)
        if spec.shape == () and (scalar := _SCALAR.match(key)) is not None:
            name = f"{scalar['name']}_{scalar['number']}"
            role = Role.SCALE if scalar["part"] == "scale" else Role.ZERO_POINT
            return Place(name, f"constant:{name}", scalar["part"], role)
        return None

    def decoded(self, view: KeyView) -> Mapping[str, Decoded]:
        found: dict[str, Decoded] = {}
        for key, spec in view.specs.items():
            target = _float_name(key, spec)
            if target is not None:
                is_integer = spec.dtype in _QUANTIZED
                dtype = torch.float32 if is_integer else spec.dtype
                how = "integers times their scale" if is_integer else "packed beside integers"
                recipe = Recipe((key,), how, _dequantize if is_integer else _unchanged)
                found[target] = Decoded(plain_entry(target, Spec(spec.shape, dtype)), recipe)
        return found


def _float_name(key: str, spec: Spec) -> str | None:
    """The float model's name of a tensor that torch.ao stores in a converted form."""
    packed = _PACKED_PARAMS.match(key) if "_packed_params" in key else None
    if packed is None:
        return key if spec.dtype in _QUANTIZED else None
    leaf = {"0": "weight", "1": "bias", "_packed_weight": "weight"}.get(split_path(key)[1])
    # a dynamic recurrent layer packs its weights under numbers, which do not tell which of its tensors they are
    if leaf is None or "_all_weight_values" in key:
        return None
    name = join_path(packed["host"] or "", leaf)
    return lstm_name(name) or name


def _dequantize(value: Tensor) -> Tensor:
    return value.dequantize()


def _unchanged(value: Tensor) -> Tensor:
    return value


def _is_converted_class(kind: type) -> bool:
    """Whether torch's `convert` made a module of this class; `FloatFunctional` stands among them and is float."""
    inside = kind.__module__.startswith(("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized."))
    return inside and not kind.__name__.endswith("FloatFunctional")


def _is_others(key: str, spec: Spec, names: tuple[str, ...] = _OTHERS) -> bool:
    return key.endswith(names) and (key.rpartition(".")[2] != "qweight" or not spec.dtype.is_floating_point)
