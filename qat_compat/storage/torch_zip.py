"""torch's own file format since 1.6: a ZIP archive with a pickle and one record per storage."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from qat_compat.errors import CheckpointError
from qat_compat.storage.archive import Archive, Record
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.lazy import Storage
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.standins import StorageType, TypedStorage
from qat_compat.storage.text import short
from qat_compat.storage.unpickle import unpickle

__all__ = ["CHECKSUMS", "CONTAINER", "open_region"]

CHECKSUMS = ".data/qat_compat_crc32"  # marks archives of this package: their CRC-32 sums are to be trusted and checked


def _matches(source: Source) -> bool:
    if not source.head.startswith(b"PK\x03\x04"):
        return False
    record = _pickle_record(source.archive)
    # TorchScript has its constants in a pickle of their own.
    return record is not None and record.name.removesuffix("data.pkl") + "constants.pkl" not in source.archive.records


def _open(source: Source) -> Opened:
    archive = source.archive
    prefix = _prefix(archive)
    archive.check_last_name()  # where the mark is, which the directory may have lost
    ours = prefix + CHECKSUMS in archive.records
    archive.verify = bool(ours and source.verify is None)
    if source.verify:
        archive.check_all()
    tree = _read_pickle(archive, prefix)
    opened = Opened(tree)
    if source.verify and all(record.crc == 0 for record in archive.records.values() if record.size):
        opened.notes = ("the file was written without checksums: nothing to verify",)
    return opened


def open_region(file: MappedFile, start: int, end: int) -> Any:
    """The data of an archive that is a part of another file."""
    archive = Archive(file, start, end)
    return _read_pickle(archive, _prefix(archive))


def _pickle_record(archive: Archive) -> Record | None:
    found = [record for name, record in archive.records.items() if name == "data.pkl" or name.endswith("/data.pkl")]
    return min(found, key=lambda record: len(record.name)) if found else None


def _prefix(archive: Archive) -> str:
    record = _pickle_record(archive)
    if record is None:
        raise CheckpointError(
            "the archive has no data.pkl",
            file=archive.file.path,
            expected="an archive that torch.save wrote",
            found=", ".join(list(archive.records)[:5]) or "an empty archive",
            remedy="pass the checkpoint itself",
        )
    return record.name.removesuffix("data.pkl")


def _read_pickle(archive: Archive, prefix: str) -> Any:
    order = prefix + "byteorder"
    byte_order = archive.read(archive.records[order]) if order in archive.records else b"little"
    if byte_order not in (b"little", b"big"):
        raise CheckpointError(
            "the byte order is unknown",
            file=archive.file.path,
            key=order,
            expected="little or big",
            found=repr(byte_order[:16]),
            remedy="the file is corrupt; get a fresh copy",
        )
    swap = byte_order != sys.byteorder.encode()
    storages: dict[str, Storage] = {}

    def storage(identifier: tuple[Any, ...]) -> TypedStorage:
        kind, storage_type, key, _, count = identifier[:5]
        if kind != "storage" or not isinstance(storage_type, StorageType) or type(count) is not int or count < 0:
            raise TypeError(f"a persistent id for {short(kind)}")
        if not isinstance(key, str):
            raise TypeError(f"a storage whose key is a {type(key).__name__}")
        nbytes = count * storage_type.dtype.itemsize
        name = f"{prefix}data/{key}"
        if name not in storages:
            storages[name] = _storage(archive, name, nbytes, swap=swap)
        if storages[name].nbytes != nbytes:
            raise _wrong_size(archive, name, nbytes, storages[name].nbytes)
        return TypedStorage(storages[name], storage_type.dtype)

    data = archive.read(archive.records[prefix + "data.pkl"])
    tree, end = unpickle(data, file=archive.file.path, record=prefix + "data.pkl", storage=storage)
    if end != len(data):
        raise CheckpointError(
            "the pickle ends before its record does",
            file=archive.file.path,
            key=prefix + "data.pkl",
            expected=f"{len(data)} bytes",
            found=f"{end} bytes",
            remedy="the file is corrupt; get a fresh copy",
        )
    return tree


def _storage(archive: Archive, name: str, nbytes: int, *, swap: bool) -> Storage:
    record = archive.records.get(name)
    if record is None:
        if nbytes == 0:
            return Storage(name, 0, lambda: torch.empty(0, dtype=torch.uint8, device="cpu"))
        raise CheckpointError(
            "a storage is missing from the archive",
            file=archive.file.path,
            key=name,
            expected=f"a record of {nbytes} bytes",
            found="none",
            remedy="the file is corrupt or was edited; get a fresh copy",
        )
    if record.size != nbytes:
        raise _wrong_size(archive, name, nbytes, record.size)
    return Storage(name, nbytes, partial(archive.tensor, record), swap=swap, locate=partial(archive.extent, record))


def _wrong_size(archive: Archive, name: str, expected: int, found: int) -> CheckpointError:
    return CheckpointError(
        "a record is not as long as its storage",
        file=archive.file.path,
        key=name,
        expected=f"{expected} bytes",
        found=f"{found} bytes",
        remedy="the file is corrupt; get a fresh copy",
    )


CONTAINER = Container("torch zip", _matches, _open)
