"""numpy's archive of named arrays (.npz). Read only."""

from __future__ import annotations

import math
from functools import partial
from io import BytesIO
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from qat_compat.errors import CheckpointError, UnsafeCheckpointError
from qat_compat.storage.archive import Archive, Record
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.lazy import LazyTensor, Storage, StoredTensor

__all__ = ["CONTAINER"]

_HEADER = 12 + 10_000  # magic, version and length; numpy itself refuses longer headers of files that it does not trust
_DTYPES = {
    "b1": torch.bool, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8,
    "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64, "f2": torch.float16, "f4": torch.float32,
    "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128,
}  # fmt: skip


def _matches(source: Source) -> bool:
    if not source.head.startswith(b"PK\x03\x04"):
        return False
    names = source.archive.records
    return bool(names) and all(name.endswith(".npy") for name in names)


def _open(source: Source) -> Opened:
    archive = source.archive
    archive.verify = source.verify is not False  # numpy always writes the sums, and always checks them
    if source.verify:
        archive.check_all()
    return Opened({name.removesuffix(".npy"): _array(archive, record) for name, record in archive.records.items()})


CONTAINER = Container("npz", _matches, _open)


def _array(archive: Archive, record: Record) -> LazyTensor:
    head = archive.head(record, _HEADER)
    stream = BytesIO(head)
    try:
        version = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
    except (ValueError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError, UnicodeError) as error:
        raise _bad(archive, record, "an array's header is malformed", "the header of an .npy file", error) from error
    if dtype.hasobject:
        raise UnsafeCheckpointError(
            "an array holds pickled Python objects; it is not read",
            file=archive.file.path, key=record.name, expected="numbers", found=dtype,
            remedy="write the file again with arrays of numbers",
        )  # fmt: skip
    torch_dtype = _DTYPES.get(dtype.str[1:])
    if torch_dtype is None:
        raise _bad(archive, record, "an array has a dtype that torch has not", ", ".join(_DTYPES), dtype)
    start, size = stream.tell(), record.size
    nbytes = math.prod(shape) * dtype.itemsize
    if start + nbytes != size:
        raise _bad(
            archive, record, "an array is not as long as its shape says", f"{nbytes} bytes", f"{size - start} bytes"
        )
    swap = dtype.str[0] not in ("|", np.dtype("i4").newbyteorder("=").str[0]) and dtype.itemsize > 1
    storage = Storage(record.name, nbytes, partial(_content, archive, record, start), swap=swap)
    return StoredTensor(storage, torch_dtype, tuple(shape), stride=_fortran(shape) if fortran else None)


def _content(archive: Archive, record: Record, start: int) -> Tensor:
    return archive.tensor(record)[start:]


def _fortran(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[:index]) for index in range(len(shape)))


def _bad(archive: Archive, record: Record, message: str, expected: object, found: Any) -> CheckpointError:
    return CheckpointError(
        message, file=archive.file.path, key=record.name, expected=expected, found=found,
        remedy="the file is corrupt; get a fresh copy, or write it again as safetensors",
    )  # fmt: skip
