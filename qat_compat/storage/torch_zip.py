"""torch's own file format since 1.6: a ZIP archive with a pickle and one record per storage."""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError
from qat_compat.schema import Spec
from qat_compat.storage.archive import Archive, Record
from qat_compat.storage.archive_writer import ArchiveWriter
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.extent import Extent, pieces
from qat_compat.storage.lazy import LazyTensor, Storage, contiguous
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.standins import OWN, StorageType, TypedStorage
from qat_compat.storage.text import short
from qat_compat.storage.unpickle import unpickle
from qat_compat.storage.writing import Contents, as_memory, plain_bytes

__all__ = ["CONTAINER", "open_region", "write"]

_CHECKSUMS = ".data/qat_compat_crc32"  # marks archives of this package: their CRC-32 sums are to be trusted and checked
_ALIGNMENT = 64


def _matches(source: Source) -> bool:
    if not source.head.startswith(b"PK\x03\x04"):
        return False
    record = _pickle_record(source.archive)
    # TorchScript has its constants in a pickle of their own.
    return record is not None and record.name.removesuffix("data.pkl") + "constants.pkl" not in source.archive.records


def _open(source: Source) -> Opened:
    archive = source.archive
    prefix = _prefix(archive)
    ours = prefix + _CHECKSUMS in archive.records
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
            return Storage(name, 0, lambda: torch.empty(0, dtype=torch.uint8))
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


# Writing


