"""torchao's tensor subclasses, as `quantize_(model, config)` and QATConfig's convert step leave them.

What is known here, and what it rests on (torchao 0.18):

* A weight is a tensor subclass, which lists the tensors in it as `tensor_data_names` and
  `optional_tensor_data_names`, and what else it keeps as `tensor_attribute_names` and
  `optional_tensor_attribute_names`; its constructor takes them by these names. Storage gives the tensors as keys,
  `fc._weight_qdata`, and the rest as attributes of `fc.weight`, be it from memory, a pickle or torchao's safetensors.
* What a weight stands for is said by torchao alone: the subclass is made again and asked for its `dequantize()`. Two
  have none. `Int4OpaqueTensor` is laid out for the kernel of a CPU, which multiplies it with an identity.
  `Int4Tensor` is what the kernels of mslk take: signed values in the low nibble, then the high one, `q * scale +
  zero_point`, with scales and zero points as (in / group, out); `Int4WeightFakeQuantizer` trains on that grid.
* `act_pre_scale` multiplies the input before the product (AWQ, SmoothQuant): a float layer has it in its weight.
* `act_quant_scale`, `act_quant_zero_point`, `act_per_tensor_scale` and `output_act_quant_scale` are of activations,
  and take no part in the weight. No normalization is folded.
* Layouts that only a kernel of a GPU reads are not computed from: `Int4TilePackedTo4dTensor`,
  `Int4PreshuffledTensor`, `Int4PlainInt32Tensor`, the 2:4 sparse ones, and those of gemlite and of ARM.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat_compat.frameworks.base import KeyView, ModelView, plain_entry
from qat_compat.frameworks.key_tables import Decoded, KeyedFramework, Place, decode_each, site_of
from qat_compat.schema import Integers, Recipe, Role, Rounding, Spec, Stage
from qat_compat.state import join_path

__all__ = ["ConvertedTorchAO"]

_INNER = re.compile(
    r"(?:(?P<host>.+)\.)?_+(?P<name>[a-z]\w*?)_(?:tensor_impl_)?"
    r"(?P<part>qdata|qdata_and_metadata|int_data|float8_data|packed_weights?|scale|group_scale|row_scale|zero_point"
    r"|group_zero|scale_and_zero|sparse_metadata|act_pre_scale|act_quant_scale|act_quant_zero_point"
    r"|per_tensor_scale|act_per_tensor_scale|output_act_quant_scale|qzeros|compensation)$"
)
_DATA = ("qdata", "qdata_and_metadata", "int_data", "float8_data", "packed_weights", "packed_weight")
_OF_ACTIVATIONS: Mapping[str, tuple[str, Role]] = {
    "act_quant_scale":         ("input", Role.SCALE),
    "act_quant_zero_point":    ("input", Role.ZERO_POINT),
    "act_per_tensor_scale":    ("input", Role.SCALE),
    "output_act_quant_scale":  ("output", Role.SCALE),
}  # fmt: skip
_PRE_SCALE = "act_pre_scale"

_PUBLIC, _MX = "torchao.quantization", "torchao.prototype.mx_formats"
# Class of a tensor -> the module of torchao that has it.
_CLASSES: Mapping[str, str] = {
    "Int8Tensor":                _PUBLIC,
    "IntxUnpackedToInt8Tensor":  _PUBLIC,
    "Float8Tensor":              _PUBLIC,
    "PrototypeFloat8Tensor":     "torchao.prototype.quantization.float8_static_quant.prototype_float8_tensor",
    "MXTensor":                  f"{_MX}.mx_tensor",
    "NVFP4Tensor":               f"{_MX}.nvfp4_tensor",
    "Int4OpaqueTensor":          "torchao.prototype.quantization.int4.int4_opaque_tensor",
    "Int4Tensor":                _PUBLIC,
}  # fmt: skip


class ConvertedTorchAO(KeyedFramework):
    """torchao's tensor subclasses after `quantize_(model, QATConfig(..., step="convert"))`."""

    name = "torchao"
    live_stage = Stage.CONVERTED

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED

    def owns_model(self, view: ModelView) -> bool:
        return any(hasattr(type(slot.tensor), "tensor_data_names") for slot in view.slots.values())

    def owns_keys(self, view: KeyView) -> bool:
        found = (_INNER.match(key) for key, _ in view.kinds if "._" in key or key.startswith("_"))
        return bool(view.attributes) or any(one is not None and one["part"] in _DATA for one in found)

    def place(self, key: str, spec: Spec) -> Place | None:
        found = _INNER.match(key)
        if found is None:
            return None
        host, name, part = found["host"] or "", found["name"], found["part"]
        kind, role = _OF_ACTIVATIONS.get(part, (name, Role.SCALE if part.endswith("scale") else Role.PACKED))
        return Place(join_path(host, name), site_of(kind, host), part, role)

    def decoded(self, view: KeyView) -> Mapping[str, Decoded | str]:
        def decode(name: str) -> Decoded | str:
            about = view.attributes[name]
            return _obstacle(about, view) or _decoded(name, about, view)

        return decode_each(view.attributes, view, decode)


def _decoded(name: str, about: Mapping[str, Any], view: KeyView) -> Decoded:
    parts = dict(_parts(about))
    how = f"{about['class']} dequantized" + (", times act_pre_scale" if _PRE_SCALE in parts else "")
    recipe = Recipe(tuple(parts.values()), how, partial(_dequantized, about, tuple(parts)))
    entry = plain_entry(name, Spec(_shape(about, view), _dtype(about["dtype"])))
    return Decoded(entry, recipe, _grid(about, parts, recipe, entry.shape, view))


