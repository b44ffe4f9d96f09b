"""What is read: a lazy checkpoint and the meaning of its keys, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qat_compat.conventions import Form
from qat_compat.encodings import form_from_record, with_encodings
from qat_compat.errors import MALFORMED, CheckpointError, CompatError
from qat_compat.frameworks import Description, KeyView, beside, describe_keys, describe_model, is_consulted, with_sites
from qat_compat.schema import Entry, Role, Schema, Spec, Stage
from qat_compat.state import join_path, memory_of, split_path
from qat_compat.storage import Checkpoint, Extent, open_source
from qat_compat.storage.dtensor import undistributed

__all__ = ["Source", "SourceLike", "extra_state", "forms_of", "hidden_state", "open_any"]

Made = TypeVar("Made")
SourceLike = str | PathLike[str] | Mapping[str, Any] | nn.Module


@dataclass(frozen=True)
class Source:
    """A checkpoint with its schema; `description` where it is a live model."""

    checkpoint: Checkpoint
    schema: Schema
    description: Description | None = None

    def read(self, key: str) -> Tensor:
        """One tensor: as it is held, or as its recipe gives it, or what no state_dict holds and our own files do."""
        recipe = self.schema.recipes.get(key)
        if recipe is not None:
            return self.computed(key, recipe.sources, partial(_of_shape, self.spec(key).shape, recipe.compute))
        return self._held(key)

    def _held(self, key: str) -> Tensor:
        if key in self.checkpoint:
            return self.checkpoint[key]
        hidden: Mapping[str, Tensor] = self.checkpoint.record.get("hidden") or {}
        value: Tensor = hidden[key] if key in hidden else self._extra[key]
        return value

    @cached_property
    def _extra(self) -> Mapping[str, Any]:
        return extra_state(self.checkpoint)

    def computed(self, key: str, sources: tuple[str, ...], compute: Callable[..., Made]) -> Made:
        """What is computed from tensors of the checkpoint.

        Raises:
            CheckpointError: They do not fit together, or one of them cannot be read.
        """
        tensors = [self._held(name) for name in sources]
        try:
            with torch.no_grad():
                return compute(*tensors)
        except (*MALFORMED, AssertionError, ImportError, RuntimeError) as error:
            raise CheckpointError(
                "the tensors that a weight is computed from do not fit together",
                file=self.checkpoint.name,
                key=key,
                expected=", ".join(f"{name} {self._spec(name)}" for name in sources) + " of one layer",
                found=f"{type(error).__name__}: {error}",
                remedy="get a fresh copy of the file, or convert the model again",
            ) from error

    def spec(self, key: str) -> Spec:
        """Shape and dtype of what :meth:`read` gives; that of a placeholder where it is no tensor."""
        return self.schema.entries[key].spec if key in self.schema.recipes else self._spec(key)

    def _spec(self, key: str) -> Spec:
        return self.checkpoint.specs.get(key) or self.schema.entries[key].spec

    def alias(self, key: str) -> Hashable | None:
        """What two keys have in common that are one tensor; None where that is not known."""
        held = key in self.checkpoint.specs and key not in self.schema.recipes
        return self.checkpoint.alias(key) if held else None

    def extent(self, key: str) -> Extent | None:
        """Where the bytes of one tensor lie in a file; None where only :meth:`read` gives it."""
        held = key in self.checkpoint.specs and key not in self.schema.recipes
        return self.checkpoint.extent(key) if held else None

    @property
    def module_order(self) -> list[str]:
        """Module paths in the order of the model, as far as the source knows it."""
        if self.description is not None:
            return list(self.description.view.modules)
        return list(self.checkpoint.versions)


def _of_shape(shape: tuple[int, ...], compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What is computed, which a file's own word for the shape may contradict."""
    value = compute(*tensors)
    if tuple(value.shape) != shape:
        raise ValueError(f"it computes to {list(value.shape)} and not to {list(shape)}")
    return value


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
    return _described(open_source(source, select=select))


