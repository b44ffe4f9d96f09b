"""The index of a torch.distributed.checkpoint folder: what was saved, and in which shard each piece of it lies.

Ranks that save together leave one `.metadata`; ranks that do not (`use_collectives=False`) leave `__0.metadata`,
`__1.metadata`, ... of which each lists that rank's pieces alone. Put together, these are read like the one.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.schema import Spec
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.standins import Opaque
from qat_compat.storage.text import short
from qat_compat.storage.unpickle import unpickle
from qat_compat.text import counted

__all__ = ["FRESH_COPY", "Item", "Piece", "index_files", "read_items"]

FRESH_COPY = "the checkpoint is incomplete or corrupt; get a fresh copy of the whole folder"

_INDEX = ".metadata"
_OF_RANK = re.compile(r"__(\d+)\.metadata")
_PACKAGE = "torch.distributed.checkpoint."
_MAX_BOXES = 4096  # of a tensor that is cut along several dimensions


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one tensor (or one value), and where its bytes are."""

    shard: str
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class Item:
    """One tensor or value of the state that was saved.

    Args:
        name: Its flat name.
        path: Names and numbers that lead to it in the nested state.
        spec: Its shape and dtype as a whole; None for a value that is no tensor.
        pieces: Where it is.
        replicas: How many ranks saved a piece that another one had saved already.
    """

    name: str
    path: tuple[str | int, ...]
    spec: Spec | None
    pieces: list[Piece] = field(default_factory=list)
    replicas: int = 0


def index_files(folder: Path) -> list[Path]:
    """The index, or that of every rank in the order of ranks; none if this is no such folder.

    Raises:
        CheckpointError: The index of a rank is missing.
    """
    if (folder / _INDEX).exists():
        return [folder / _INDEX]
    ranks = {int(found[1]): path for path in folder.iterdir() if (found := _OF_RANK.fullmatch(path.name))}
    for rank in range(max(ranks, default=-1)):
        if rank not in ranks:
            raise CheckpointError(
                "the index of a rank is missing",
                file=folder,
                expected=f"__0.metadata to __{max(ranks)}.metadata",
                found=f"no __{rank}.metadata",
                remedy=FRESH_COPY,
            )
    return [ranks[rank] for rank in sorted(ranks)]


def read_items(files: list[Path]) -> dict[str, Item]:
    """Everything that the index files list; the pieces of each tensor fill it, each element once.

    Raises:
        CheckpointError: An index is malformed, two of them disagree, or pieces of a tensor are missing or overlap.
        UnsafeCheckpointError: An index would run code if it were read the usual way.
    """
    items: dict[str, Item] = {}
    for path in files:
        for name, item in _IndexFile(path).items().items():
            _merge(items.setdefault(name, Item(name, item.path, item.spec)), item, path)
    for item in items.values():
        if item.spec is not None:
            _check_cover(item, item.spec, files)
    return items


def _merge(whole: Item, part: Item, file: Path) -> None:
    """Add a rank's pieces; what every rank saved whole is read from the first of them, as torch's own merge has it."""
    if (whole.spec, whole.path) != (part.spec, part.path):
        raise CheckpointError(
            "two ranks disagree about what they saved",
            file=file,
            key=part.name,
            expected=whole.spec or "a value",
            found=part.spec or "a value",
            remedy="a rank's files are left over from another save; get the folder as one save left it",
        )
    held = {(piece.offsets, piece.sizes) for piece in whole.pieces}
    new = [piece for piece in part.pieces if (piece.offsets, piece.sizes) not in held]
    whole.pieces += new
    whole.replicas += sum(math.prod(piece.sizes) > 0 for piece in part.pieces) - len(new)


def _check_cover(item: Item, spec: Spec, files: list[Path]) -> None:
    covered = sum(math.prod(piece.sizes) for piece in item.pieces)
    if covered != math.prod(spec.shape) or _overlap(item.pieces):
        several = "a rank's files are missing, or left over from a save with more ranks; get a fresh copy"
        raise CheckpointError(
            "the pieces of a tensor do not make it up",
            file=files[0].parent,
            key=item.name,
            expected=f"{math.prod(spec.shape)} elements, each once",
            found=f"{covered} in {counted(len(item.pieces), 'piece')}",
            remedy=FRESH_COPY if len(files) == 1 else several,
        )


