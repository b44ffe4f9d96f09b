"""Tensors that are known by shape and dtype, and read when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.schema import Spec
from qat_compat.storage.extent import CAN_STREAM, Extent
from qat_compat.storage.qtensor import Quantizer, rebuild_quantized
from qat_compat.storage.text import short

__all__ = [
    "HeldTensor",
    "LazyTensor",
    "LazyTensors",
    "Storage",
    "StoredTensor",
    "check_extent",
    "contiguous",
]

_MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 62
_PER_BYTE = {torch.quint4x2: 2, torch.quint2x4: 4}  # of the dtypes with several values in a byte
_MAX_EXPANSION = 64 << 20  # bytes that an expanded (stride 0) tensor may claim beyond what its storage holds


class LazyTensor:
    """A tensor that is read on demand.

    Example:
        >>> import torch
        >>> lazy = HeldTensor(torch.ones(2, 3))
        >>> lazy.spec, lazy.read().sum().item()
        (Spec(shape=(2, 3), dtype=torch.float32), 6.0)
    """

    __slots__ = ("spec",)

    spec: Spec

    def read(self) -> Tensor:
        """The tensor itself; it may be backed by the file and must not be written to."""
        raise NotImplementedError

    @property
    def alias(self) -> Hashable | None:
        """Equal for two tensors that are the same memory; None where that is not known."""
        return None

    def extent(self) -> Extent | None:
        """Where its bytes lie in a file, ready to be copied; None where they do not."""
        return None

    def __repr__(self) -> str:
        return f"<{self.spec}, not read>"


class HeldTensor(LazyTensor):
    """A tensor that is in memory already."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.spec = Spec(tuple(tensor.shape), tensor.dtype)
        self.tensor = tensor

    def read(self) -> Tensor:
        return self.tensor

    @property
    def alias(self) -> Hashable | None:
        tensor = self.tensor
        # Subclasses and tensors without data have no address that means anything.
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return None
        if tensor.device.type == "meta" or tensor.numel() == 0:
            return None
        return (
            tensor.data_ptr(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )


class Storage:
    """A run of bytes in a file, that several tensors may view.

    Args:
        name: The record that holds it, for messages.
        nbytes: Its length in bytes.
        load: Returns it as a uint8 tensor of that length.
        swap: Whether its elements are in the other byte order than this machine's.
        locate: Says where it lies in a file, where it lies there as it is.
    """

    __slots__ = ("load", "locate", "name", "nbytes", "swap")

    def __init__(
        self,
        name: str,
        nbytes: int,
        load: Callable[[], Tensor],
        *,
        swap: bool = False,
        locate: Callable[[], Extent | None] | None = None,
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self.load = load
        self.swap = swap
        self.locate = locate


class StoredTensor(LazyTensor):
    """A strided view of a :class:`Storage`; the view is checked here, so that reading it cannot leave the storage."""

    __slots__ = ("conj", "dense", "neg", "offset", "quantizer", "storage", "stride")

    def __init__(
        self,
        storage: Storage,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        *,
        stride: tuple[int, ...] | None = None,
        offset: int = 0,
        quantizer: Quantizer | None = None,
        conj: bool = False,
        neg: bool = False,
    ) -> None:
        packed = contiguous(shape)
        self.stride = packed if stride is None else stride
        self.dense = self.stride == packed
        check_extent(storage.name, storage.nbytes, dtype, shape, self.stride, offset)
        self.spec = Spec(shape, dtype)
        self.storage = storage
        self.offset = 0 if 0 in shape else offset  # that of an empty tensor may lie anywhere
        self.quantizer = quantizer
        self.conj = conj
        self.neg = neg

    @property
    def alias(self) -> Hashable | None:
        if 0 in self.spec.shape:
            return None
        return (id(self.storage), self.offset, self.stride, self.spec, self.conj, self.neg)

    def extent(self) -> Extent | None:
        storage = self.storage
        if storage.locate is None or not CAN_STREAM or storage.swap or self.quantizer or self.conj or self.neg:
            return None
        if not self.dense or (whole := storage.locate()) is None:
            return None
        size = self.spec.dtype.itemsize
        length = math.prod(self.spec.shape) * size
        if length == whole.nbytes:
            return whole
        return Extent(whole.file, whole.start + self.offset * size, length, whole.check)

    def read(self) -> Tensor:
        dtype = self.spec.dtype
        size = dtype.itemsize
        raw = self.storage.load()
        if self.storage.swap and size > 1:
            part = size // 2 if dtype.is_complex else size
            raw = raw.view(-1, part).flip(1).reshape(-1)
        elif raw.numel() and (raw.data_ptr() % size or raw.storage_offset() % size):
            raw = raw.clone()  # formats without alignment: kernels expect addresses that fit the element
        offset = (
            self.offset + raw.storage_offset() // size
        )  # offsets count from the memory's begin, not from the view's
        if self.quantizer is not None:
            return rebuild_quantized(raw, dtype, self.spec.shape, self.stride, offset, self.quantizer)
        # A storage may end in a part of an element (it was made of bytes); the view never reaches it.
        values = raw[: raw.numel() // size * size].view(dtype)
        tensor = values.as_strided(self.spec.shape, self.stride, offset)
        if self.conj:
            tensor = tensor.conj().resolve_conj()
        return torch.neg(tensor) if self.neg else tensor


class LazyTensors(Mapping[str, Tensor]):
    """A mapping that reads each tensor when it is asked for."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"{dict(self._tensors)!r}"


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense row-major tensor, in elements."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def check_extent(
    name: str, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    """Refuse a view that leaves its storage, or that claims far more memory than the storage has.

    Raises:
        CheckpointError: The view is malformed or leaves the storage.
        LimitError: Its strides blow few bytes up to very many.
    """
    last, count = offset, 1
    sound = type(offset) is int and 0 <= offset < _MAX_SIZE and len(shape) == len(stride) <= _MAX_DIMENSIONS
    for size, step in zip(shape, stride, strict=False):
        # `type`, not `isinstance`: a bool is no size. This runs for every tensor of a file.
        if type(size) is not int or type(step) is not int or not (0 <= size < _MAX_SIZE and 0 <= step < _MAX_SIZE):
            sound = False
            break
        last += (size - 1) * step
        count *= size
    if not sound:
        raise CheckpointError(
            "a tensor has a malformed shape",
            key=name,
            expected="sizes and strides of equal number, none of them negative",
            found=f"size {short(shape)}, stride {short(stride)}, offset {short(offset)}",
            remedy="the file is corrupt; get a fresh copy",
        )
    item, packed = dtype.itemsize, _PER_BYTE.get(dtype)
    if packed and stride == contiguous(shape) and offset == 0:
        last = math.prod(shape[:-1]) * -(-shape[-1] // packed) - 1 if shape else 0  # each row begins with a byte
    if count == 0:
        last = -1  # an empty tensor touches nothing, whatever its offset
    if (last + 1) * item > nbytes:
        raise CheckpointError(
            "a tensor reaches beyond its storage",
            key=name,
            expected=f"at most {nbytes} bytes",
            found=f"{(last + 1) * item} bytes ({str(dtype).removeprefix('torch.')}, size {shape}, stride {stride})",
            remedy="the file is corrupt; get a fresh copy",
        )
    if count * item > nbytes * (packed or 1) + _MAX_EXPANSION:
        raise LimitError(
            "a tensor claims far more memory than the file holds for it",
            key=name,
            expected=f"at most {nbytes + _MAX_EXPANSION} bytes",
            found=f"{count * item} bytes (size {shape}, stride {stride})",
            remedy="save the tensor as it is (`tensor.contiguous()`), or do not use this file",
        )