def _described(checkpoint: Checkpoint) -> Source:
    try:
        return _read_off(checkpoint)
    except CompatError as error:
        error.file = error.file or checkpoint.name
        raise
    except MALFORMED as error:
        raise CheckpointError(
            "what lies beside the weights (a record, a configuration, a framework's own state) is malformed",
            file=checkpoint.name,
            found=f"{type(error).__name__}: {error}",
            remedy="pass the weights alone, as a mapping",
        ) from error


def _read_off(checkpoint: Checkpoint) -> Source:
    specs = dict(checkpoint.specs)
    view = _view(specs, checkpoint)
    if (told := beside(view)) is not None:
        ours: Mapping[str, Any] = {name: checkpoint.record.get(name) or {} for name in told.record}
        checkpoint.record = {**checkpoint.record, **{k: {**ours[k], **more} for k, more in told.record.items()}}
        checkpoint.notes += told.notes
    hidden = checkpoint.record.get("hidden")
    if isinstance(hidden, Mapping):
        specs |= {key: Spec(tuple(value.shape), value.dtype) for key, value in hidden.items() if key not in specs}
    if told is not None or hidden:
        view = _view(specs, checkpoint)
    schema = _as_recorded(describe_keys(view), checkpoint)
    extra = {key: Entry(key, Role.EXTRA, (), torch.uint8) for key in extra_state(checkpoint) if key not in schema}
    if extra:
        schema = replace(schema, entries={**schema.entries, **extra})
    if packed := _packed_objects(checkpoint):
        schema = replace(schema, stage=Stage.CONVERTED, unreadable={**schema.unreadable, **packed})
    checkpoint.framework, checkpoint.stage = schema.framework, schema.stage.value
    return Source(checkpoint, schema)


def _packed_objects(checkpoint: Checkpoint) -> dict[str, str]:
    """Key -> what torch packed into an object of its own, where the weights of a recurrent layer should be."""
    held = checkpoint.metadata.get("extra_state")
    odd = held.items() if isinstance(held, Mapping) else ()
    return {
        str(key): "recurrent weights that torch packed into an object of its own cannot be read"
        for key, value in odd
        if isinstance(value, Mapping) and value.get("class") == "torch.ScriptObject"
    }


