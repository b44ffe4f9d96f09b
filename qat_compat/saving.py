"""What goes into a file beside the weights, so that it can be read into any flow later."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_compat.encodings import form_to_record
from qat_compat.errors import SaveError
from qat_compat.floating import float_names
from qat_compat.frameworks import Description
from qat_compat.schema import Role
from qat_compat.source import Source, SourceLike, forms_of, hidden_state, open_any
from qat_compat.storage import Checkpoint, save
from qat_compat.storage.config import CONFIG
from qat_compat.text import shorten

__all__ = ["write"]


def write(obj: SourceLike, path: str | PathLike[str], *, backup: bool) -> Path:
    """Write a module or a checkpoint with what it says of its keys."""
    source = open_any(obj)
    about = source.checkpoint
    if isinstance(obj, Mapping) and not isinstance(obj, Checkpoint):
        _refuse_training_state(about, path)
    values = {key: source.read(key) for key, entry in source.schema.items() if entry.role is Role.EXTRA}
    extra = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
    if source.description is None:
        attributes = {"attributes": about.attributes} if about.attributes else {}
        record: dict[str, Any] = {**about.record, **attributes, **({"extra_state": extra} if extra else {})}
        tensors = {key: about[key] for key in about if key not in extra} if extra else about
        objects = obj.state_dict() if isinstance(obj, nn.Module) else None  # a converted model
        told = {CONFIG: about.metadata[CONFIG]} if CONFIG in about.metadata else None  # without it keys mean nothing
        return save(
            tensors,
            path,
            versions=about.versions or None,
            record=record or None,
            metadata=told,
            objects=objects,
            backup=backup,
        )
    hidden = hidden_state(source.description)
    record = {
        **about.record,
        "sites": _float_sites(source) | {k: e.site for k, e in source.schema.items() if e.quantizer},
        **({"grids": dict(source.schema.grids)} if source.schema.grids else {}),
        **({"encodings": encodings} if (encodings := _encodings(source.description)) else {}),
        **({"aliases": aliases} if (aliases := _aliases(source.description)) else {}),
        **({"hidden": hidden} if hidden else {}),
        **({"extra_state": extra} if extra else {}),
    }
    tensors = {key: about[key] for key in about if key not in hidden and key not in extra}
    assert isinstance(obj, nn.Module)
    versions = getattr(obj.state_dict(), "_metadata", None)
    return save(tensors, path, versions=versions, record=record, backup=backup)


def _refuse_training_state(mapping: Checkpoint, path: str | PathLike[str]) -> None:
    """The optimizer and the rest of a training checkpoint would be gone, and its caller would learn of it too late."""
    beside = [name for name in mapping.metadata if name not in ("extra_state", CONFIG)]
    if beside:
        raise SaveError(
            "the mapping holds more than weights, and only weights are saved",
            file=path,
            expected="a state_dict",
            found=", ".join(shorten(beside, 6)),
            remedy="pass the state_dict in it, and keep the rest with torch.save; or pass"
            " qat_compat.open_checkpoint(mapping) to save the weights alone",
        )


def _encodings(description: Description) -> dict[str, Any]:
    """Quantizer name -> how it writes its range down, which its tensors do not tell."""
    return {name: form_to_record(form) for name, form in forms_of(description).items()}


def _aliases(description: Description) -> dict[str, str]:
    """Further names of a quantizer that stands under several -> its first one."""
    return {name: quantizer.name for quantizer in description.quantizers for name in quantizer.names[1:]}


def _float_sites(source: Source) -> dict[str, str]:
    """Key -> float name, where the model tells all of them."""
    names, problems, _ = float_names(source)
    return names if not problems else {}
