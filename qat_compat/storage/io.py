"""The two ways through this layer: open a source, save tensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qat_compat.errors import CheckpointError, CompatError, SaveError
from qat_compat.isolation import paused_collector
from qat_compat.storage import safetensors, torch_zip_writer
from qat_compat.storage.atomic import write_atomically
from qat_compat.storage.candidates import Weights, split_own, weights_of
from qat_compat.storage.checkpoint import Checkpoint
from qat_compat.storage.container import Opened
from qat_compat.storage.containers import open_path
from qat_compat.storage.locate import locate, state_beside
from qat_compat.storage.plain import plain
from qat_compat.storage.subclasses import from_headers
from qat_compat.storage.writing import Contents

__all__ = ["open_source", "save"]


def open_source(
    source: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint,
    *,
    select: str | None = None,
    verify: bool | None = None,
) -> Checkpoint:
    """Open a checkpoint lazily: keys, shapes and dtypes now, each tensor when it is asked for.

    Nothing in the file is executed. The format is told by content, not by name.

    Example:
        >>> import torch
        >>> trainer = {"net": {"fc.weight": torch.zeros(3, 4)}, "epoch": 7}
        >>> checkpoint = open_source(trainer)
        >>> checkpoint.spec("fc.weight"), checkpoint.metadata["epoch"]
        (Spec(shape=(3, 4), dtype=torch.float32), 7)

    Args:
        source: A file, a folder of shards, a state_dict, or a trainer's dict that has one in it.
        select: Which weights, where there are several: "ema", "model" or a dotted path. By default what the trainer
            that wrote the file prefers; the choice is in the checkpoint's `notes`.
        verify: Compare all data with the file's checksums now (True) or never (False). By default each tensor is
            compared when it is read, if the file carries checksums of this package.

    Raises:
        CheckpointError: The source is corrupt, of no known format, or has no weights where `select` says.
        UnsafeCheckpointError: Reading it the usual way would run code or leave its folder.
        LimitError: It asks for more memory than its size can justify.
    """
    if isinstance(source, Checkpoint):
        if select is not None:
            raise CheckpointError(
                "an open checkpoint has one set of weights",
                file=source.name,
                key=f"select={select!r}",
                remedy="pass select= when opening the file",
            )
        return source
    if isinstance(source, Mapping):
        return _checkpoint(Opened(source), "<mapping>", select)
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            "this is no source of weights",
            expected="a path, a state_dict or an open checkpoint",
            found=type(source).__name__,
            remedy="pass one of those",
        )
    path = Path(os.fsdecode(source))
    try:
        with paused_collector():
            return _checkpoint(open_path(path, verify), str(path), select)
    except CompatError as error:
        error.file = error.file or str(path)
        raise
    except OSError as error:
        raise CheckpointError(
            "the path cannot be looked at", file=path, found=error, remedy="check the path and its permissions"
        ) from error


def save(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    versions: Mapping[str, Mapping[str, Any]] | None = None,
    record: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    header: Mapping[str, str] | None = None,
    objects: Mapping[str, Any] | None = None,
    backup: bool = False,
) -> Path:
    """Write a state_dict, all or nothing: as safetensors if the name ends so, else as torch's own zip format.

    The file is written beside its destination, brought to the disk and renamed, so that a crash leaves the old or the
    new one. Each tensor is written without its neighbours in memory, one at a time; tied tensors stay tied (.pt) or
    are noted as tied in the record (.safetensors). The CRC-32 of each tensor is embedded, and compared when it is read
    again. A .pt file reads everywhere with `torch.load(path, weights_only=True)`.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save({"w": torch.ones(2)}, f"{folder}/model.pt", record={"sites": {"w": "fc.weight"}})
        ...     open_source(path).record
        {'sites': {'w': 'fc.weight'}}

    Args:
        tensors: Name -> tensor. A :class:`Checkpoint` is streamed; any other mapping is taken to be in memory.
        path: The destination. A symbolic link is followed; the mode of an existing file is kept.
        versions: `_metadata` of the state_dict; by default the mapping's own.
        record: What is known of the keys, as JSON values; tensors may be under `record["hidden"]`.
        metadata: Training state to keep beside the weights. Tensors in it need a .pt file.
        header: Text for the header of a safetensors file, where a reader of another package looks for it.
        objects: The state_dict in which torch has these tensors, some of them inside of other objects (packed
            parameters, tensor subclasses): what a .pt file holds in their place.
        backup: Keep the file that is replaced, under a dated name.

    Returns:
        The path as given.

    Raises:
        SaveError: A value has no form in the file, or the operating system refused (its error is the `__cause__`).
    """
    path = _destination(path)
    try:
        if versions is None and isinstance(tensors, Checkpoint):
            versions = tensors.versions
        if isinstance(tensors, Checkpoint) and tensors.attributes:
            record = {"attributes": tensors.attributes, **(record or {})}
        contents = Contents.of(tensors, versions, record, metadata, header, objects)
        container = safetensors if path.suffix == ".safetensors" else torch_zip_writer
        write_atomically(path, lambda stream: container.write(stream, contents), backup=backup)
    except SaveError as error:
        error.file = error.file or str(path)
        raise
    except (
        RuntimeError,
        TypeError,
        ValueError,
        pickle.PicklingError,
    ) as error:  # a device out of memory, a mapping's own
        raise SaveError(
            "the tensors could not be written",
            file=path,
            expected="tensors that can be read and copied to the CPU",
            found=f"{type(error).__name__}: {error}",
            remedy="what stood at the destination before is unchanged; see the cause above",
        ) from error
    return path


_OTHERS = frozenset({".npz", ".npy", ".onnx", ".h5", ".hdf5", ".gguf", ".msgpack", ".json", ".index", ".zip"})


def _destination(path: str | os.PathLike[str]) -> Path:
    try:
        destination = Path(os.fsdecode(path))
    except TypeError as error:
        raise SaveError("this is no path", key="path", expected="a path", found=type(path).__name__) from error
    if destination.suffix.lower() in _OTHERS:
        raise SaveError(
            "the name is that of a file of another kind",
            file=destination,
            expected="a name that ends in .safetensors, .pt, .pth, .ckpt or .bin",
            found=destination.suffix,
            remedy="give it a name that says what is in it: readers go by that",
        )
    return destination


def _checkpoint(opened: Opened, name: str, select: str | None) -> Checkpoint:
    found = locate(opened.tree, select)
    weights = weights_of(found.node)
    for mapping in found.beside:
        more = weights_of(mapping)
        weights.tensors.update({key: value for key, value in more.tensors.items() if key not in weights.tensors})
    versions, record, kept = split_own(weights.versions)
    record = record or opened.record
    tensors = weights.tensors
    specs = {key: tensor.spec for key, tensor in tensors.items()}
    described, headers = from_headers(opened.headers, specs)
    metadata = {**plain(state_beside(opened.tree, found)), **headers, **opened.metadata, **kept}
    if weights.extra:
        metadata["extra_state"] = weights.extra
    return Checkpoint(
        specs,
        _reader(weights, name),
        name=name,
        metadata=metadata,
        versions=versions or opened.versions,
        record=record,
        attributes={**_recorded_attributes(record), **described, **weights.attributes},
        notes=(*opened.notes, *([found.note] if found.note else [])),
        alias=lambda key: tensors[key].alias,
        extent=lambda key: tensors[key].extent(),
    )


def _recorded_attributes(record: dict[str, Any]) -> dict[str, Any]:
    attributes = record.pop("attributes", None)
    found = attributes if isinstance(attributes, dict) else {}
    return {name: about for name, about in found.items() if isinstance(about, dict)}


def _reader(weights: Weights, name: str) -> Callable[[str], Tensor]:
    def read(key: str) -> Tensor:
        try:
            return weights.tensors[key].read()
        except CompatError as error:
            error.file, error.key = error.file or name, error.key or key
            raise
        except (
            ArithmeticError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # scales that are words, say
            raise CheckpointError(
                "the tensor cannot be read", file=name, key=key, found=f"{type(error).__name__}: {error}"
            ) from error

    return read
