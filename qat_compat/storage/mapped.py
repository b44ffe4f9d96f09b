"""A regular file, mapped into memory and read without running or changing anything."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError

__all__ = ["MappedFile"]

_BLOCK = 256 << 10  # bytes that are still in the cache when they are looked at
_SPARSE_FROM = 1 << 30
_SPARSE_RATIO = 64


class MappedFile:
    """The bytes of one file.

    Tensors lie over a private mapping (copy on write), made when the first of them is asked for: they cost no memory
    until they are touched, and a write to them does not reach the file. Every access first looks whether the file is
    still what was opened, because touching a page that has been cut off kills the process.

    Args:
        path: A regular file; anything else (a pipe, a device, a folder) is refused without waiting for it.

    Raises:
        CheckpointError: The file cannot be opened, is empty, or is not a regular file.
        LimitError: The file is almost all holes: it claims far more bytes than the disk holds for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a pipe that nobody writes to returns at once instead of hanging.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        try:
            self._close = weakref.finalize(self, os.close, descriptor)
        except BaseException:  # an interrupt, after which nobody else would close it
            os.close(descriptor)
            raise
        self._fd = descriptor
        self._state = os.fstat(self._fd)
        self.size = self._state.st_size
        self._check_kind()

    def __len__(self) -> int:
        return self.size

    def read(self, start: int, length: int) -> bytes:
        """A copy of `length` bytes."""
        self._check_range(start, length)
        if not hasattr(os, "preadv"):
            return self._map[start : start + length]
        found = bytearray(length)
        self.read_into(start, [memoryview(found)])
        return bytes(found)

    def blocks(self, start: int, length: int, size: int = _BLOCK) -> Iterator[memoryview]:
        """`length` bytes, at most `size` at a time, each block in the memory of the one before; for several threads."""
        self._check_range(start, length)
        if not hasattr(os, "preadv"):
            for at in range(start, start + length, size):
                yield memoryview(self.read(at, min(size, start + length - at)))
            return
        buffer = memoryview(bytearray(min(size, length)))
        for at in range(start, start + length, size):
            block = buffer[: start + length - at]
            self.read_into(at, [block])
            yield block
        self.check_unchanged()

    def crc32(self, start: int, length: int) -> int:
        """CRC-32 of `length` bytes: of a copy, since the file may be cut while they are looked at."""
        crc = 0
        for block in self.blocks(start, length):
            crc = zlib.crc32(block, crc)
        return crc

    def tensor(self, start: int, length: int) -> Tensor:
        """`length` bytes as a uint8 tensor over the mapping."""
        self._check_range(start, length)
        if length == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self._private, dtype=torch.uint8, count=length, offset=start)

    def mapped(self) -> mmap.mmap:
        """A private mapping of the caller's own: what is written to it is seen nowhere else."""
        self._check_range(0, self.size)
        return self._mapped(mmap.ACCESS_COPY)

    @cached_property
    def _map(self) -> mmap.mmap:
        return self._mapped(mmap.ACCESS_READ)

    @cached_property
    def _private(self) -> mmap.mmap:
        return self._mapped(mmap.ACCESS_COPY)

    def _mapped(self, access: int) -> mmap.mmap:
        """The file in the address space, for which the system keeps one more descriptor."""
        try:
            return mmap.mmap(self._fd, self.size, access=access)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def read_into(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers one after the other with the bytes from `start` on, without the mapping; for several threads."""
        while buffers:
            try:
                count = os.preadv(self._fd, buffers, start)
            except OSError as error:
                raise CheckpointError(
                    "the file cannot be read", file=self.path, found=error, remedy="check the disk or the mount"
                ) from error
            if count == 0:
                self._check_range(start, 1)
            start += count
            buffers = _rest(buffers, count)

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened."""
        self._check_range(0, 0)

    def buffer(self) -> mmap.mmap:
        """All bytes, for slicing."""
        self._check_range(0, self.size)
        return self._map

    def find_last(self, needle: bytes, start: int, end: int) -> int:
        """Offset of the last occurrence of `needle` in `start:end`, or -1."""
        found = self.read(start, end - start).rfind(needle)
        return found if found < 0 else start + found

    def _check_kind(self) -> None:
        mode = self._state.st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(
                "not a regular file",
                file=self.path,
                expected="a regular file, or a folder with shards",
                found=_kind(mode),
                remedy="write its content to a file first",
            )
        if self.size == 0:
            raise CheckpointError(
                "the file is empty",
                file=self.path,
                expected="a checkpoint",
                found="0 bytes",
                remedy="the writer did not finish, or the download failed; get a fresh copy",
            )
        on_disk = getattr(self._state, "st_blocks", 0) * 512
        if self.size >= _SPARSE_FROM and 0 < on_disk < self.size // _SPARSE_RATIO:
            raise LimitError(
                "the file is almost all holes",
                file=self.path,
                expected=f"about {self.size} bytes on disk",
                found=f"{on_disk} bytes on disk",
                remedy="the copy was interrupted, or the file was made to exhaust memory; get a fresh copy",
            )

    def _check_range(self, start: int, length: int) -> None:
        now = os.fstat(self._fd)
        if now.st_size != self.size or now.st_mtime_ns != self._state.st_mtime_ns:
            raise CheckpointError(
                "the file was changed while it was open",
                file=self.path,
                expected=f"{self.size} bytes, as when it was opened",
                found=f"{now.st_size} bytes, modified since",
                remedy="open it again once its writer is done",
            )
        if start < 0 or length < 0 or start + length > self.size:
            raise CheckpointError(
                "the file is cut short",
                file=self.path,
                expected=f"at least {start + length} bytes",
                found=f"{self.size} bytes",
                remedy="the download or the copy was interrupted; get a fresh copy",
            )


def _rest(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What `count` bytes leave unfilled."""
    left: list[memoryview] = []
    for buffer in buffers:
        if count < len(buffer):
            left.append(buffer[count:])
        count = max(0, count - len(buffer))
    return left


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    code = error.errno if isinstance(error, OSError) else None
    message = "no such file" if code in (errno.ENOENT, errno.ENOTDIR) else "the file cannot be opened"
    remedy = "check the path" if code in (errno.ENOENT, errno.ENOTDIR) else "check the path and its permissions"
    if code in (errno.EMFILE, errno.ENFILE):
        remedy = "allow this process to have more files open at a time (`ulimit -n`)"
    return CheckpointError(message, file=path, found=error, remedy=remedy)


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe (FIFO)"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((word for test, word in kinds if test(mode)), "a special file")
