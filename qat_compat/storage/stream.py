"""Reading many tensors at once: the file's bytes straight into the memory of their targets, by several threads.

Reads go in the order of the file, in blocks that keep every thread busy; neighbours that are small share one system
call. Nothing is mapped, so a page is touched once, by the thread that fills it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qat_compat.memory import bytes_of
from qat_compat.storage.mapped import MappedFile
from qat_compat.threads import THREADS, in_threads

__all__ = ["CAN_STREAM", "Extent", "Read", "pieces", "read_all"]

CAN_STREAM = hasattr(os, "preadv")  # where it is missing, tensors are copied from the mapping

_BLOCK = 4 << 20  # bytes of one system call
_ROWS = 1 << 20  # bytes of rows that are still in the cache when they are looked at again
_GAP = 4 << 10  # bytes between neighbours that are cheaper to read than to skip
_VECTORS = 512  # buffers of one system call; systems allow 1024


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the bytes of one tensor lie in a file: end to end, in row-major order and this machine's byte order.

    Args:
        file: The file.
        start: Offset of the first byte.
        nbytes: Their number.
        check: Compares them with a checksum and raises where they differ; None where the file has none to trust.
    """

    file: MappedFile
    start: int
    nbytes: int
    check: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """One tensor to read.

    Args:
        extent: Its bytes.
        dtype: What they are.
        target: Where they go: contiguous, on the CPU, of the same shape; of another dtype where a conversion is wanted.
        each: Called with the number of the first row (of dimension 0) and the rows, when they have been read; by any
            thread, in any order.
    """

    extent: Extent
    dtype: torch.dtype
    target: Tensor
    each: Callable[[int, Tensor], None] | None = None

    @property
    def is_plain(self) -> bool:
        return self.dtype == self.target.dtype and self.each is None


def read_all(reads: Sequence[Read]) -> None:
    """Fill the target of every read; checksums are compared before the first byte is written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "bytes")
        ...     _ = path.write_bytes(bytes([0, 1, 2, 3]))
        ...     read = Read(Extent(MappedFile(path), 1, 3), torch.uint8, torch.zeros(3))
        ...     read_all([read])
        >>> read.target
        tensor([1., 2., 3.])

    Raises:
        CheckpointError: The file ends early, was changed since it was opened, or differs from a checksum.
    """
    files = list({id(r.extent.file): r.extent.file for r in reads}.values())
    turn = {id(file): number for number, file in enumerate(files)}
    ordered = sorted((r for r in reads if r.extent.nbytes), key=lambda r: (turn[id(r.extent.file)], r.extent.start))
    threads = THREADS if sum(r.extent.nbytes for r in ordered) > _BLOCK else 1
    in_threads((r.extent.check for r in ordered if r.extent.check is not None), threads)
    for file in files:
        file.check_unchanged()
    in_threads(_tasks(ordered), threads)
    for file in files:
        file.check_unchanged()


def pieces(extent: Extent) -> Iterator[memoryview]:
    """The bytes of one tensor, a block at a time, each in the memory of the one before.

    Raises:
        CheckpointError: As for :func:`read_all`.
    """
    if extent.check is not None:
        extent.check()
    buffer = memoryview(bytearray(min(_BLOCK, extent.nbytes)))
    for at in range(0, extent.nbytes, _BLOCK):
        piece = buffer[: extent.nbytes - at]
        extent.file.read_into(extent.start + at, [piece])
        yield piece
    extent.file.check_unchanged()


def _tasks(ordered: Sequence[Read]) -> Iterator[Callable[[], None]]:
    yield from _gathers([r for r in ordered if r.is_plain])
    for read in ordered:
        if not read.is_plain:
            rows = read.target if read.target.dim() else read.target.view(1)
            step = max(1, _ROWS * len(rows) // read.extent.nbytes)
            for first in range(0, len(rows), step):
                yield partial(_rows, read, first, rows[first : first + step])


def _gathers(reads: Sequence[Read]) -> Iterator[Callable[[], None]]:
    """Blocks of bytes, each the end of one tensor, the begin of another and what is between them."""
    file: MappedFile | None = None
    start = end = 0
    buffers: list[memoryview] = []
    for read in reads:
        extent = read.extent
        gap = extent.start - end
        apart = extent.file is not file or not 0 <= gap <= _GAP
        if file is not None and (apart or end - start >= _BLOCK or len(buffers) > _VECTORS):
            yield partial(file.read_into, start, buffers)
            file = None
        if file is None:
            file, start, buffers = extent.file, extent.start, []
        elif gap:
            buffers.append(memoryview(bytearray(gap)))
        left = bytes_of(read.target)
        end = extent.start + extent.nbytes
        while end - start > _BLOCK + _BLOCK // 2:  # no small rest
            room = _BLOCK - (end - len(left) - start)
            yield partial(file.read_into, start, [*buffers, left[:room]])
            left, start, buffers = left[room:], start + _BLOCK, []
        buffers.append(left)
    if file is not None:
        yield partial(file.read_into, start, buffers)


def _rows(read: Read, first: int, target: Tensor) -> None:
    """Some rows: read, converted where the dtypes differ, and looked at while they are in the cache."""
    extent = read.extent
    length = target.numel() * read.dtype.itemsize
    offset = extent.start + first * (length // max(len(target), 1))
    if read.dtype == target.dtype:
        extent.file.read_into(offset, [bytes_of(target)])
    else:
        found = torch.empty(target.shape, dtype=read.dtype)
        extent.file.read_into(offset, [bytes_of(found)])
        target.copy_(found)
    if read.each is not None:
        read.each(first, target)
