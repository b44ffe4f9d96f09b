"""What is read: a lazy checkpoint and the meaning of its keys, wherever it comes from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.errors import CompatError
from qat_compat.frameworks import Description, KeyView, describe_keys, describe_model, with_sites
from qat_compat.schema import Entry, Role, Schema, Spec, Stage
from qat_compat.state import memory_of, split_path
from qat_compat.storage import Checkpoint, Extent, open_source

__all__ = ["Source", "SourceLike", "extra_state", "hidden_state", "open_any"]

SourceLike = str | PathLike[str] | Mapping[str, Any] | nn.Module


@dataclass(frozen=True)
class Source:
    """A checkpoint with its schema; `description` where it is a live model."""

    checkpoint: Checkpoint
    schema: Schema
    description: Description | None = None

    def read(self, key: str) -> Tensor:
        """One tensor, also of the state that no state_dict holds and that our own files carry beside it."""
        if key in self.checkpoint:
            return self.checkpoint[key]
        beside: Mapping[str, Any] = {**extra_state(self.checkpoint), **(self.checkpoint.record.get("hidden") or {})}
        value: Tensor = beside[key]
        return value

    def spec(self, key: str) -> Spec:
        """Shape and dtype of what :meth:`read` gives; that of a placeholder where it is no tensor."""
        return self.checkpoint.spec(key) if key in self.checkpoint else self.schema[key].spec

    def alias(self, key: str) -> Hashable | None:
        """What two keys have in common that are one tensor; None where that is not known."""
        return self.checkpoint.alias(key) if key in self.checkpoint else None

    def extent(self, key: str) -> Extent | None:
        """Where the bytes of one tensor lie in a file; None where only :meth:`read` gives it."""
        return self.checkpoint.extent(key) if key in self.checkpoint else None

    @property
    def module_order(self) -> list[str]:
        """Module paths in the order of the model, as far as the source knows it."""
        if self.description is not None:
            return list(self.description.view.modules)
        return list(self.checkpoint.versions)


def open_any(source: SourceLike, *, select: str | None = None) -> Source:
    """Open a path, a mapping, a live module, or what has been opened before.

    Example:
        >>> from torch import nn
        >>> open_any(nn.Linear(2, 3)).schema["weight"].shape
        (3, 2)

    Raises:
        CheckpointError: See :mod:`qat_compat.storage`.
    """
    if isinstance(source, nn.Module):
        return _from_module(source)
    if not isinstance(source, (str, PathLike, Mapping)):
        raise CompatError(
            "this is no checkpoint",
            expected="a path, a state_dict, an opened checkpoint or a module",
            found=type(source).__name__,
        )
    checkpoint = open_source(source, select=select)
    specs = {key: checkpoint.spec(key) for key in checkpoint}
    hidden = checkpoint.record.get("hidden")
    if isinstance(hidden, Mapping):
        specs |= {key: Spec(tuple(value.shape), value.dtype) for key, value in hidden.items() if key not in specs}
    schema = describe_keys(KeyView(specs, checkpoint.versions, checkpoint.record))
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint) and _holds_subclasses(checkpoint):
        schema = replace(schema, framework="torchao", stage=Stage.CONVERTED)
    sites = checkpoint.record.get("sites")
    if isinstance(sites, Mapping):
        schema = with_sites(schema, {str(key): str(site) for key, site in sites.items()}, checkpoint.record)
    extra = {key: Entry(key, Role.EXTRA, (), torch.uint8) for key in extra_state(checkpoint) if key not in schema}
    if extra:
        schema = replace(schema, entries={**schema.entries, **extra}, _by_quantizer={})
    checkpoint.framework, checkpoint.stage = schema.framework, schema.stage.value
    return Source(checkpoint, schema)


def extra_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What modules gave by `get_extra_state` and is no tensor: beside the weights in a file, by key."""
    found: dict[str, Any] = {}
    for beside in (checkpoint.metadata, checkpoint.record):
        values = beside.get("extra_state")
        if isinstance(values, Mapping):
            found |= {str(key): value for key, value in values.items() if str(key).split(".")[-1] == "_extra_state"}
    return found


def _holds_subclasses(checkpoint: Checkpoint) -> bool:
    """Whether tensors in memory are torchao's subclasses, which say that they are float and hold integers."""
    return any(hasattr(type(checkpoint[key]), "tensor_data_names") for key in checkpoint)


def _from_module(model: nn.Module) -> Source:
    description = describe_model(model)
    tensors: dict[str, Tensor] = {
        k: slot.tensor.detach() for k, slot in description.view.slots.items() if slot.persistent
    }
    tensors.update(hidden_state(description))
    extras: dict[str, Any] = {
        key: description.view.modules[split_path(key)[0]].get_extra_state()
        for key in description.schema
        if key.endswith("_extra_state") and key not in tensors
    }
    name = f"<{type(model).__name__}>"
    specs = {key: entry.spec for key, entry in description.schema.items() if key in tensors or key in extras}
    alias = {key: memory_of(value) for key, value in tensors.items()}.get
    checkpoint = Checkpoint(specs, {**tensors, **extras}.__getitem__, name=name, alias=alias)
    schema = description.schema
    if description.framework is None and (by_keys := describe_keys(KeyView(specs))).framework != schema.framework:
        schema = by_keys  # a framework of which only keys are known: its model is read as its state_dict would be
    checkpoint.framework, checkpoint.stage = schema.framework, schema.stage.value
    return Source(checkpoint, schema, description)


def hidden_state(description: Description) -> dict[str, Tensor]:
    """Values of quantizers that no state_dict holds, where they have been computed."""
    found: dict[str, Tensor] = {}
    by_name = {quantizer.name: quantizer for quantizer in description.quantizers}
    for key, entry in description.schema.items():
        if entry.hidden:
            value = getattr(by_name[entry.quantizer].module, entry.leaf, None)
            if isinstance(value, Tensor):
                found[key] = value.detach()
    return found
