"""The integers that torchao's fake-quantizers round a weight to: of a live one, or of one that a file records.

What is known here, and what it rests on (torchao 0.18):

* The config of an `IntxFakeQuantizer` says all of its grid but the scale and zero point of a static one. It is kept as
  plain data; a quantizer is made of it again and asked, so that a file gives the very integers that the model gives.
* Of other fake-quantizers (float8, `Int4WeightFakeQuantizer`, NVFP4) no integer times a scale is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat_compat import packing
from qat_compat.errors import QParamError
from qat_compat.schema import Integers, Rounding, Spec

__all__ = ["as_json", "rebuilt", "rounding"]

Config = Mapping[str, Any]
Seen = Callable[..., tuple[Tensor, Tensor, Tensor]]

_GRANULARITIES = ("PerAxis", "PerGroup", "PerRow", "PerTensor", "PerToken")
_INTEGERS = ("IntxFakeQuantizeConfig", "FakeQuantizeConfig")


def as_json(config: Any) -> Config:
    """The config of a fake-quantizer as plain data.

    Example:
        >>> from torchao.quantization.qat import IntxFakeQuantizeConfig
        >>> about = as_json(IntxFakeQuantizeConfig(torch.int4, group_size=32))
        >>> about["dtype"], about["granularity"], about["mapping_type"], about["is_dynamic"]
        ('int4', {'class': 'PerGroup', 'group_size': 32}, 'SYMMETRIC', True)
    """
    return {"class": type(config).__name__, **{name: _plain(value) for name, value in vars(config).items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return as_json(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def rounding(
    key: str, weight: Config, inputs: Config | None, spec: Spec, sources: tuple[str, ...], seen: Seen
) -> Rounding | None:
    """The integers that a weight is rounded to; None where it is rounded to something else.

    Args:
        key: Of the weight.
        weight: Config of the quantizer of the weight.
        inputs: Config of that of the layer's inputs, where it has one.
        spec: Of the weight.
        sources: Keys of the tensors that `seen` takes.
        seen: What the quantizer makes of the weight, with which scale and zero point.
    """
    bits = re.fullmatch(r"int([1-8])", str(weight.get("dtype")))
    group = _group(weight.get("granularity"), spec.shape[-1])
    if weight.get("class") not in _INTEGERS or bits is None or group is None:
        return None
    scale = _dtype(weight.get("scale_precision")) or spec.dtype
    symmetric = weight.get("mapping_type") == "SYMMETRIC"
    compute = partial(_integers, key, int(bits[1]), scale, symmetric, seen)
    return Rounding(int(bits[1]), group, scale, _inputs(inputs), symmetric, sources, compute)


def _group(granularity: object, columns: int) -> int | None:
    if not isinstance(granularity, Mapping):
        return None
    size = columns if granularity.get("class") == "PerAxis" else granularity.get("group_size")
    return size if isinstance(size, int) else None


def _inputs(config: Config | None) -> str:
    """What becomes of the inputs, in the words of :class:`Rounding`."""
    if config is None:
        return ""
    granularity = config.get("granularity")
    per_token = isinstance(granularity, Mapping) and granularity.get("class") in ("PerToken", "PerRow")
    if config.get("dtype") == "int8" and per_token and config.get("is_dynamic"):
        return {"SYMMETRIC": "symmetric"}.get(str(config.get("mapping_type")), "asymmetric")
    return "otherwise quantized"


def _integers(key: str, bits: int, dtype: torch.dtype, symmetric: bool, seen: Seen, *tensors: Tensor) -> Integers:
    """The integers, from the values that they stand for."""
    value, scale, zero_point = seen(*tensors)
    rows = value.shape[0]
    scale = scale.detach().reshape(rows, -1).to(dtype)
    zero = None if symmetric else zero_point.detach().round().to(torch.int8).reshape(rows, -1)
    steps = value.reshape(*scale.shape, -1).float() / scale.unsqueeze(-1).float()
    steps = steps if zero is None else steps + zero.unsqueeze(-1)
    limit = 1 << (bits - 1)
    integers = steps.round().clamp(-limit, limit - 1).to(torch.int8).reshape(value.shape)
    if not torch.equal(packing.dequantize(integers, scale, zero).to(value.dtype), value):
        raise QParamError(
            "what the quantizer makes of the weight is not an integer times a scale",
            key=key,
            expected=f"{bits}-bit integers, their scales and zero points",
            remedy="take it as float: to_float(model, weights='quantized')",
        )
    return Integers(integers, scale, zero)


def rebuilt(about: Config, leaves: tuple[str, ...], weight: Tensor, *held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a quantizer of this config makes of a weight, with which scale and zero point; `leaves` names `held`."""
    from torchao.quantization import granularity
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
    from torchao.quantization.quant_primitives import MappingType, ZeroPointDomain

    fields = {name: value for name, value in about.items() if name != "class"}
    sizes = {name: value for name, value in about["granularity"].items() if name != "class"}
    kind = about["granularity"]["class"]
    if kind not in _GRANULARITIES:  # the word of a file is not to choose what is called
        raise ValueError(f"granularity {kind}")
    fields["granularity"] = getattr(granularity, kind)(**sizes)
    fields |= {name: _dtype(about[name]) for name in ("dtype", "scale_precision", "zero_point_precision")}
    fields["mapping_type"] = MappingType[about["mapping_type"]]
    fields["zero_point_domain"] = ZeroPointDomain[about["zero_point_domain"]]
    quantizer: Any = IntxFakeQuantizer(IntxFakeQuantizeConfig(**fields))
    for name, value in zip(leaves, held, strict=True):
        setattr(quantizer, name, value)
    with torch.no_grad():
        return quantizer(weight), quantizer.scale, quantizer.zero_point


def _dtype(name: object) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None
