"""Directories that torch.distributed.checkpoint wrote (Lightning's FSDP checkpoints among them). Read only."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError, UnsafeCheckpointError
from qat_compat.schema import Spec
from qat_compat.storage import torch_zip
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.lazy import LazyTensor
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.plain import plain
from qat_compat.storage.standins import Opaque
from qat_compat.storage.stream import Extent
from qat_compat.storage.text import short
from qat_compat.storage.unpickle import unpickle

__all__ = ["CONTAINER"]

_METADATA = ".metadata"
_LIGHTNING = "meta.pt"  # what Lightning keeps beside the shards: epoch, loops, hyper-parameters
_PACKAGE = "torch.distributed.checkpoint."
_MAX_BOXES = 4096  # of a tensor that is cut along several dimensions
_FRESH_COPY = "the checkpoint is incomplete or corrupt; get a fresh copy of the whole folder"


def _matches(source: Source) -> bool:
    return source.is_folder and (source.path / _METADATA).exists()


def _open(source: Source) -> Opened:
    folder = _Folder(source.path)
    tree = folder.tree()
    beside = source.path / _LIGHTNING
    if beside.is_file():
        more = torch_zip.CONTAINER.open(Source(beside)).tree
        if isinstance(more, dict):
            tree = {**more, **tree}
    notes = ("the shards have no checksums: nothing to verify",) if source.verify else ()
    return Opened(tree, notes=notes)


CONTAINER = Container("torch.distributed checkpoint", _matches, _open)


class _Chunk:
    """A box of one tensor, and where its bytes are."""

    __slots__ = ("offsets", "shard", "sizes", "start", "stop")

    def __init__(self, shard: str, start: int, stop: int, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        self.shard, self.start, self.stop, self.offsets, self.sizes = shard, start, stop, offsets, sizes


class _ShardedTensor(LazyTensor):
    __slots__ = ("chunks", "folder", "name")

    def __init__(self, folder: _Folder, name: str, spec: Spec, chunks: list[_Chunk]) -> None:
        self.folder, self.name, self.spec, self.chunks = folder, name, spec, chunks

    def extent(self) -> Extent | None:
        return self.folder.chunk(self.name, self.spec, self.chunks[0]).extent() if len(self.chunks) == 1 else None

    def read(self) -> Tensor:
        if len(self.chunks) == 1:
            return self.folder.chunk(self.name, self.spec, self.chunks[0]).read()
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        for chunk in self.chunks:
            part = whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))]
            part.copy_(self.folder.chunk(self.name, Spec(chunk.sizes, self.spec.dtype), chunk).read())
        return whole


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: dict[str, MappedFile] = {}
        file = MappedFile(path / _METADATA)
        metadata, _ = unpickle(file.read(0, file.size), file=file.path, record=_METADATA, storage=_no_storage)
        self.fields = self._attributes(metadata, "metadata.Metadata", _METADATA)

    def tree(self) -> dict[str, Any]:
        """The nested state that was saved, with its tensors unread."""
        entries = self.fields.get("state_dict_metadata")
        paths = self.fields.get("planner_data") or {}
        places = self._places()
        if not isinstance(entries, dict) or not isinstance(paths, dict):
            raise self._bad(None, "the index is malformed", "state_dict_metadata", type(entries).__name__)
        tree: dict[Any, Any] = {}
        for name, entry in entries.items():
            value = self._value(str(name), entry, places.get(name, []))
            _insert(tree, paths.get(name) or (name,), value)
        return {key: _listed(value) for key, value in tree.items()}

    def shard(self, name: str) -> MappedFile:
        if name not in self.shards:
            if name != Path(name).name or name in ("", ".", ".."):
                raise self._escape(name)
            path = self.path / name
            if self.path.resolve() not in path.resolve().parents:
                raise self._escape(name)
            self.shards[name] = MappedFile(path)
        return self.shards[name]

    def chunk(self, name: str, spec: Spec, chunk: _Chunk) -> LazyTensor:
        found = torch_zip.open_region(self.shard(chunk.shard), chunk.start, chunk.stop)
        if not isinstance(found, LazyTensor) or found.spec != spec:
            raise self._bad(name, "a shard holds something else than the index says", spec, short(found))
        return found

    def _value(self, name: str, entry: object, chunks: list[_Chunk]) -> Any:
        if not isinstance(entry, Opaque):
            raise self._bad(name, "the index is malformed", "an entry of torch's own types", type(entry).__name__)
        if entry.cls == _PACKAGE + "metadata.BytesStorageMetadata":
            if len(chunks) != 1:
                raise self._bad(name, "a value is missing from the shards", "one place", f"{len(chunks)}")
            return plain(torch_zip.open_region(self.shard(chunks[0].shard), chunks[0].start, chunks[0].stop))
        fields = self._attributes(entry, "metadata.TensorStorageMetadata", name)
        properties = fields.get("properties")
        state = properties.state if isinstance(properties, Opaque) else None
        dtype = (
            state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
        )
        if not isinstance(dtype, torch.dtype):
            raise self._bad(name, "the index gives no dtype for a tensor", "a torch.dtype", short(dtype))
        spec = Spec(self._sizes(name, fields.get("size")), dtype)
        return self._tensor(name, spec, fields.get("chunks"), chunks)

    def _tensor(self, name: str, spec: Spec, listed: object, chunks: list[_Chunk]) -> _ShardedTensor:
        """Give each box its size; together they must fill the tensor, each element once."""
        sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        for entry in listed if isinstance(listed, list) else []:
            fields = self._attributes(entry, "metadata.ChunkStorageMetadata", name)
            sizes[self._sizes(name, fields.get("offsets"))] = self._sizes(name, fields.get("sizes"))
        for chunk in chunks:
            chunk.sizes = sizes.get(chunk.offsets, spec.shape if len(sizes) <= 1 and not any(chunk.offsets) else ())
            if len(chunk.sizes) != len(spec.shape) or any(
                at + size > whole for at, size, whole in zip(chunk.offsets, chunk.sizes, spec.shape, strict=True)
            ):
                raise self._bad(
                    name, "a piece of a tensor lies outside of it", spec, f"{chunk.sizes} at {chunk.offsets}"
                )
        covered = sum(math.prod(chunk.sizes) for chunk in chunks)
        if covered != math.prod(spec.shape) or _overlap(chunks):
            raise self._bad(
                name, "the pieces of a tensor do not make it up", f"{math.prod(spec.shape)} elements", covered
            )
        on_disk = sum(chunk.stop - chunk.start for chunk in chunks)
        if math.prod(spec.shape) * spec.dtype.itemsize > on_disk:
            raise LimitError(
                "a tensor claims more memory than the shards hold for it",
                file=self.path, key=name, expected=f"at most {on_disk} bytes", found=spec, remedy=_FRESH_COPY,
            )  # fmt: skip
        return _ShardedTensor(self, name, spec, chunks)

    def _places(self) -> dict[str, list[_Chunk]]:
        """Name -> the places of its bytes."""
        places: dict[str, list[_Chunk]] = {}
        storage = self.fields.get("storage_data")
        for index, info in storage.items() if isinstance(storage, dict) else ():
            where = self._attributes(index, "metadata.MetadataIndex", _METADATA)
            what = self._attributes(info, "filesystem._StorageInfo", _METADATA)
            name, shard = where.get("fqn"), what.get("relative_path")
            start, length = what.get("offset"), what.get("length")
            if (
                not isinstance(name, str)
                or not isinstance(shard, str)
                or type(start) is not int
                or type(length) is not int
            ):
                raise self._bad(
                    short(name), "the index is malformed", "a name, a shard, an offset and a length", short(what)
                )
            if what.get("transform_descriptors"):
                raise self._bad(
                    name, "the shards are compressed or encrypted", "plain shards", short(what["transform_descriptors"])
                )
            file = self.shard(shard)
            if start < 0 or length < 0 or start + length > file.size:
                raise self._bad(
                    name, f"the shard {shard} is cut short", f"{start + length} bytes", f"{file.size} bytes"
                )
            offsets = self._sizes(name, where.get("offset") or ())
            places.setdefault(name, []).append(_Chunk(shard, start, start + length, offsets, ()))
        return places

    def _attributes(self, value: object, cls: str, key: str) -> dict[str, Any]:
        if not isinstance(value, Opaque) or value.cls != _PACKAGE + cls:
            found = value.cls if isinstance(value, Opaque) else type(value).__name__
            raise self._bad(key, "the index is malformed", _PACKAGE + cls, found)
        return value.attributes()

    def _sizes(self, name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, (tuple, list)) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
            raise self._bad(name, "the index is malformed", "sizes", short(value))
        return tuple(value)

    def _bad(self, key: str | None, message: str, expected: object, found: object) -> CheckpointError:
        return CheckpointError(message, file=self.path, key=key, expected=expected, found=found, remedy=_FRESH_COPY)

    def _escape(self, name: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(
            "the index names a file outside its folder",
            file=self.path, key=name, expected="a file of the folder", found=name,
            remedy="do not use this checkpoint; get it from its source",
        )  # fmt: skip


def _no_storage(identifier: tuple[Any, ...]) -> object:
    raise TypeError("a storage in an index")


def _insert(tree: dict[Any, Any], path: Any, value: Any) -> None:
    """Put a value where it was in the state that was saved; the planner wrote down its path."""
    if not isinstance(path, tuple) or not path or not all(type(part) in (str, int) for part in path):
        raise CheckpointError(
            "the index is malformed", expected="a path of names and numbers", found=short(path), remedy=_FRESH_COPY
        )
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise CheckpointError(
                "two values have one path", key=short(path), expected="a path each", remedy=_FRESH_COPY
            )
    node[path[-1]] = value


def _listed(value: Any) -> Any:
    """Lists come back as mappings from 0, 1, ..."""
    if not isinstance(value, dict):
        return value
    made = {key: _listed(item) for key, item in value.items()}
    return list(made.values()) if made and list(made) == list(range(len(made))) else made


def _overlap(chunks: list[_Chunk]) -> bool:
    """Whether two boxes share an element."""
    if len(chunks) < 2:
        return False
    boxes = sorted(chunks, key=lambda chunk: chunk.offsets)
    axes = {axis for box in boxes for axis, at in enumerate(box.offsets) if at != boxes[0].offsets[axis]}
    if len(axes) == 1:  # the usual case, a tensor cut along one dimension
        (axis,) = axes
        return any(
            one.offsets[axis] + one.sizes[axis] > other.offsets[axis] for one, other in itertools.pairwise(boxes)
        )
    if len(boxes) > _MAX_BOXES:
        raise LimitError(
            "a tensor is cut into too many pieces",
            expected=f"at most {_MAX_BOXES}",
            found=len(boxes),
            remedy="consolidate the checkpoint into one file first",
        )
    return any(
        all(
            max(a, b) < min(a + m, b + n)
            for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
        )
        for one, other in itertools.combinations(boxes, 2)
    )
