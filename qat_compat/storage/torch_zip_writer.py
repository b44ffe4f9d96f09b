"""Writing torch's own file format since 1.6: storages first, and a pickle that says how tensors lie in them."""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qat_compat.schema import Spec
from qat_compat.storage.archive_writer import ArchiveWriter
from qat_compat.storage.extent import Extent, pieces
from qat_compat.storage.lazy import HeldTensor, LazyTensor, contiguous
from qat_compat.storage.standins import OWN
from qat_compat.storage.torch_zip import CHECKSUMS
from qat_compat.storage.writing import Contents, as_memory, check_tensor, is_wrapper, plain_bytes

__all__ = ["write"]

_ROOT = "archive/"
_ALIGNMENT = 64


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
    state_dict: OrderedDict[str, object] = OrderedDict(contents.objects or {})
    specs = contents.specs()
    for key in contents.source if contents.objects is None else ():
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
        try:
            _Pickler(buffer, self).dump(state_dict)
        except AttributeError as error:  # so Python says that it cannot pickle what is local to a function
            raise pickle.PicklingError(str(error)) from error
        small = {"data.pkl": buffer.getvalue(), ".format_version": b"1", ".storage_alignment": b"%d" % _ALIGNMENT}
        # the mark comes last: there, readers look whether the directory has lost it
        small |= {"byteorder": sys.byteorder.encode(), "version": b"3\n", CHECKSUMS: b"1"}
        for name, data in small.items():
            self.archive.write(_ROOT + name, data)
        self.archive.finish()

    def _plain(self, tensor: Tensor) -> _TensorRef:
        data, stride = plain_bytes(tensor)
        return _TensorRef(self._store(data, tensor.dtype), tuple(tensor.shape), stride, tensor.dtype)

    def _quantized(self, tensor: Tensor) -> _TensorRef:
        tensor = tensor.cpu().contiguous()
        raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
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


class _Pickler(pickle.Pickler):
    """Hands the bytes of tensors to the archive, those inside of other objects, too."""

    def __init__(self, stream: BinaryIO, writer: _Writer) -> None:
        super().__init__(stream, protocol=2)
        self.writer = writer

    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        return value.identifier if isinstance(value, _StorageId) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or is_wrapper(value):
            return NotImplemented  # a tensor subclass pickles itself, and the tensors in it come here
        check_tensor("a tensor in an object", value)
        return self.writer.tensor(value, HeldTensor(value).alias).__reduce__()
