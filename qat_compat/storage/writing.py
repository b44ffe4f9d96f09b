"""What is to be written, checked and brought into the form that every container can take."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat_compat.errors import SaveError
from qat_compat.schema import Spec
from qat_compat.storage.checkpoint import Checkpoint
from qat_compat.storage.extent import Extent
from qat_compat.storage.lazy import HeldTensor, LazyTensor

__all__ = ["Contents", "as_memory", "check_tensor", "is_wrapper", "plain_bytes"]


@dataclass(frozen=True)
class Contents:
    """A state_dict and what is to be kept beside it.

    Args:
        source: key -> tensor.
        versions: `_metadata` of the state_dict.
        record: About the keys; JSON values only.
        hidden: Tensors that belong to the record and are no keys of the state_dict.
        metadata: Training state; plain data and tensors.
        header: Text that a reader of another package looks for in the header of a safetensors file.
        objects: The state_dict as torch itself would write it, where tensors are inside of other objects.
    """

    source: Mapping[str, Tensor]
    versions: Mapping[str, Mapping[str, Any]]
    record: Mapping[str, Any]
    hidden: Mapping[str, Tensor] | None
    metadata: Mapping[str, Any]
    header: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        versions: Mapping[str, Mapping[str, Any]] | None,
        record: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
        header: Mapping[str, str] | None = None,
        objects: Mapping[str, Any] | None = None,
    ) -> Contents:
        """Check everything that can be checked before the first byte is written.

        Raises:
            SaveError: A key or value is of a type that no container takes.
        """
        if not isinstance(tensors, Mapping):
            raise _unsupported("tensors", tensors, "a mapping of names to tensors")
        own = dict(record or {})
        hidden = own.pop("hidden", None)
        if hidden is not None and not isinstance(hidden, Mapping):
            raise _unsupported("record['hidden']", hidden, "a mapping of names to tensors")
        contents = cls(
            tensors,
            jsonable(dict(getattr(tensors, "_metadata", None) or {}) if versions is None else versions, "versions"),
            jsonable(own, "record"),
            hidden,
            _plain_values(dict(metadata or {}), "metadata"),
            dict(header or {}),
            objects,
        )
        if not isinstance(
            tensors, Checkpoint
        ):  # a Checkpoint holds tensors, but reading them all would undo its laziness
            for key, value in tensors.items():
                check_tensor(key, value)
        for key, value in (hidden or {}).items():
            check_tensor(f"record['hidden'][{key!r}]", value)
        return contents

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each tensor, without reading it."""
        if isinstance(self.source, Checkpoint):
            return {key: self.source.spec(key) for key in self.source}
        return {key: Spec(tuple(value.shape), value.dtype) for key, value in self.source.items()}

    def read(self, key: str) -> Tensor:
        """One tensor."""
        tensor = self.source[key]
        check_tensor(key, tensor)
        found = Spec(tuple(tensor.shape), tensor.dtype)
        if isinstance(self.source, Checkpoint) and found != self.source.spec(key):
            raise SaveError(
                "a tensor is not what was announced",
                key=key,
                expected=self.source.spec(key),
                found=found,
                remedy="make the checkpoint's specs fit what it reads",
            )
        return tensor.detach()

    def extent(self, key: str) -> Extent | None:
        """Where the bytes of a tensor are, if they can be copied from file to file without making it."""
        return self.source.extent(key) if isinstance(self.source, Checkpoint) else None

    def alias(self, key: str) -> Hashable | None:
        """Equal for two keys that are one tensor."""
        if isinstance(self.source, Checkpoint):
            return self.source.alias(key)
        return HeldTensor(self.source[key]).alias

    def ties(self) -> list[list[str]]:
        """Groups of keys that are one tensor."""
        groups: dict[Hashable, list[str]] = {}
        for key in self.source:
            alias = self.alias(key)
            if alias is not None:
                groups.setdefault(alias, []).append(key)
        return [keys for keys in groups.values() if len(keys) > 1]


def plain_bytes(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The elements of a tensor, and no others, as a flat uint8 tensor on the CPU; and the strides that go with it.

    A dense tensor keeps its strides (channels_last, transposed); a view with gaps or repeats is made contiguous.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu"), tuple(torch.empty(tensor.shape, device="meta").stride())
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8), tuple(tensor.stride())


def as_memory(data: Tensor) -> memoryview:
    """The bytes of a flat uint8 tensor, not copied."""
    buffer: Any = data.numpy()  # an ndarray is a buffer, though its type does not say so before Python 3.12
    return memoryview(buffer)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, each once, in whatever order of dimensions."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True


def check_tensor(key: str, value: object) -> None:
    """Refuse what has no plain bytes to write."""
    if not isinstance(key, str):
        raise _unsupported(repr(key), key, "a string as key")
    if not isinstance(value, Tensor):
        raise _unsupported(key, value, "a tensor")
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and is_wrapper(value):
        raise _unsupported(key, value, "a plain tensor")
    if value.layout is not torch.strided or value.is_nested:
        raise SaveError(
            "a tensor cannot be saved",
            key=key,
            expected="a dense tensor",
            found=value.layout,
            remedy="use `.to_dense()`",
        )
    if value.device.type == "meta":
        raise SaveError(
            "a tensor cannot be saved",
            key=key,
            expected="data",
            found="a tensor on the meta device",
            remedy="materialise the model first",
        )


def is_wrapper(value: Tensor) -> bool:
    """Whether the tensor is a subclass that computes otherwise than on bytes of its own."""
    return (
        hasattr(type(value), "__torch_dispatch__") and type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def jsonable(value: Any, where: str) -> Any:
    """A copy of `value` in JSON's types."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _unsupported(f"{where}[{key!r}]", key, "strings as keys")
        return {key: jsonable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise _unsupported(where, value, "JSON values: text, numbers, lists, mappings")


def _plain_values(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, Tensor, LazyTensor)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain_values(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain_values(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise _unsupported(where, value, "plain data: text, numbers, tensors, lists, mappings")


def _unsupported(key: str, value: object, expected: str) -> SaveError:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return SaveError(
        "a value cannot be saved",
        key=key,
        expected=expected,
        found=f"a {name}",
        remedy="convert it, or leave it out",
    )
