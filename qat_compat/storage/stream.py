"""Reading many tensors at once: the file's bytes straight into the memory of their targets, by several threads.

Reads go in the order of the file, in blocks that keep every thread busy; neighbours that are small share one system
call. Nothing is mapped, so a page is touched once, by the thread that fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from qat_compat.memory import bytes_of
from qat_compat.storage.extent import BLOCK, GAP, Read
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.ring import fill_through_ring
from qat_compat.threads import THREADS, in_threads

__all__ = ["read_all"]

_ROWS = 512 << 10  # bytes of rows that are still in the cache when they are looked at twice more
_VECTORS = 512  # buffers of one system call; systems allow 1024


def read_all(reads: Sequence[Read]) -> None:
    """Fill the target of every read; checksums are compared before the first byte is written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from qat_compat.storage.extent import Extent
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
    by_file: dict[MappedFile, list[Read]] = {}
    for read in reads:
        if read.extent.nbytes:
            by_file.setdefault(read.extent.file, []).append(read)
    files = list(by_file)
    ordered = [r for file in files for r in sorted(by_file[file], key=lambda r: r.extent.start)]
    threads = THREADS if sum(r.extent.nbytes for r in ordered) > BLOCK else 1
    in_threads((r.extent.check for r in ordered if r.extent.check is not None), threads)
    for file in files:
        file.check_unchanged()
    in_threads(_tasks([r for r in ordered if r.target.is_cpu]), threads)
    for device in dict.fromkeys(r.target.device for r in ordered if not r.target.is_cpu):
        fill_through_ring([r for r in ordered if r.target.device == device], device)
    for file in files:
        file.check_unchanged()


def _tasks(ordered: Sequence[Read]) -> Iterator[Callable[[], None]]:
    plain: list[Read] = []
    others: list[Read] = []
    for read in ordered:
        (plain if read.is_plain else others).append(read)
    yield from _gathers(plain)
    for read in others:
        count = len(read.target) if read.target.dim() else 1
        step = max(1, BLOCK * count // read.extent.nbytes)
        for first in range(0, count, step):
            yield partial(_fill_rows, read, first, min(first + step, count))


def _gathers(reads: Sequence[Read]) -> Iterator[Callable[[], None]]:
    """Blocks of bytes, each the end of one tensor, the begin of another and what is between them."""
    file: MappedFile | None = None
    start = end = 0
    buffers: list[memoryview] = []
    for read in reads:
        extent = read.extent
        gap = extent.start - end
        apart = extent.file is not file or not 0 <= gap <= GAP
        if file is not None and (apart or end - start >= BLOCK or len(buffers) > _VECTORS):
            yield partial(file.read_into, start, buffers)
            file = None
        if file is None:
            file, start, buffers = extent.file, extent.start, []
        elif gap:
            buffers.append(memoryview(bytearray(gap)))
        left = bytes_of(read.target)
        end = extent.start + extent.nbytes
        while end - start > BLOCK + BLOCK // 2:  # no small rest
            room = BLOCK - (end - len(left) - start)
            yield partial(file.read_into, start, [*buffers, left[:room]])
            left, start, buffers = left[room:], start + BLOCK, []
        buffers.append(left)
    if file is not None:
        yield partial(file.read_into, start, buffers)


def _fill_rows(read: Read, first: int, end: int) -> None:
    """Some rows, a few at a time: converted where the dtypes differ, and looked at while they are in the cache."""
    extent, target = read.extent, read.target if read.target.dim() else read.target.view(1)
    length = extent.nbytes // len(target)
    step = max(1, _ROWS // length)
    memory = bytes_of(target)
    found = None
    if read.dtype != target.dtype:
        found = torch.empty((min(step, end - first), *target.shape[1:]), dtype=read.dtype, device="cpu")
        memory = bytes_of(found)
    for at in range(first, end, step):
        rows = min(step, end - at)
        if found is None:
            extent.file.read_into(extent.start + at * length, [memory[at * length : (at + rows) * length]])
        else:
            extent.file.read_into(extent.start + at * length, [memory[: rows * length]])
            target[at : at + rows].copy_(found[:rows])
        if read.each is not None:
            read.each(at, at + rows)