class _StorageId:
    """Stands for one record in the pickle."""

    def __init__(self, dtype: torch.dtype, key: str, nbytes: int) -> None:
        name = _LEGACY_STORAGES.get(dtype)
        self.typed = name is not None
        cls = getattr(torch, name) if name else torch.UntypedStorage
        self.identifier = ("storage", cls, key, "cpu", nbytes // dtype.itemsize if name else nbytes)


class _TensorRef:
    """Pickles as the call that torch.load makes to rebuild one tensor."""

    function: Callable[..., Any]
    args: tuple[Any, ...]

    def __init__(
        self, storage: _StorageId, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        hooks: OrderedDict[str, object] = OrderedDict()
        self.function = torch._utils._rebuild_tensor_v2 if storage.typed else torch._utils._rebuild_tensor_v3
        self.args = (storage, 0, shape, stride, False, hooks)
        if not storage.typed:
            self.args += (dtype,)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class _QuantizedRef(_TensorRef):
    """Pickles as the call that torch.load makes to rebuild a tensor of a quantized dtype."""

    def __init__(
        self, storage: _StorageId, shape: tuple[int, ...], stride: tuple[int, ...], quantizer: tuple[Any, ...]
    ) -> None:
        self.function = torch._utils._rebuild_qtensor
        self.args = (storage, 0, shape, stride, quantizer, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        return value.identifier if isinstance(value, _StorageId) else None


_LEGACY_STORAGES = {
    torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage", torch.int16:
    "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage", torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage", torch.complex128: "ComplexDoubleStorage", torch.qint8: "QInt8Storage",
    torch.quint8: "QUInt8Storage", torch.qint32: "QInt32Storage", torch.quint4x2: "QUInt4x2Storage",
    torch.quint2x4: "QUInt2x4Storage",
}  # fmt: skip


def write(stream: BinaryIO, contents: Contents) -> None:
    """Write a state_dict so that `torch.load(weights_only=True)` gives it back as an OrderedDict.

    At most one tensor at a time is in memory, and only a block of what is copied as it is. Storages come first and the
    pickle last, since only a tensor that has been read says how it lies in memory; readers find records through the
    directory, whatever their order.
    """
    writer = _Writer(ArchiveWriter(stream, _ALIGNMENT))
    state_dict: OrderedDict[str, object] = OrderedDict()
    specs = contents.specs()
    for key in contents.source:
        extent = contents.extent(key)
        if extent is not None:
            state_dict[key] = writer.copied(extent, specs[key], contents.alias(key))
        else:
            state_dict[key] = writer.tensor(contents.read(key), contents.alias(key))
    record = dict(contents.record)
    if contents.hidden is not None:
        record["hidden"] = {key: writer.tensor(tensor, None) for key, tensor in contents.hidden.items()}
    if contents.metadata:
        record["metadata"] = writer.tree(contents.metadata)
    versions: OrderedDict[str, Any] = OrderedDict((path, dict(entry)) for path, entry in contents.versions.items())
    if record:
        versions[""] = {**versions.get("", {}), OWN: record}
    state_dict._metadata = versions  # type: ignore[attr-defined]
    writer.finish(state_dict)


class _Writer:
    def __init__(self, archive: ArchiveWriter) -> None:
        self.archive = archive
        self.count = 0
        self.written: dict[object, _TensorRef] = {}

    def tensor(self, tensor: Tensor, alias: object | None) -> _TensorRef:
        if alias is not None and alias in self.written:
            return self.written[alias]
        made = self._quantized(tensor) if tensor.is_quantized else self._plain(tensor)
        if alias is not None:
            self.written[alias] = made
        return made

    def copied(self, extent: Extent, spec: Spec, alias: object | None) -> _TensorRef:
        """A tensor whose bytes go from file to file."""
        if alias is not None and alias in self.written:
            return self.written[alias]
        storage = self._new(spec.dtype, extent.nbytes)
        self.archive.write_pieces(f"{_ROOT}data/{storage.identifier[2]}", pieces(extent), extent.nbytes)
        made = _TensorRef(storage, spec.shape, contiguous(spec.shape), spec.dtype)
        if alias is not None:
            self.written[alias] = made
        return made

    def tree(self, value: Any) -> Any:
        if isinstance(value, LazyTensor):
            value = value.read()
        if isinstance(value, Tensor):
            return self.tensor(value, None)
        if isinstance(value, Mapping):
            return {key: self.tree(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(item) for item in value]
        return value

    def finish(self, state_dict: object) -> None:
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump(state_dict)
        small = {"data.pkl": buffer.getvalue(), ".format_version": b"1", ".storage_alignment": b"%d" % _ALIGNMENT}
        small |= {"byteorder": sys.byteorder.encode(), "version": b"3\n", _CHECKSUMS: b"1"}
        for name, data in small.items():
            self.archive.write(_ROOT + name, data)
        self.archive.finish()

    def _plain(self, tensor: Tensor) -> _TensorRef:
        data, stride = plain_bytes(tensor)
        return _TensorRef(self._store(data, tensor.dtype), tuple(tensor.shape), stride, tensor.dtype)

    def _quantized(self, tensor: Tensor) -> _TensorRef:
        tensor = tensor.cpu().contiguous()
        raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        size = tensor.numel() * tensor.dtype.itemsize
        start = tensor.storage_offset() * tensor.dtype.itemsize
        if tensor.dtype in (
            torch.quint4x2,
            torch.quint2x4,
        ):  # several values per byte; the storage knows how many bytes
            start, size = 0, raw.numel()
        storage = self._store(raw[start : start + size], tensor.dtype)
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            quantizer: tuple[Any, ...] = (torch.per_tensor_affine, tensor.q_scale(), tensor.q_zero_point())
        else:
            scales = self.tensor(tensor.q_per_channel_scales(), None)
            zero_points = self.tensor(tensor.q_per_channel_zero_points(), None)
            quantizer = (tensor.qscheme(), scales, zero_points, tensor.q_per_channel_axis())
        return _QuantizedRef(storage, tuple(tensor.shape), tuple(tensor.stride()), quantizer)

    def _store(self, data: Tensor, dtype: torch.dtype) -> _StorageId:
        storage = self._new(dtype, data.numel())
        self.archive.write(f"{_ROOT}data/{storage.identifier[2]}", as_memory(data))
        return storage

    def _new(self, dtype: torch.dtype, nbytes: int) -> _StorageId:
        self.count += 1
        return _StorageId(dtype, str(self.count - 1), nbytes)


_ROOT = "archive/"
