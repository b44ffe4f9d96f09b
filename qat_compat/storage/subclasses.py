"""Tensor subclasses of torchao as the plain tensors that they are made of.

torchao's own flat form, which it writes as safetensors, names the tensors inside `fc.weight` `fc._weight_qdata`,
`fc._weight_scale` and so on, and keeps what is no tensor as JSON in the header. Here a subclass in memory, one in a
pickle and one in such a header all become that form, with the same keys and the same attributes. What it rests on:
torchao 0.18, `torchao.prototype.safetensors`.

The attributes of one tensor are JSON values: `class` (its name), `shape` and `dtype` (what the subclass says of itself;
absent where a header leaves them out), `tensors` (part -> key), and what else the class keeps. dtypes become text
(`int4`), members of an enumeration their name, objects a mapping with their `class`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.schema import Spec
from qat_compat.storage.lazy import LazyTensor
from qat_compat.storage.plain import plain
from qat_compat.storage.standins import Global, Opaque, Unreadable

__all__ = ["flat_key", "from_headers", "inner_tensors"]

_NAMES = "tensor_names"  # of the header's metadata: every tensor that was flattened
_DESCRIBED = ("class", "shape", "dtype", "tensors")

# What a pickle leaves out: it has the value of an enumeration's member, and the fields of a NamedTuple in order.
_MEMBERS = {
    "MappingType": {1: "SYMMETRIC", 2: "SYMMETRIC_NO_CLIPPING_ERR", 3: "ASYMMETRIC"},
    "ZeroPointDomain": {1: "INT", 2: "FLOAT", 3: "NONE"},
}
_FIELDS = {"Float8MMConfig": ("emulate", "use_fast_accum", "pad_inner_dim")}

# Names that a header has for the dtype that a tensor stands for; else its scales have that dtype.
_DTYPES = ("dtype", "orig_dtype")
_SCALES = ("scale", "group_scale", "scale_and_zero")
_MAX_NODES, _MAX_DEPTH = 10_000, 32
_ONE_EACH = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)  # data of these dtypes is not packed


def flat_key(key: str, part: str) -> str:
    """Name of a tensor inside the tensor subclass at `key`.

    Example:
        >>> flat_key("block.fc.weight", "qdata"), flat_key("weight", "scale")
        ('block.fc._weight_qdata', '_weight_scale')
    """
    module, _, name = key.rpartition(".")
    return f"{module}._{name}_{part}" if module else f"_{name}_{part}"


def inner_tensors(key: str, value: object) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Flat key -> inner tensor, and the attributes; None for what is no tensor subclass of torchao.

    Raises:
        CheckpointError: It is another tensor subclass of a pickle, or another tensor that has no plain form.
    """
    if isinstance(value, Tensor):
        parts = _held(value)
        spec = Spec(tuple(value.shape), value.dtype)
        name = type(value).__name__
    elif isinstance(value, Unreadable):
        parts = value.parts if value.cls.startswith("torchao.") else {}
        spec = value.spec
        name = value.cls.rpartition(".")[2]
    else:
        return None
    tensors = {part: inner for part, inner in parts.items() if isinstance(inner, (Tensor, LazyTensor))}
    if not tensors:
        if isinstance(value, Unreadable):
            raise _no_plain_form(key, value)
        return None
    convert = _Conversion().value
    others = {part: convert(other) for part, other in parts.items() if part not in tensors and part not in _DESCRIBED}
    attributes = {
        "class": name,
        "shape": list(spec.shape),
        "dtype": _name(spec.dtype),
        "tensors": {part: flat_key(key, part) for part in tensors},
        **{part: other for part, other in others.items() if other is not None and not part.startswith("_")},
    }
    return {flat_key(key, part): inner for part, inner in tensors.items()}, attributes


def _held(tensor: Tensor) -> Mapping[str, Any]:
    """What a subclass in memory lists as its parts."""
    kind: Any = type(tensor)
    if not hasattr(kind, "tensor_data_names"):
        return {}
    names = (
        *kind.tensor_data_names,
        *getattr(kind, "optional_tensor_data_names", ()),
        *getattr(kind, "tensor_attribute_names", ()),
        *getattr(kind, "optional_tensor_attribute_names", ()),
    )
    return {name: getattr(tensor, name, None) for name in names}


