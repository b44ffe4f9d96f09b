"""Host memory for tensors: fresh memory that is cheap to fill, and copies with several threads.

Writing to memory that was never touched costs a page fault per page. Asking for huge pages (Linux, `madvise`) makes
that 512 times rarer, and filling fresh memory several times faster. Tensors share mappings, so that small ones have
huge pages too and no page is left half used.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qat_compat.threads import THREADS, in_threads

__all__ = ["bytes_of", "copy_all", "empty_like_spec", "fresh_tensors", "populate", "read_numbers"]

_LARGE = 4 << 20  # bytes from which huge pages and threads pay
_MAPPING = 256 << 20  # tensors share mappings up to this size, so that what is freed early is given back early
_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64  # as torch's own allocator
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it


def fresh_tensors(specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Uninitialised tensors on the CPU, each with a storage of its own, together on huge pages where that pays.

    The memory goes back to the system when the last tensor of a mapping is gone. As with `torch.frombuffer`, a storage
    cannot be resized.

    Example:
        >>> import torch
        >>> first, second = fresh_tensors([((2, 3), torch.float32), ((4,), torch.int8)])
        >>> first.shape, second.untyped_storage().nbytes()
        (torch.Size([2, 3]), 4)

    Args:
        specs: Shape and dtype of each.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
    if _MADV_HUGEPAGE is None or sum(sizes) < _LARGE:
        return [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in specs]
    places: list[tuple[int, int]] = []  # number of the mapping, offset in it
    lengths: list[int] = []
    for size in sizes:
        if not lengths or (lengths[-1] and lengths[-1] + size > _MAPPING):
            lengths.append(0)
        places.append((len(lengths) - 1, lengths[-1]))
        lengths[-1] += -(-size // _ALIGNMENT) * _ALIGNMENT
    mappings = [_mapping(length) for length in lengths]
    return [
        torch.frombuffer(mappings[number], dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
        if size
        else torch.empty(shape, dtype=dtype, device="cpu")
        for (shape, dtype), size, (number, offset) in zip(specs, sizes, places, strict=True)
    ]


def _mapping(length: int) -> mmap.mmap:
    whole = -(-max(length, 1) // _HUGE_PAGE) * _HUGE_PAGE  # the kernel aligns what is a multiple of a huge page
    try:
        made = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{whole} bytes: {error.strerror}") from error
    assert _MADV_HUGEPAGE is not None
    with suppress(OSError):  # a kernel without transparent huge pages
        made.madvise(_MADV_HUGEPAGE)
    return made


def empty_like_spec(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, like: Tensor | None = None
) -> Tensor:
    """An uninitialised tensor, with the strides of `like` if that is given.

    Example:
        >>> import torch
        >>> empty_like_spec((2, 3), torch.float32, torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    if like is not None and tuple(like.shape) == shape:
        return torch.empty_like(like, dtype=dtype, device=device, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=device)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, writable; it must not outlive the tensor.

    Example:
        >>> import torch
        >>> values = torch.zeros(2, dtype=torch.int8)
        >>> bytes_of(values)[1] = 7
        >>> values.tolist()
        [0, 7]
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_numbers(values: Sequence[Tensor]) -> list[Any]:
    """`tolist()` of tensors of one shape and dtype, with one wait for each device that they lie on.

    Example:
        >>> import torch
        >>> read_numbers([torch.tensor(True), torch.ones(2).isnan().any()])
        [True, False]
    """
    by_device: dict[torch.device, list[int]] = {}
    for number, value in enumerate(values):
        by_device.setdefault(value.device, []).append(number)
    found: dict[int, Any] = {}
    for numbers in by_device.values():
        found.update(zip(numbers, torch.stack([values[number] for number in numbers]).tolist(), strict=True))
    return [found[number] for number in range(len(values))]


def populate(tensors: Iterable[Tensor]) -> None:
    """Have the pages behind tensors over a mapped file in memory and in the page table, where the system can.

    Without it each page costs a fault, and perhaps a wait for the disk, when it is first touched.

    Example:
        >>> import torch
        >>> populate([torch.zeros(3)])
    """
    if _MADV_HUGEPAGE is None:  # not Linux
        return
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, tensor.data_ptr() + tensor.nbytes - start, _MADV_POPULATE_READ)  # an older kernel refuses


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into its first, converting dtype and device.

    Large ones are copied with several threads; small ones cross to another device together.

    Example:
        >>> import torch
        >>> target = torch.zeros(2)
        >>> copy_all([(target, torch.ones(2, dtype=torch.float16))])
        >>> target
        tensor([1., 1.])
    """
    large: list[tuple[Tensor, Tensor]] = []
    across: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for target, value in pairs:
        is_large = value.nbytes >= _LARGE
        if value.is_cpu and target.is_cpu and is_large:
            large.append((target, value))
        elif value.is_cpu and not target.is_cpu and not is_large:
            across.setdefault(target.device, []).append((target, value))
        else:
            target.copy_(value)
    # the order of the file: neighbours are read ahead together
    in_threads((partial(_copy, target, value) for target, value in large), threads=min(len(large), THREADS))
    for device, small in across.items():
        _copy_across(small, device)


def _copy_across(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Small tensors to a device in one transfer: each one of its own would be waited for."""
    values = [value.detach().contiguous() for _, value in pairs]
    starts = [0, *accumulate(-(-value.nbytes // _ALIGNMENT) * _ALIGNMENT for value in values)]
    packed = torch.empty(starts[-1], dtype=torch.uint8, device="cpu")
    memory = bytes_of(packed)
    for start, value in zip(starts, values, strict=False):
        memory[start : start + value.nbytes] = bytes_of(value)
    there = packed.to(device)
    for start, (target, _), value in zip(starts, pairs, values, strict=False):
        target.copy_(there[start : start + value.nbytes].view(value.dtype).view(value.shape))


def _copy(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():  # a thread has a grad mode of its own
        target.copy_(value)
