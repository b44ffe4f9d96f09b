"""Hugging Face's sharded checkpoints: an index that says in which file each tensor is. Read only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_compat.errors import CheckpointError, LimitError, UnsafeCheckpointError
from qat_compat.storage import safetensors, torch_legacy, torch_zip
from qat_compat.storage.beside import leads_outside
from qat_compat.storage.candidates import weights_of
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.lazy import LazyTensor
from qat_compat.storage.locate import locate
from qat_compat.storage.sniff import describe

__all__ = ["CONTAINER"]

_SHARDS = (safetensors.CONTAINER, torch_zip.CONTAINER, torch_legacy.CONTAINER)
_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
_SUFFIXES = ("*.safetensors.index.json", "*.bin.index.json")
_MAX_INDEX = 100_000_000


def _matches(source: Source) -> bool:
    if source.is_folder:
        return bool(_indexes(source.path)) or any((source.path / name).is_file() for name in _SINGLE)
    return source.head.lstrip()[:1] == b"{"


def _open(source: Source) -> Opened:
    if not source.is_folder:
        return _open_index(source.path, source.verify)
    indexes = _indexes(source.path)
    # A folder may hold the same weights twice, as safetensors and as pickles; the index of the former comes first.
    if indexes and not (source.path / _SINGLE[0]).is_file():
        opened = _open_index(indexes[0], source.verify)
        if len(indexes) > 1:
            also = ", ".join(path.name for path in indexes[1:])
            opened.notes = (*opened.notes, f"the index is {indexes[0].name}; also there: {also}")
        return opened
    single = next((source.path / name for name in _SINGLE if (source.path / name).is_file()), None)
    return _open_shard(single, source.verify) if single else _open_index(indexes[0], source.verify)


CONTAINER = Container("sharded checkpoint", _matches, _open)


def _indexes(folder: Path) -> list[Path]:
    """Those that `from_pretrained` looks for go first: beside `model` may lie `consolidated`, under names of its
    author's own."""
    known = [name.partition(".")[0] for name in _SINGLE]

    def rank(path: Path) -> tuple[bool, str]:
        return path.name.partition(".")[0] not in known, path.name

    return [path for pattern in _SUFFIXES for path in sorted(folder.glob(pattern), key=rank)]


def _open_index(path: Path, verify: bool | None) -> Opened:
    index = _read_index(path)
    weight_map = index["weight_map"]
    shards: dict[str, dict[str, LazyTensor]] = {}
    notes: list[str] = []
    headers: list[Mapping[str, Any]] = []
    for name in sorted(set(weight_map.values())):
        opened = _open_shard(_shard_path(path, name), verify)
        shards[name] = weights_of(locate(opened.tree, None).node).tensors
        headers += opened.headers
        notes += [note for note in opened.notes if note not in notes]
    owners: dict[str, str] = {}
    for name, tensors in shards.items():
        for key in tensors:
            if key in owners:
                raise _bad(path, key, "a tensor is in two shards", "one shard", f"{owners[key]} and {name}")
            owners[key] = name
    for key, name in weight_map.items():
        if owners.get(key) != name:
            raise _bad(
                path, key, "a tensor is not in the shard that the index names", name, owners.get(key, "no shard")
            )
    unlisted = [key for key in owners if key not in weight_map]
    if unlisted:
        raise _bad(path, unlisted[0], "a shard holds a tensor that the index does not list", "an entry for it", "none")
    about = index.get("metadata")
    return Opened(
        {key: shards[name][key] for key, name in weight_map.items()},
        metadata=about if isinstance(about, dict) else {},
        headers=tuple(headers),
        notes=tuple(notes),
    )


def _open_shard(path: Path, verify: bool | None) -> Opened:
    source = Source(path, verify)
    for container in _SHARDS:
        if container.matches(source):
            return container.open(source)
    raise describe(source)


def _shard_path(index: Path, name: str) -> Path:
    """The file of a shard: beside the index, or where the Hugging Face cache's own link leads, into its blobs."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise _escape(index, name, "a path that leaves the folder of the index")
    path = index.parent / name
    if leads_outside(path):
        raise _escape(index, name, f"a link to {path.resolve()}")
    return path


def _read_index(path: Path) -> dict[str, Any]:
    file = Source(path).file
    if file.size > _MAX_INDEX:
        raise LimitError("the index is too long", file=path, expected=f"at most {_MAX_INDEX} bytes", found=file.size)
    try:
        index = json.loads(file.read(0, file.size).decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise LimitError(
            "the index is nested too deeply", file=path, expected="a flat object", found="a deep one"
        ) from error
    except ValueError as error:
        raise _bad(path, None, "the index is not valid JSON", "a JSON object", error) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise _bad(
            path, None, "a JSON file, but not the index of a sharded checkpoint", "a weight_map", str(index)[:80]
        )
    return dict(index)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _bad(path: Path, key: str | None, message: str, expected: object, found: object) -> CheckpointError:
    return CheckpointError(
        message,
        file=path,
        key=key,
        expected=expected,
        found=found,
        remedy="get a fresh copy of the index and all its shards",
    )


def _escape(index: Path, name: str, found: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        "the index names a file outside its folder",
        file=index, key=name, expected="the name of a file beside the index", found=found,
        remedy="do not use this index; get the checkpoint from its source",
    )  # fmt: skip
