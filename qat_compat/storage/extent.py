"""Where the bytes of tensors lie in files, and where they are to go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qat_compat.storage.mapped import MappedFile

__all__ = ["BLOCK", "CAN_STREAM", "GAP", "Extent", "Read", "pieces"]

CAN_STREAM = hasattr(os, "preadv")  # where it is missing, tensors are copied from the mapping

BLOCK = 4 << 20  # bytes of one system call
GAP = 4 << 10  # bytes between neighbours that are cheaper to read than to skip


class Extent(NamedTuple):
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


class Read(NamedTuple):
    """One tensor to read.

    Args:
        extent: Its bytes.
        dtype: What they are.
        target: Where they go: contiguous, on the CPU or a CUDA device, of the same shape; of another dtype where a
            conversion is wanted.
        each: Called with the number of a first row (of dimension 0) and of the one behind the last, when these rows of
            the target have been read and are still in the cache; by any thread, in any order.
    """

    extent: Extent
    dtype: torch.dtype
    target: Tensor
    each: Callable[[int, int], object] | None = None

    @property
    def is_plain(self) -> bool:
        return self.dtype == self.target.dtype and self.each is None


def pieces(extent: Extent) -> Iterator[memoryview]:
    """The bytes of one tensor, a block at a time, each in the memory of the one before.

    Raises:
        CheckpointError: As for :func:`read_all`.
    """
    if extent.check is not None:
        extent.check()
    yield from extent.file.blocks(extent.start, extent.nbytes, BLOCK)
