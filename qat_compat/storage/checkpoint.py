"""The lazy mapping that every container on disk is opened as."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qat_compat.schema import Spec
from qat_compat.storage.extent import Extent
from qat_compat.storage.lazy import HeldTensor

__all__ = ["Checkpoint"]


class Checkpoint(Mapping[str, Tensor]):
    """State-dict keys and, on demand, their tensors.

    Example:
        >>> import torch
        >>> checkpoint = Checkpoint.of({"w": torch.ones(2, 3)}, name="<example>")
        >>> checkpoint.spec("w")
        Spec(shape=(2, 3), dtype=torch.float32)
        >>> checkpoint["w"].sum().item()
        6.0

    Args:
        specs: key -> shape and dtype, in the file's own order; known without reading a tensor.
        read: Reads one tensor. What it returns may be backed by the file and must not be written to.
        name: The path, or a word in angle brackets for what is not a file.
        metadata: Training state beside the weights (epoch, optimizer, hyper-parameters), as plain data.
        versions: The `_metadata` of a state_dict (module path -> `{"version": n}`), where the file kept it.
        record: What :func:`qat_compat.save_checkpoint` wrote about the keys (sites, hidden state), where it did.
        attributes: What is known of each tensor subclass apart from the tensors in it, as JSON values: name of the
            subclass (`fc.weight`, where the keys are `fc._weight_qdata` and so on) -> `class`, `shape`, `dtype`,
            `tensors` (part -> key), `block_size` and whatever else its class keeps.
        notes: What had to be decided while opening (which of two sets of weights, say), for the report.
        alias: Tells which memory a key's tensor is, see :meth:`alias`.
        extent: Tells where in a file a key's bytes are, see :meth:`extent`.

    Once it is opened by :func:`qat_compat.open_checkpoint`, `framework` names whose layout the keys are ("plain",
    "torch_ao", ...) and `stage` is a value of :class:`qat_compat.schema.Stage`: "float", "folded", "prepared" or
    "converted". What leaves no trace in the keys is known only of a module and of what this package saved: the bare
    state_dict of a model whose quantizers are all dynamic is "float", and so is one with folded normalizations.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], Tensor],
        *,
        name: str,
        metadata: Mapping[str, Any] | None = None,
        versions: Mapping[str, Mapping[str, Any]] | None = None,
        record: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
        notes: tuple[str, ...] = (),
        alias: Callable[[str], Hashable | None] | None = None,
        extent: Callable[[str], Extent | None] | None = None,
    ) -> None:
        self.specs: Mapping[str, Spec] = dict(specs)
        self._read = read
        self._alias = alias
        self._extent = extent
        self.name = name
        self.metadata: Mapping[str, Any] = dict(metadata or {})
        self.versions: Mapping[str, Mapping[str, Any]] = dict(versions or {})
        self.record: Mapping[str, Any] = dict(record or {})
        self.attributes: Mapping[str, Mapping[str, Any]] = dict(attributes or {})
        self.notes = notes
        self.framework = "plain"
        self.stage = "float"

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, name: str = "<mapping>", **about: Any) -> Checkpoint:
        """Wrap tensors that are already in memory."""
        specs = {key: Spec(tuple(value.shape), value.dtype) for key, value in tensors.items()}
        about.setdefault("alias", lambda key: HeldTensor(tensors[key]).alias)
        return cls(specs, tensors.__getitem__, name=name, **about)

    def spec(self, key: str) -> Spec:
        """Shape and dtype of one tensor; reads no tensor data. Those of all are in `specs`."""
        return self.specs[key]

    def alias(self, key: str) -> Hashable | None:
        """What two keys have in common that are one tensor (tied weights); None where that is not known.

        Example:
            >>> import torch
            >>> w = torch.ones(2)
            >>> checkpoint = Checkpoint.of({"embed": w, "head": w, "copy": w.clone()})
            >>> (
            ...     checkpoint.alias("embed") == checkpoint.alias("head"),
            ...     checkpoint.alias("embed") == checkpoint.alias("copy"),
            ... )
            (True, False)
        """
        return self._alias(key) if self._alias else None

    def extent(self, key: str) -> Extent | None:
        """Where the bytes of one tensor lie in a file; None where they have to be read with :meth:`__getitem__`."""
        return self._extent(key) if self._extent else None

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.specs:
            raise KeyError(key)
        with torch.no_grad():
            return self._read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    # a mapping is equal by its values: of tensors there is no such answer, and all of them would be read for it
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __copy__(self) -> Checkpoint:
        same = object.__new__(type(self))
        same.__dict__.update(self.__dict__)
        return same

    def __deepcopy__(self, memo: dict[int, Any]) -> Checkpoint:
        return self.__copy__()  # what it holds is read only

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, and so saved by `torch.save`, it is the state_dict that it stands for."""
        state = {"_metadata": OrderedDict(self.versions)} if self.versions else None
        return OrderedDict, (), state, None, iter(self.items())

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self)} tensors, {self.framework}, {self.stage})"
