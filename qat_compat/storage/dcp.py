"""Directories that torch.distributed.checkpoint wrote (Lightning's FSDP checkpoints among them). Read only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError, UnsafeCheckpointError
from qat_compat.schema import Spec
from qat_compat.storage import torch_zip
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.dcp_index import FRESH_COPY, Item, Piece, index_files, read_items
from qat_compat.storage.extent import Extent
from qat_compat.storage.lazy import LazyTensor
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.plain import plain
from qat_compat.storage.standins import Unreadable
from qat_compat.storage.text import short

__all__ = ["CONTAINER"]

_LIGHTNING = "meta.pt"  # what Lightning keeps beside the shards: epoch, loops, hyper-parameters
_SMALL = 1 << 14  # bytes; below, what an archive adds to a tensor hides how small it is
_SUBCLASS = b"_rebuild_wrapper_subclass"


def _matches(source: Source) -> bool:
    return source.is_folder and bool(index_files(source.path))


def _open(source: Source) -> Opened:
    files = index_files(source.path)
    items = read_items(files)
    folder = _Folder(source.path)
    tree: dict[Any, Any] = {}
    for item in items.values():
        _insert(tree, item.path, folder.value(item))
    tree = {key: _listed(value) for key, value in tree.items()}
    beside = source.path / _LIGHTNING
    if beside.is_file():
        more = torch_zip.CONTAINER.open(Source(beside)).tree
        if isinstance(more, dict):
            tree = {**more, **tree}
    return Opened(tree, notes=_notes(source, items, len(files)))


CONTAINER = Container("torch.distributed checkpoint", _matches, _open)


def _notes(source: Source, items: dict[str, Item], ranks: int) -> tuple[str, ...]:
    notes = ["the shards have no checksums: nothing to verify"] if source.verify else []
    replicated = sum(item.replicas > 0 and item.spec is not None for item in items.values())
    if replicated:
        notes.append(
            f"each of {ranks} ranks saved its own copy of {replicated} of {len(items)} entries: those are read from the"
            " first that has them"
        )
    return tuple(notes)


class _ShardedTensor(LazyTensor):
    __slots__ = ("folder", "name", "pieces")

    def __init__(self, folder: _Folder, name: str, spec: Spec, pieces: list[Piece]) -> None:
        self.folder, self.name, self.spec, self.pieces = folder, name, spec, pieces

    def extent(self) -> Extent | None:
        return self.folder.piece(self.name, self.spec, self.pieces[0]).extent() if len(self.pieces) == 1 else None

    def read(self) -> Tensor:
        if len(self.pieces) == 1:
            return self.folder.piece(self.name, self.spec, self.pieces[0]).read()
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype, device="cpu")
        for piece in self.pieces:
            part = whole[tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))]
            part.copy_(self.folder.piece(self.name, Spec(piece.sizes, self.spec.dtype), piece).read())
        return whole


class _Folder:
    """The shards of one checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: dict[str, MappedFile] = {}

    def value(self, item: Item) -> Any:
        """A tensor, unread, or the value that was saved beside the tensors."""
        for piece in item.pieces:
            file, end = self.shard(piece.shard), piece.start + piece.length
            if piece.start < 0 or piece.length < 0 or end > file.size:
                message = f"the shard {piece.shard} is cut short"
                raise self._bad(item.name, message, f"{end} bytes", f"{file.size} bytes")
        if item.spec is None:
            (piece,) = item.pieces[:1]
            return plain(self._region(piece))
        on_disk = sum(piece.length for piece in item.pieces)
        size = math.prod(item.spec.shape) * item.spec.dtype.itemsize
        if (subclass := self._subclass(item, size)) is not None:
            return subclass
        if size > on_disk:
            raise LimitError(
                "a tensor claims more memory than the shards hold for it",
                file=self.path, key=item.name, expected=f"at most {on_disk} bytes", found=item.spec, remedy=FRESH_COPY,
            )  # fmt: skip
        return _ShardedTensor(self, item.name, item.spec, item.pieces)

    def _subclass(self, item: Item, size: int) -> Unreadable | None:
        """A quantized tensor, which was saved whole and is smaller than the index says of what it stands for."""
        if len(item.pieces) != 1:
            return None
        (piece,) = item.pieces
        raw = self.shard(piece.shard)
        if piece.length > size and (
            size > _SMALL or raw.find_last(_SUBCLASS, piece.start, piece.start + piece.length) < 0
        ):
            return None
        found = self._region(piece)
        return found if isinstance(found, Unreadable) else None

    def shard(self, name: str) -> MappedFile:
        if name not in self.shards:
            if name != Path(name).name or name in ("", ".", ".."):
                raise self._escape(name)
            path = self.path / name
            if self.path.resolve() not in path.resolve().parents:
                raise self._escape(name)
            self.shards[name] = MappedFile(path)
        return self.shards[name]

    def piece(self, name: str, spec: Spec, piece: Piece) -> LazyTensor:
        found = self._region(piece)
        if not isinstance(found, LazyTensor) or found.spec != spec:
            raise self._bad(name, "a shard holds something else than the index says", spec, short(found))
        return found

    def _region(self, piece: Piece) -> Any:
        return torch_zip.open_region(self.shard(piece.shard), piece.start, piece.start + piece.length)

    def _bad(self, key: str, message: str, expected: object, found: object) -> CheckpointError:
        return CheckpointError(message, file=self.path, key=key, expected=expected, found=found, remedy=FRESH_COPY)

    def _escape(self, name: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(
            "the index names a file outside its folder",
            file=self.path, key=name, expected="a file of the folder", found=name,
            remedy="do not use this checkpoint; get it from its source",
        )  # fmt: skip


def _insert(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    """Put a value where it was in the state that was saved."""
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise CheckpointError(
                "two values have one path", key=short(path), expected="a path each", remedy=FRESH_COPY
            )
    node[path[-1]] = value


def _listed(value: Any) -> Any:
    """Lists come back as mappings from 0, 1, ..."""
    if not isinstance(value, dict):
        return value
    made = {key: _listed(item) for key, item in value.items()}
    return list(made.values()) if made and list(made) == list(range(len(made))) else made
