"""What stands in the result of a pickle for what is not plain data: names, inert objects, storages, numpy values."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import torch

from qat_compat.errors import CheckpointError
from qat_compat.schema import Spec
from qat_compat.storage.lazy import LazyTensor, Storage

__all__ = [
    "OWN",
    "Global",
    "NumpyArray",
    "NumpyDtype",
    "Opaque",
    "StateDict",
    "StorageType",
    "TypedStorage",
    "Unreadable",
]


OWN = "qat_compat"  # the key under which this package writes about a file


class Global(NamedTuple):
    """A class or function that a pickle names; only its name."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """Stand-in for an object of a class that is not known here: what the file says about it, and nothing else."""

    __slots__ = ("args", "cls", "entries", "items", "state")

    def __init__(self, cls: str, args: tuple[Any, ...] = ()) -> None:
        self.cls = cls
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []
        self.entries: dict[Any, Any] = {}

    def attributes(self) -> dict[str, Any]:
        """What would be the object's `__dict__`."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            merged: dict[str, Any] = {}
            for part in state:
                merged.update(part if isinstance(part, dict) else {})
            return merged
        return state if isinstance(state, dict) else {}

    def __repr__(self) -> str:
        return f"<stand-in for {self.cls}>"


class StateDict(dict[Any, Any]):
    """An OrderedDict of the file, with the `_metadata` that `Module.state_dict` puts on it."""

    _metadata: Any = None


class StorageType(NamedTuple):
    """A storage class of torch; only its name and dtype."""

    name: str
    dtype: torch.dtype


class TypedStorage(NamedTuple):
    """A storage as a pickle refers to it."""

    storage: Storage
    dtype: torch.dtype


class Unreadable(LazyTensor):
    """A tensor in a form that cannot be given as a plain tensor; says why.

    Args:
        what: What it is, for the message.
        remedy: What the user can do.
        spec: Its shape and dtype, as far as they are known.
        cls: Name of its class, for a tensor subclass.
        parts: Attributes of a tensor subclass (its inner tensors among them).
    """

    __slots__ = ("cls", "parts", "remedy", "what")

    def __init__(
        self, what: str, remedy: str, spec: Spec, *, cls: str = "", parts: dict[str, Any] | None = None
    ) -> None:
        self.what = what
        self.remedy = remedy
        self.spec = spec
        self.cls = cls
        self.parts = parts or {}

    def read(self) -> torch.Tensor:
        raise CheckpointError(f"the tensor is {self.what}", expected="a dense tensor", remedy=self.remedy)


class NumpyDtype:
    """A numpy dtype under construction."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "="

    def make(self) -> np.dtype[Any] | None:
        """The dtype, or None for one that holds Python objects or fields."""
        return np.dtype(self.order + self.code) if re.fullmatch(r"[biufcSUmM]\d{1,4}", self.code) else None


class NumpyArray:
    """A numpy array under construction."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray[Any, Any] | None = None
