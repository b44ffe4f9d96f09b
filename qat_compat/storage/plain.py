"""Training state as plain data: what is beside the weights, without a class of the file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.storage.lazy import HeldTensor, LazyTensor
from qat_compat.storage.standins import Global, NumpyArray, NumpyDtype, Opaque, StorageType, TypedStorage

__all__ = ["plain"]

_MAX_DEPTH = 64
_MAX_NODES = 5_000_000
_SCALARS = (
    str,
    int,
    float,
    bool,
    bytes,
    complex,
    type(None),
    torch.dtype,
    torch.layout,
    torch.qscheme,
    torch.memory_format,
)
_NAMED = (Global, StorageType, TypedStorage)


def plain(value: object) -> Any:
    """`value` as dicts, lists and scalars; tensors stay :class:`~qat_compat.storage.lazy.LazyTensor`, unread.

    An object of an unknown class becomes `{"class": name, ...}` with its attributes (and `"args"`, `"items"`, where it
    has them); an `argparse.Namespace` becomes its dict.

    Example:
        >>> plain({"epoch": 3, "betas": (0.9, 0.999)})
        {'epoch': 3, 'betas': [0.9, 0.999]}

    Raises:
        CheckpointError: A container holds itself.
        LimitError: It is nested too deeply, or parts that are shared over and over stand for far more than the file
            holds.
    """
    return _Plain().convert(value)


class _Plain:
    """One conversion. Shared parts are converted once; `weight` counts how large the result is when written out."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, int]] = {}
        self.path: list[object] = []
        self.on_path: set[int] = set()
        self.weight = 0

    def convert(self, value: object) -> Any:
        self.weight += 1
        if self.weight > _MAX_NODES:
            raise _too_much(f"more than {_MAX_NODES} values once shared parts are written out")
        if isinstance(value, _SCALARS):
            return value
        if isinstance(value, _NAMED):  # tuples, but no containers
            return _leaf(value)
        if isinstance(value, (Mapping, list, tuple, set, frozenset, Opaque, argparse.Namespace)):
            return self._container(value)
        return _leaf(value)

    def _container(self, value: object) -> Any:
        identity = id(value)
        if identity in self.done:
            made, weight = self.done[identity]
            self.weight += weight
            if self.weight > _MAX_NODES:
                raise _too_much(f"more than {_MAX_NODES} values once shared parts are written out")
            return made
        if identity in self.on_path:
            return self._cycle(value)
        if len(self.path) >= _MAX_DEPTH:
            if isinstance(value, Opaque):
                return {"class": value.cls}  # object graphs may be deep; what is left out is no plain data anyway
            raise _too_much(f"more than {_MAX_DEPTH} levels of nesting")
        before = self.weight
        self.path.append(value)
        self.on_path.add(identity)
        made = self._open(value)
        self.path.pop()
        self.on_path.discard(identity)
        self.done[identity] = made, self.weight - before
        return made

    def _open(self, value: object) -> Any:
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            return {_key(key): self.convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.convert(item) for item in value]
        assert isinstance(value, Opaque)
        attributes = value.attributes()
        if value.cls == "argparse.Namespace":
            return {str(key): self.convert(item) for key, item in attributes.items()}
        made: dict[str, Any] = {"class": value.cls}
        parts = (("args", value.args), ("items", value.items), ("entries", value.entries))
        made.update({name: self.convert(part) for name, part in parts if part})
        if attributes:
            made.update({str(key): self.convert(item) for key, item in attributes.items()})
        elif value.state is not None and not isinstance(value.state, dict):
            made["state"] = self.convert(value.state)
        return made

    def _cycle(self, value: object) -> Any:
        """Objects may refer back to each other; containers that hold themselves are no data."""
        at = next(index for index, part in enumerate(self.path) if part is value)
        through = next((part for part in self.path[at:] if isinstance(part, Opaque)), None)
        if through is None:
            raise CheckpointError(
                "a container in the file holds itself",
                expected="plain data",
                found=f"a {type(value).__name__} that is its own member",
                remedy="this is no trainer's file; do not use it",
            )
        return {"class": through.cls}


def _leaf(value: object) -> Any:
    if isinstance(value, LazyTensor):
        return value
    if isinstance(value, torch.Tensor):
        return HeldTensor(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, NumpyArray):
        return {"class": "numpy.ndarray of objects"} if value.array is None else value.array
    if isinstance(value, NumpyDtype):
        return str(value.make() or value.code)
    if isinstance(value, Global):
        return value.path
    if isinstance(value, (StorageType, TypedStorage)):
        return f"<{str(value.dtype).removeprefix('torch.')} storage>"
    return {"class": f"{type(value).__module__}.{type(value).__qualname__}"}


def _key(key: object) -> object:
    if isinstance(key, (tuple, frozenset)):
        return str(tuple(_key(part) for part in key))
    return key if isinstance(key, _SCALARS) else str(_leaf(key))


def _too_much(found: str) -> LimitError:
    return LimitError(
        "what is beside the weights is larger or deeper than any trainer writes",
        expected=f"at most {_MAX_NODES} values and {_MAX_DEPTH} levels",
        found=found,
        remedy="this is no trainer's file; do not use it",
    )