def extra_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What modules gave by `get_extra_state` and is no tensor: beside the weights in a file, by key."""
    found: dict[str, Any] = {}
    for place in (checkpoint.metadata, checkpoint.record):
        values = place.get("extra_state")
        if isinstance(values, Mapping):
            found |= {str(key): value for key, value in values.items() if str(key).split(".")[-1] == "_extra_state"}
    return found


def _view(specs: Mapping[str, Spec], checkpoint: Checkpoint) -> KeyView:
    config = checkpoint.metadata.get("quantization_config")
    return KeyView(
        specs,
        checkpoint.versions,
        checkpoint.record,
        checkpoint.attributes,
        config if isinstance(config, Mapping) else {},
        checkpoint.metadata,
        {key: tuple(checkpoint[key].tolist()) for key, spec in specs.items() if is_consulted(key, spec)},
    )


def _as_recorded(schema: Schema, checkpoint: Checkpoint) -> Schema:
    """What was written down when the file was saved, over what its keys tell."""
    record = checkpoint.record
    stage = _stage_of(record.get("stage", schema.stage.value), checkpoint.name)
    # quantizer state is in the keys of no float model: a record that says otherwise is about what the file once was
    if stage is not Stage.FLOAT or schema.stage is Stage.FLOAT:
        schema = replace(schema, framework=str(record.get("framework", schema.framework)), stage=stage)
    sites = record.get("sites")
    if isinstance(sites, Mapping):
        schema = with_sites(schema, {str(key): str(site) for key, site in sites.items()})
    aliases = record.get("aliases")
    if isinstance(aliases, Mapping):  # one quantizer under several names is one quantizer
        entries = {k: e._replace(quantizer=str(aliases.get(e.quantizer, e.quantizer))) for k, e in schema.items()}
        schema = replace(schema, entries=entries)
    grids = record.get("grids")
    if isinstance(grids, Mapping):
        schema = replace(schema, grids={**schema.grids, **{str(name): str(grid) for name, grid in grids.items()}})
    encodings = record.get("encodings")
    if isinstance(encodings, Mapping):
        forms = {str(name): form for name, held in encodings.items() if (form := form_from_record(held)) is not None}
        schema = with_encodings(schema, forms)
    return schema


def _stage_of(word: object, file: str) -> Stage:
    try:
        return Stage(word)
    except ValueError as error:
        raise CheckpointError(
            "the record in the file has a stage that is not known",
            file=file,
            key="stage",
            expected=", ".join(stage.value for stage in Stage),
            found=repr(word),
            remedy="a newer version of this package may have written it: update, or write the file again",
        ) from error


def _from_module(model: nn.Module) -> Source:
    description = describe_model(model)
    if description.schema.stage is Stage.CONVERTED:
        return _from_converted(description)
    name = f"<{type(model).__name__}>"
    tensors: dict[str, Tensor] = {
        k: undistributed(k, slot.tensor.detach()) for k, slot in description.view.slots.items() if slot.persistent
    }
    tensors.update(hidden_state(description))
    schema = _as_saved(description, tensors)
    extras: dict[str, Any] = {
        key: description.view.modules[split_path(key)[0]].get_extra_state()
        for key in description.schema
        if key.endswith("_extra_state") and key not in tensors
    }
    specs = {key: entry.spec for key, entry in schema.items() if key in tensors or key in extras}
    alias = {key: memory_of(value) for key, value in tensors.items()}.get
    if description.framework is None and (by_keys := describe_keys(KeyView(specs))).framework != schema.framework:
        schema = by_keys  # a framework of which only keys are known: its model is read as its state_dict would be
    told = description.framework.record(description.view) if description.framework is not None else {}
    record = {"framework": schema.framework, "stage": schema.stage.value, **told}
    known = {entry.quantizer for key, entry in schema.items() if key in tensors}
    held = {name: form for name, form in forms_of(description).items() if name in known}
    checkpoint = Checkpoint(specs, {**tensors, **extras}.__getitem__, name=name, record=record, alias=alias)
    checkpoint.framework, checkpoint.stage = schema.framework, schema.stage.value
    return Source(checkpoint, with_encodings(schema, held), description)


def _from_converted(description: Description) -> Source:
    """A converted model keeps its integers where no parameter is: it is read as its state_dict."""
    assert description.framework is not None
    model = description.view.model
    state = model.state_dict()
    checkpoint = open_source(state)
    checkpoint.name = f"<{type(model).__name__}>"
    checkpoint.record = dict(description.framework.record(description.view))
    return _described(checkpoint)


def _as_saved(description: Description, tensors: dict[str, Tensor]) -> Schema:
    """The schema of what a saved model would hold; `tensors` then has the values that it would hold."""
    by_name = {quantizer.name: quantizer for quantizer in description.quantizers}
    entries: dict[str, Entry] = {}
    for key, entry in description.schema.items():
        if not entry.quantizer or key not in tensors:
            entries[key] = entry
            continue
        value = by_name[entry.quantizer].state(entry.leaf, tensors.pop(key))
        if value is not None:
            saved = join_path(split_path(key)[0], split_path(entry.leaf)[1])
            entries[saved], tensors[saved] = entry, value
    return replace(description.schema, entries=entries)


def forms_of(description: Description) -> dict[str, Form]:
    """Quantizer name -> how it writes its range down, where that can be told in other frameworks' terms."""
    return {quantizer.name: form for quantizer in description.quantizers if (form := quantizer.form()) is not None}


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
