"""Sets of weights in the data of a checkpoint: mappings of tensors, and modules that were pickled whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.storage.dtensor import undistributed
from qat_compat.storage.lazy import HeldTensor, LazyTensor, LazyTensors
from qat_compat.storage.plain import plain
from qat_compat.storage.standins import OWN, NumpyArray, Opaque, Unreadable
from qat_compat.storage.subclasses import inner_tensors

__all__ = ["Weights", "has_tensors", "is_weights", "split_own", "top_of", "weights_of"]

_MAX_MODULE_DEPTH = 128
_LEAVES = frozenset({"weight", "bias", "running_mean", "running_var"})  # of a module that is all of the model


class Weights(NamedTuple):
    """One state_dict.

    Args:
        tensors: Its tensors, in order, under their own names.
        versions: Its `_metadata`.
        extra: Its entries that are no tensors, as plain data.
        attributes: Name of a tensor subclass -> what it is apart from its inner tensors.
    """

    tensors: dict[str, LazyTensor]
    versions: Mapping[str, Any]
    extra: dict[str, Any]
    attributes: dict[str, dict[str, Any]]


def is_weights(node: object) -> bool:
    """Whether `node` is a state_dict (or a module): names with tensors directly under them."""
    if isinstance(node, torch.nn.Module):
        return bool(node.state_dict())
    node = _compiled(node)
    if isinstance(node, Opaque):
        return _is_module(node) and next(_module_tensors(node, "", 0), None) is not None
    if not isinstance(node, Mapping) or not node:
        return False
    tensors = 0
    for key, value in node.items():
        if not isinstance(key, str):
            return False
        if _is_tensor(value) or _tensors_in(value):
            tensors += 1
        elif isinstance(value, Mapping) and not key.endswith("_extra_state"):
            return False  # a trainer's dict that has a tensor among its values
    return tensors > 0


def has_tensors(node: object) -> bool:
    """Whether tensors are directly under the names of `node`, whatever else is."""
    return isinstance(node, Mapping) and any(
        isinstance(key, str) and (_is_tensor(value) or _tensors_in(value)) for key, value in node.items()
    )


def top_of(tree: object, is_state: Callable[[str], bool]) -> dict[str, object] | None:
    """The state_dict whose entries stand beside mappings and settings: tensors under dotted names, or several of those
    that one module has. A tensor or two of training state are none.

    Args:
        tree: What a file holds.
        is_state: Whether a name is that of training state.
    """
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        return None
    top = _Top((key, value) for key, value in tree.items() if _is_entry(key, value))
    named = [key for key, value in top.items() if not is_state(key) and _has_axes(value)]
    if any("." in key for key in named) or len(_LEAVES.intersection(named)) > 1:
        top._metadata = getattr(tree, "_metadata", None)
        return top
    return None


class _Top(dict[str, object]):
    """A part of a state_dict, with the versions of its modules."""

    _metadata: object = None


def _is_entry(key: str, value: object) -> bool:
    held = _is_tensor(value) or _tensors_in(value) or ("." in key and not isinstance(value, Mapping))
    return held or key.endswith("_extra_state")


def _has_axes(value: object) -> bool:
    """Whether `value` is a tensor, and no scalar, or packed parameters."""
    if isinstance(value, LazyTensor):
        return bool(value.spec.shape)
    return _tensors_in(value) or (_is_tensor(value) and bool(getattr(value, "shape", True)))


def weights_of(node: object) -> Weights:
    """The tensors of a state_dict or module.

    A tuple of tensors (packed parameters of a converted layer) gives one key per member:
    `fc._packed_params._packed_params.0`. A tensor subclass of torchao gives its inner tensors under the names that
    torchao's own flat form has for them.

    Raises:
        CheckpointError: A tensor is of a kind that has no plain form (sparse, nested, on the meta device).
    """
    weights = Weights({}, {}, {}, {})
    versions: Any = None
    if isinstance(node, torch.nn.Module):
        node = node.state_dict()
    node = _compiled(node)
    if isinstance(node, Opaque):
        members = dict(_module_tensors(node, "", 0))
    else:
        assert isinstance(node, Mapping)
        members = dict(node)
        versions = getattr(node, "_metadata", None)
    for key, value in members.items():
        _add(str(key), value, weights)
    return weights._replace(versions=_versions(versions))


def _add(key: str, value: object, weights: Weights) -> None:
    if isinstance(value, LazyTensor) and not isinstance(value, Unreadable) and key not in weights.tensors:  # nearly all
        weights.tensors[key] = value
        return
    value = undistributed(key, value)
    if isinstance(value, NumpyArray):
        value = value.array
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.atleast_1d(value).copy()).reshape(())  # beside other weights it is one, too
    if isinstance(value, torch.Tensor) and (value.layout is not torch.strided or value.is_nested):
        raise _not_dense(key, value)
    if (inner := inner_tensors(key, value)) is not None:
        tensors, weights.attributes[key] = inner
        for name, part in tensors.items():
            _add(name, part, weights)
    elif (tensor := _tensor(value)) is not None:
        if key in weights.tensors:
            raise _taken(key)
        weights.tensors[key] = tensor
    elif _tensors_in(value):
        assert isinstance(value, (tuple, list))
        for index, member in enumerate(value):
            if member is not None:
                _add(f"{key}.{index}", member, weights)
    elif value is not None:
        weights.extra[key] = plain(value)


def _not_dense(key: str, tensor: torch.Tensor) -> CheckpointError:
    what = "nested" if tensor.is_nested else f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    return CheckpointError(
        f"a tensor cannot be read: it is {what}",
        key=key,
        expected="a dense tensor",
        found=what,
        remedy="pass its parts under names of their own" if tensor.is_nested else "pass `tensor.to_dense()` instead",
    )


def _taken(key: str) -> CheckpointError:
    return CheckpointError(
        "two tensors have one name",
        key=key,
        expected="a name for each, also for the parts of a tensor subclass or of a tuple",
        found="a tensor of that name, and a part that is called so",
        remedy="rename the tensor",
    )


def _is_tensor(value: object) -> bool:
    """Whether :func:`_tensor` makes one of it, which may take a copy."""
    if isinstance(value, NumpyArray):
        value = value.array
    if isinstance(value, np.ndarray):
        return _tensor(np.empty((0,), value.dtype)) is not None if value.ndim else False
    return isinstance(value, (LazyTensor, torch.Tensor))


def _tensor(value: object) -> LazyTensor | None:
    if isinstance(value, LazyTensor):
        return value
    if isinstance(value, torch.Tensor):
        return HeldTensor(value.detach())
    if isinstance(value, NumpyArray):
        value = value.array
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.ndim:
        odd = any(step < 0 or step % value.itemsize for step in value.strides)
        native = value.astype(value.dtype.newbyteorder("="), copy=odd or not value.flags.writeable)
        with suppress(TypeError):  # of a dtype that torch has not, as numpy's longdouble
            return HeldTensor(torch.from_numpy(native))
    return None


def _tensors_in(value: object) -> bool:
    """Whether `value` is a tuple of tensors, as converted layers pack weight and bias."""
    return (
        isinstance(value, (tuple, list))
        and 0 < len(value) <= 8
        and any(map(_is_tensor, value))
        and all(part is None or _is_tensor(part) for part in value)
    )


def _compiled(node: object) -> object:
    """The module in what `torch.compile` made of it, which is pickled as a call with that module; else as it is."""
    if isinstance(node, Opaque) and node.cls.endswith(".OptimizedModule") and node.args:
        return node.args[0] if _is_module(node.args[0]) else node
    return node


def _is_module(node: object) -> bool:
    if isinstance(node, Opaque):
        attributes = node.attributes()
        return isinstance(attributes.get("_parameters"), dict) and isinstance(attributes.get("_modules"), dict)
    return isinstance(node, torch.nn.Module)


def _module_tensors(module: Opaque, prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    """Parameters and persistent buffers in the order of `Module.state_dict`."""
    if depth > _MAX_MODULE_DEPTH:
        raise LimitError(
            "the pickled module is nested too deeply",
            expected=f"at most {_MAX_MODULE_DEPTH} levels",
            found=prefix[:80] + "...",
            remedy="this is no trainer's file; do not use it",
        )
    attributes = module.attributes()
    transient = attributes.get("_non_persistent_buffers_set") or ()
    parameters, buffers = attributes.get("_parameters") or {}, attributes.get("_buffers") or {}
    for name, value in (*parameters.items(), *((n, b) for n, b in buffers.items() if n not in transient)):
        if value is not None:
            if _tensor(value) is None:
                raise _no_tensor(prefix + str(name), value)
            yield prefix + str(name), value
    for name, child in (attributes.get("_modules") or {}).items():
        if child is None:
            continue
        child = _compiled(child)
        if not isinstance(child, Opaque) or not _is_module(child):
            raise _no_tensor(prefix + str(name), child)
        yield from _module_tensors(child, f"{prefix}{name}.", depth + 1)


def _no_tensor(key: str, value: object) -> CheckpointError:
    return CheckpointError(
        "the pickled module holds something that cannot be read as weights",
        key=key,
        expected="a tensor or a module",
        found=value.cls if isinstance(value, Opaque) else type(value).__name__,
        remedy="save `model.state_dict()` where the model's own code is installed",
    )


def split_own(versions: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Take what this package wrote out of the `_metadata` of a state_dict: versions, record, training state."""
    root = versions.get("", {})
    own = root.get(OWN)
    if not isinstance(own, dict):
        return plain(versions), {}, {}
    rest = {path: entry for path, entry in versions.items() if path}
    if len(root) > 1:
        rest = {"": {name: value for name, value in root.items() if name != OWN}, **rest}
    record = dict(own)
    hidden, metadata = record.pop("hidden", None), record.pop("metadata", None)
    record = plain(record)
    if isinstance(hidden, dict):
        tensors = {str(key): tensor for key, value in hidden.items() if (tensor := _tensor(value)) is not None}
        record["hidden"] = LazyTensors(tensors)
    return plain(rest), record, plain(metadata) if isinstance(metadata, dict) else {}


def _versions(metadata: object) -> dict[str, Any]:
    """The `_metadata` of a state_dict, where it is one."""
    if not isinstance(metadata, Mapping):
        return {}
    return {str(path): dict(entry) for path, entry in metadata.items() if isinstance(entry, Mapping)}