def _grid(
    about: Mapping[str, Any], parts: Mapping[str, str], recipe: Recipe, shape: tuple[int, ...], view: KeyView
) -> Rounding | None:
    """The integers of the two classes that hold them one by one."""
    bits = {"Int8Tensor": "int8", "IntxUnpackedToInt8Tensor": about.get("target_dtype")}.get(about["class"])
    block = about.get("block_size")
    if bits is None or not block or len(shape) != 2 or _PRE_SCALE in parts or block[0] not in (1, shape[0]):
        return None
    if block[0] != 1 and block[1] != shape[1]:
        return None

    def integers(*tensors: Tensor) -> Integers:
        held = dict(zip(parts, tensors, strict=True))
        zero = held.get("zero_point")
        scale = held["scale"].expand(shape[0], -1)
        return Integers(held["qdata"], scale, None if zero is None else zero.expand(shape[0], -1))

    symmetric = True if "zero_point" not in parts else None
    scale = view.specs[parts["scale"]].dtype
    return Rounding(
        int(str(bits).removeprefix("int")), block[1], scale, _inputs(about), symmetric, recipe.sources, integers
    )


def _inputs(about: Mapping[str, Any]) -> str:
    """What becomes of the inputs, in the words of :class:`Rounding`."""
    if any(part in _OF_ACTIVATIONS for part in about["tensors"]):
        return "static"
    if about.get("activation_quantization"):
        return "asymmetric"  # int8_asym_per_token, the only one that there is
    kwargs = about.get("act_quant_kwargs")
    if not kwargs:
        return ""
    per_token = isinstance(kwargs, Mapping) and (kwargs.get("granularity") or {}).get("class") == "PerRow"
    mapping = kwargs.get("mapping_type", "SYMMETRIC") if per_token else ""
    return {"SYMMETRIC": "symmetric", "ASYMMETRIC": "asymmetric"}.get(mapping, "otherwise quantized")


def _obstacle(about: Mapping[str, Any], view: KeyView) -> str | None:
    """Why a tensor cannot be computed, if it cannot."""
    kind = str(about.get("class"))
    if kind not in _CLASSES or about.get("act_mapping_type") is not None:
        return f"it is a {kind} of torchao, which only the kernel that it is laid out for can read"
    missing = [key for _, key in _parts(about) if key not in view.specs]
    if missing or not any(part == "qdata" for part, _ in _parts(about)):
        return f"it is a {kind} of torchao without its tensor {', '.join(missing) or 'qdata'}"
    dtype = _dtype(about.get("dtype"))
    if dtype is None or not dtype.is_floating_point:
        return f"it is a {kind} of torchao that does not say which dtype it stands for"
    return None


def _parts(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Part -> key of the tensors that make the weight."""
    return ((part, key) for part, key in about.get("tensors", {}).items() if part not in _OF_ACTIVATIONS)


def _shape(about: Mapping[str, Any], view: KeyView) -> tuple[int, ...]:
    """The shape that the tensor stands for; a header of torchao leaves out that of values packed in pairs."""
    if about.get("shape"):
        return tuple(about["shape"])
    shape = view.specs[about["tensors"]["qdata"]].shape
    return (*shape[:-1], shape[-1] * 2)


def _dtype(name: object) -> Any:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None


def _dequantized(about: Mapping[str, Any], parts: tuple[str, ...], *tensors: Tensor) -> Tensor:
    """What torchao says that a tensor subclass with these parts and attributes stands for."""
    held = dict(zip(parts, tensors, strict=True))
    pre_scale = held.pop(_PRE_SCALE, None)
    dtype: torch.dtype = _dtype(about["dtype"])
    value = _READ.get(about["class"], _by_itself)(about, held).to(dtype)
    return value if pre_scale is None else value * pre_scale.to(dtype)


def _by_itself(about: Mapping[str, Any], held: Mapping[str, Tensor]) -> Tensor:
    value: Tensor = _rebuilt(about, held).dequantize()
    return value


def _by_product(about: Mapping[str, Any], held: Mapping[str, Tensor]) -> Tensor:
    """Each row of the identity picks one column of the weight; a sum with zeros is exact."""
    weight: Any = _rebuilt(about, held)
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return torch.nn.functional.linear(identity, weight).t().contiguous()


def _by_nibbles(about: Mapping[str, Any], held: Mapping[str, Tensor]) -> Tensor:
    packed = held["qdata"].view(torch.int8)
    values = torch.stack([packed << 4 >> 4, packed >> 4], dim=-1).flatten(-2)
    scale, zero = (held[name].transpose(-2, -1).float().unsqueeze(-1) for name in ("scale", "zero_point"))
    groups = values.reshape(*scale.shape[:-1], -1).float()
    return (groups * scale + zero).flatten(-2)


_READ: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Tensor]] = {
    "Int4OpaqueTensor": _by_product,
    "Int4Tensor": _by_nibbles,
}


def _rebuilt(about: Mapping[str, Any], held: Mapping[str, Tensor]) -> Any:
    """torchao's own tensor; what says how to treat activations, or which kernel to use, is left out."""
    kind: Any = getattr(importlib.import_module(_CLASSES[about["class"]]), about["class"])
    names = (*kind.tensor_attribute_names, *getattr(kind, "optional_tensor_attribute_names", ()))
    return kind(**held, **{name: _attribute(name, about.get(name)) for name in names})


def _attribute(name: str, value: Any) -> Any:
    if name.endswith("dtype"):
        return _dtype(value)
    if name == "shape":
        return torch.Size(value)
    return value if isinstance(value, (bool, int, list)) else None
