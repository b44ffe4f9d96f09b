"""torch's file format before 1.6: five pickles, then the storages end to end. Read only; new files are ZIP archives."""

from __future__ import annotations

import sys
from typing import Any

from qat_compat.errors import CheckpointError
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.lazy import Storage
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.standins import StorageType, TypedStorage
from qat_compat.storage.text import short
from qat_compat.storage.unpickle import unpickle

__all__ = ["CONTAINER"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# The magic number as the first pickle has it, in every protocol that can (LONG1 of ten bytes).
_MAGIC_BYTES = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
_FRESH_COPY = "the file is corrupt or was cut short; get a fresh copy"


def _matches(source: Source) -> bool:
    return source.head[:1] == b"\x80" and _MAGIC_BYTES in source.head[:32]


def _open(source: Source) -> Opened:
    reader = _Reader(source.file)
    opened = Opened(reader.tree())
    if source.verify:
        opened.notes = ("the file was written without checksums: nothing to verify",)
    return opened


CONTAINER = Container("torch legacy", _matches, _open)


class _Reader:
    """Storages are named before they are found: the pickle says how long each is, the end of the file where."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0
        self.storages: dict[str, Storage] = {}
        self.dtypes: dict[str, StorageType] = {}
        self.starts: dict[str, int] = {}
        self.swap = False

    def tree(self) -> Any:
        self._expect(self._pickle("magic number"), _MAGIC, "magic number")
        self._expect(self._pickle("protocol version"), _PROTOCOL, "protocol version")
        system = self._pickle("system information")
        self._expect(isinstance(system, dict), True, "system information")
        self.swap = bool(system.get("little_endian", True)) != (sys.byteorder == "little")
        tree = self._pickle("data")
        keys = self._pickle("storage keys")
        self._expect(isinstance(keys, list), True, "storage keys")
        for key in keys:
            self._expect(isinstance(key, str), True, "storage keys")
            self._place(key)
        missing = sorted(set(self.storages) - set(self.starts))
        if missing:
            raise self._broken(f"storage {missing[0]}", "its bytes", "none")
        if self.position != self.file.size:
            raise self._broken("end of the file", f"{self.position} bytes", f"{self.file.size} bytes")
        return tree

    def _pickle(self, what: str) -> Any:
        value, self.position = unpickle(
            self.file.buffer(), file=self.file.path, record=what, storage=self._storage, start=self.position
        )
        return value

    def _storage(self, identifier: tuple[Any, ...]) -> Any:
        if identifier[0] == "module":  # a class, with its source code beside it
            return identifier[1]
        kind, storage_type, key, _, count, *view = identifier
        if kind != "storage" or not isinstance(storage_type, StorageType) or type(count) is not int or count < 0:
            raise TypeError(f"a persistent id for {short(kind)}")
        if view and view[0] is not None:
            raise ValueError("a view of a storage, as torch 0.1 wrote them")
        if not isinstance(key, str):
            raise TypeError(f"a storage whose key is a {type(key).__name__}")
        nbytes = count * storage_type.dtype.itemsize
        if key not in self.storages:
            if nbytes > self.file.size:
                raise ValueError(f"a storage of {nbytes} bytes in a file of {self.file.size}")
            self.storages[key] = Storage(
                f"storage {key}", nbytes, lambda: self.file.tensor(self.starts[key], nbytes), swap=self.swap
            )
            self.dtypes[key] = storage_type
        return TypedStorage(self.storages[key], storage_type.dtype)

    def _place(self, key: str) -> None:
        storage = self.storages.get(key)
        if storage is None or key in self.starts:
            raise self._broken(f"storage {key}", "a storage that a tensor uses, once", "another")
        count = int.from_bytes(self.file.read(self.position, 8), "big" if self._is_big() else "little")
        nbytes = count * self.dtypes[key].dtype.itemsize
        if nbytes != storage.nbytes:
            raise self._broken(f"storage {key}", f"{storage.nbytes} bytes", f"{nbytes} bytes")
        self.starts[key] = self.position + 8
        self.position += 8 + nbytes
        if self.position > self.file.size:
            raise self._broken(f"storage {key}", f"{nbytes} bytes", f"{nbytes - self.position + self.file.size} bytes")

    def _is_big(self) -> bool:
        return self.swap == (sys.byteorder == "little")

    def _expect(self, found: object, expected: object, what: str) -> None:
        if found != expected or type(found) is not type(expected):
            raise self._broken(what, expected, short(found))

    def _broken(self, record: str, expected: object, found: object) -> CheckpointError:
        return CheckpointError(
            "the file is corrupt", file=self.file.path, key=record, expected=expected, found=found, remedy=_FRESH_COPY
        )