def from_headers(
    headers: Iterable[Mapping[str, Any]], specs: Mapping[str, Spec]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Attributes of the tensors that torchao flattened, and what else the headers' metadata hold.

    Args:
        headers: The metadata of a file, or of each shard, with its JSON decoded.
        specs: Key -> spec of the tensors in all of them.

    Example:
        >>> about = {"_type": "Int8Tensor", "_data": {"block_size": [1, 4]}, "_tensor_data_names": ["qdata"]}
        >>> specs = {"fc._weight_qdata": Spec((2, 4), torch.int8)}
        >>> attributes, rest = from_headers([{"tensor_names": ["fc.weight"], "fc.weight": about, "step": "7"}], specs)
        >>> attributes["fc.weight"]["tensors"], attributes["fc.weight"]["block_size"], rest
        ({'qdata': 'fc._weight_qdata'}, [1, 4], {'step': '7'})
    """
    attributes: dict[str, dict[str, Any]] = {}
    rest: dict[str, Any] = {}
    for header in headers:
        names = header.get(_NAMES)
        listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        own = {name: header[name] for name in listed if isinstance(header.get(name), dict) and "_type" in header[name]}
        rest |= {name: value for name, value in header.items() if name not in own and (name != _NAMES or not own)}
        attributes |= {
            name: _from_json(name, entry, specs)
            for name, entry in own.items()
            if entry.get("_tensor_data_names") and isinstance(entry["_tensor_data_names"], list)
        }
    return attributes, rest


def _from_json(key: str, entry: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, Any]:
    data = entry.get("_data")
    convert = _Conversion().untagged
    values = {name: convert(value) for name, value in data.items()} if isinstance(data, dict) else {}
    keys = {str(part): flat_key(key, str(part)) for part in entry["_tensor_data_names"]}
    found = {part: specs[flat] for part, flat in keys.items() if flat in specs}
    scales = [_name(found[name].dtype) for name in _SCALES if name in found]
    dtype = next((values[name] for name in _DTYPES if values.get(name)), scales[0] if scales else None)
    stored = next((spec for part, spec in found.items() if part == "qdata" and spec.dtype in _ONE_EACH), None)
    shape = values.get("shape") or (list(stored.shape) if stored is not None else None)
    described = {"class": str(entry["_type"]), "shape": shape, "dtype": dtype, "tensors": keys}
    others = {name: value for name, value in values.items() if name not in _DESCRIBED}
    return {name: value for name, value in (described | others).items() if value is not None}


def _name(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


class _Conversion:
    """The attributes of one tensor as JSON values; what they may hold is bounded, since a file can nest without end."""

    def __init__(self) -> None:
        self.nodes = 0
        self.depth = 0

    def untagged(self, value: Any) -> Any:
        """From torchao's JSON, which has `{"_type": ..., "_data": ...}` around whatever is no JSON value itself."""
        return self._bounded(self._untagged, value)

    def value(self, value: Any) -> Any:
        """From a live object, or from what stands for it in a pickle."""
        return self._bounded(self._value, value)

    def _bounded(self, convert: Callable[[Any], Any], value: Any) -> Any:
        self.nodes += 1
        self.depth += 1
        if self.nodes > _MAX_NODES or self.depth > _MAX_DEPTH:
            raise LimitError(
                "the attributes of a tensor subclass are larger or deeper than any class of torchao has them",
                expected=f"at most {_MAX_NODES} values and {_MAX_DEPTH} levels",
                found=f"{self.nodes} values, {self.depth} levels",
                remedy="this is no file of torchao; do not use it",
            )
        converted = convert(value)
        self.depth -= 1
        return converted

    def _untagged(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.untagged(item) for item in value]
        if not isinstance(value, dict):
            return value
        if set(value) != {"_type", "_data"}:
            return {str(name): self.untagged(item) for name, item in value.items()}
        inner = value["_data"]
        if isinstance(inner, dict):
            return {"class": str(value["_type"]), **{name: self.untagged(item) for name, item in inner.items()}}
        return self.untagged(inner)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, (torch.dtype, torch.layout)):
            return _name(value)
        if isinstance(value, Opaque):
            return self._stand_in(value)
        if isinstance(value, Global):
            return value.path
        if isinstance(value, Mapping):
            return {str(name): self.value(item) for name, item in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: self.value(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"class": type(value).__name__, **fields}
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            fields = {name: self.value(item) for name, item in value._asdict().items()}
            return {"class": type(value).__name__, **fields}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return str(plain(value))

    def _stand_in(self, value: Opaque) -> Any:
        name = value.cls.rpartition(".")[2]
        attributes, args = value.attributes(), value.args
        if attributes or not args:
            return {"class": name, **{str(field): self.value(item) for field, item in attributes.items()}}
        if name in _FIELDS and len(args) == len(_FIELDS[name]):
            return {"class": name, **dict(zip(_FIELDS[name], map(self.value, args), strict=True))}
        if len(args) == 1 and isinstance(args[0], str):  # the member of an enumeration that has this value
            return args[0].upper()
        if len(args) == 1 and isinstance(args[0], int):
            return _MEMBERS.get(name, {}).get(args[0], args[0])
        if value.cls == "builtins.getattr" and len(args) == 2 and isinstance(args[1], str):
            return args[1]  # a member by its name, as some versions of Python pickle it
        return {"class": name, "args": [self.value(item) for item in args]}


def _no_plain_form(key: str, tensor: Unreadable) -> CheckpointError:
    return CheckpointError(
        f"a tensor cannot be read: it is {tensor.what}",
        key=key,
        expected="a dense tensor",
        found=tensor.what,
        remedy=tensor.remedy,
    )