class _IndexFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        file = MappedFile(path)
        metadata, _ = unpickle(file.read(0, file.size), file=path, record=path.name, storage=_no_storage)
        self.fields = self._attributes(metadata, "metadata.Metadata", path.name)

    def items(self) -> dict[str, Item]:
        entries = self.fields.get("state_dict_metadata")
        paths = self.fields.get("planner_data") or {}
        if not isinstance(entries, dict) or not isinstance(paths, dict):
            raise self._bad(None, "the index is malformed", "state_dict_metadata", type(entries).__name__)
        pieces = self._pieces()
        return {
            str(name): self._item(str(name), entry, paths.get(name) or (name,), pieces.get(name, []))
            for name, entry in entries.items()
        }

    def _item(self, name: str, entry: object, path: Any, pieces: list[Piece]) -> Item:
        if not isinstance(path, tuple) or not path or not all(type(part) in (str, int) for part in path):
            raise self._bad(name, "the index is malformed", "a path of names and numbers", short(path))
        if not isinstance(entry, Opaque):
            raise self._bad(name, "the index is malformed", "an entry of torch's own types", type(entry).__name__)
        if entry.cls == _PACKAGE + "metadata.BytesStorageMetadata":
            if len(pieces) != 1:
                raise self._bad(name, "a value is missing from the shards", "one place", f"{len(pieces)}")
            return Item(name, path, None, pieces)
        fields = self._attributes(entry, "metadata.TensorStorageMetadata", name)
        spec = Spec(self._sizes(name, fields.get("size")), self._dtype(name, fields.get("properties")))
        return Item(name, path, spec, self._sized(name, spec, fields.get("chunks"), pieces))

    def _dtype(self, name: str, properties: object) -> torch.dtype:
        state = properties.state if isinstance(properties, Opaque) else None
        found = state[0] if isinstance(state, tuple) and state else None
        dtype = state.get("dtype") if isinstance(state, dict) else found
        if not isinstance(dtype, torch.dtype):
            raise self._bad(name, "the index gives no dtype for a tensor", "a torch.dtype", short(dtype))
        return dtype

    def _sized(self, name: str, spec: Spec, listed: object, pieces: list[Piece]) -> list[Piece]:
        """Give each piece the size that is listed for its place."""
        sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        for entry in listed if isinstance(listed, list) else []:
            fields = self._attributes(entry, "metadata.ChunkStorageMetadata", name)
            sizes[self._sizes(name, fields.get("offsets"))] = self._sizes(name, fields.get("sizes"))
        made = []
        for piece in pieces:
            size = sizes.get(piece.offsets, spec.shape if len(sizes) <= 1 and not any(piece.offsets) else ())
            if not len(size) == len(piece.offsets) == len(spec.shape) or any(
                at + length > whole for at, length, whole in zip(piece.offsets, size, spec.shape, strict=True)
            ):
                raise self._bad(name, "a piece of a tensor lies outside of it", spec, f"{size} at {piece.offsets}")
            made.append(Piece(piece.shard, piece.start, piece.length, piece.offsets, size))
        return made

    def _pieces(self) -> dict[str, list[Piece]]:
        """Name -> the places of its bytes."""
        found: dict[str, list[Piece]] = {}
        storage = self.fields.get("storage_data")
        for index, info in storage.items() if isinstance(storage, dict) else ():
            where = self._attributes(index, "metadata.MetadataIndex", self.path.name)
            what = self._attributes(info, "filesystem._StorageInfo", self.path.name)
            name, shard = where.get("fqn"), what.get("relative_path")
            start, length = what.get("offset"), what.get("length")
            if not (isinstance(name, str) and isinstance(shard, str) and type(start) is int and type(length) is int):
                expected = "a name, a shard, an offset and a length"
                raise self._bad(short(name), "the index is malformed", expected, short(what))
            if what.get("transform_descriptors"):
                transforms = short(what["transform_descriptors"])
                raise self._bad(name, "the shards are compressed or encrypted", "plain shards", transforms)
            offsets = self._sizes(name, where.get("offset") or ())
            found.setdefault(name, []).append(Piece(shard, start, length, offsets))
        return found

    def _attributes(self, value: object, cls: str, key: str | None) -> dict[str, Any]:
        if not isinstance(value, Opaque) or value.cls != _PACKAGE + cls:
            found = value.cls if isinstance(value, Opaque) else type(value).__name__
            raise self._bad(key, "the index is malformed", _PACKAGE + cls, found)
        return value.attributes()

    def _sizes(self, name: Any, value: object) -> tuple[int, ...]:
        if not isinstance(value, (tuple, list)) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
            raise self._bad(name, "the index is malformed", "sizes", short(value))
        return tuple(value)

    def _bad(self, key: str | None, message: str, expected: object, found: object) -> CheckpointError:
        return CheckpointError(message, file=self.path, key=key, expected=expected, found=found, remedy=FRESH_COPY)


def _no_storage(identifier: tuple[Any, ...]) -> object:
    raise TypeError("a storage in an index")


def _overlap(pieces: list[Piece]) -> bool:
    """Whether two boxes share an element."""
    if len(pieces) < 2:
        return False
    boxes = sorted(pieces, key=lambda piece: piece.offsets)
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
