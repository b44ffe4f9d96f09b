"""Fresh host memory that is cheap to fill, and filling it with several threads.

Writing to memory that was never touched costs a page fault per page. Asking for huge pages (Linux, `madvise`) makes
that 512 times rarer, and a first copy several times faster.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["copy_all", "empty_like_spec"]

_LARGE = 4 << 20  # bytes from which huge pages and threads pay
_PAGE = mmap.PAGESIZE
_THREADS = min(4, os.cpu_count() or 1)
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)


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
        fresh = torch.empty_like(like, dtype=dtype, device=device, requires_grad=False)
    else:
        fresh = torch.empty(shape, dtype=dtype, device=device)
    if fresh.device.type == "cpu" and fresh.nbytes >= _LARGE:
        _advise(fresh)
    return fresh


def _advise(tensor: Tensor) -> None:
    """Ask for huge pages under a tensor; a kernel that has none ignores it."""
    if _MADV_HUGEPAGE is None or not sys.platform.startswith("linux"):
        return
    storage = tensor.untyped_storage()
    first = -(-storage.data_ptr() // _PAGE) * _PAGE
    length = (storage.data_ptr() + storage.nbytes() - first) // _PAGE * _PAGE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into its first, converting dtype and device; large ones with several threads.

    Example:
        >>> import torch
        >>> target = torch.zeros(2)
        >>> copy_all([(target, torch.ones(2, dtype=torch.float16))])
        >>> target
        tensor([1., 1.])
    """
    large: list[tuple[Tensor, Tensor]] = []
    for target, value in pairs:
        if target.nbytes < _LARGE or target.device.type != "cpu" or value.device.type != "cpu":
            target.copy_(value)
        else:
            large.append((target, value))
    if len(large) < 2 or _THREADS < 2:
        for target, value in large:
            target.copy_(value)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        # the order of the file: neighbours are read ahead together
        for done in [pool.submit(_copy, target, value) for target, value in large]:
            done.result()


def _copy(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)
