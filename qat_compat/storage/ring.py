"""Reading onto an accelerator: through slots of pinned host memory, while those before are on the bus.

Reader threads fill slots with bytes of the file, one thread hands full slots to the device's copy engine, and a slot
is filled again only when the event behind its copies has passed. Large tensors go straight into their targets; small
ones share a slot, cross the bus in one transfer and are spread on the device by one call. The host waits once, at the
end. The slots are allocated once in a process, since pinning costs more than reading.

Everything that is asked of a device (streams, events) is asked of `torch.get_device_module`, so that the same code
runs on the CPU, whose streams do nothing.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat_compat.memory import bytes_of
from qat_compat.storage.extent import GAP, Read

__all__ = ["fill_through_ring"]

_SLOT = 4 << 20  # bytes; the bus is at its full speed from here on
_SLOTS = 16  # twice as many as readers: one half is filled while the other crosses the bus
_READERS = min(8, os.cpu_count() or 1)
_ALIGNMENT = 16  # the largest element there is
_PARTS = 512  # of one slot; systems take 1024 buffers in one call, and there may be a gap before each
_using = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of one tensor in one slot: `length` of them, from `offset` of the tensor on, at `place` in the slot."""

    read: Read
    offset: int
    length: int
    place: int

    @property
    def start(self) -> int:
        return self.read.extent.start + self.offset

    @property
    def is_plain(self) -> bool:
        return self.read.dtype == self.read.target.dtype

    def target(self) -> Tensor:
        """The elements that they become, flat; as bytes where they stay what they are."""
        flat = self.read.target.detach().view(-1)
        if self.is_plain:
            return flat.view(torch.uint8)[self.offset : self.offset + self.length]
        size = self.read.dtype.itemsize
        return flat[self.offset // size : (self.offset + self.length) // size]

    def value(self, slot: Tensor) -> Tensor:
        """The bytes in (a copy of) the slot, as what they are."""
        found = slot[self.place : self.place + self.length]
        return found if self.is_plain else found.view(self.read.dtype)


class _Slot:
    """Host memory, pinned where there is a bus, and the event behind the copies that were made from it last."""

    def __init__(self, pinned: bool) -> None:
        self.memory = torch.empty(_SLOT, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.copied: Any = None

    def fill(self, parts: Sequence[_Part]) -> None:
        """Read the bytes of neighbours in one file, as soon as the slot is free."""
        if self.copied is not None:
            self.copied.synchronize()
        memory = bytes_of(self.memory)
        buffers: list[memoryview] = []
        end = parts[0].start
        for part in parts:
            if part.start > end:
                buffers.append(memoryview(bytearray(part.start - end)))
            buffers.append(memory[part.place : part.place + part.length])
            end = part.start + part.length
        parts[0].read.extent.file.read_into(parts[0].start, buffers)


@cache
def _slots(pinned: bool) -> tuple[_Slot, ...]:
    return tuple(_Slot(pinned) for _ in range(_SLOTS))


def fill_through_ring(reads: Sequence[Read], device: torch.device) -> None:
    """Fill the targets of reads, all on one device, in the order of their files; the values are there on return.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from qat_compat.storage.extent import Extent
        >>> from qat_compat.storage.mapped import MappedFile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "bytes")
        ...     _ = path.write_bytes(bytes([0, 1, 2, 3]))
        ...     read = Read(Extent(MappedFile(path), 1, 3), torch.uint8, torch.zeros(3))
        ...     fill_through_ring([read], torch.device("cpu"))
        >>> read.target
        tensor([1., 2., 3.])

    Args:
        reads: Their `each` gets whole tensors, on a stream of its own, and must not wait for the device.
        device: Where the targets are.

    Raises:
        CheckpointError: A file cannot be read. Nothing is being copied any more on return.
    """
    with _using:  # one load at a time has the slots
        _Ring(device).fill(reads)


class _Ring:
    """One load: its streams, and the queues between those who read and the one who hands on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self.free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self.full: queue.SimpleQueue[tuple[_Slot, list[_Part]] | BaseException] = queue.SimpleQueue()
        self.lock = threading.Lock()
        for slot in _slots(device.type != "cpu"):
            self.free.put(slot)

    def fill(self, reads: Sequence[Read]) -> None:
        groups = list(_groups(reads))
        left = {id(read): read.extent.nbytes for read in reads}
        current = self.module.current_stream(self.device)
        copies, looks = self._stream(), self._stream()
        for stream in (copies, looks):
            stream.wait_stream(current)  # what used the targets' memory before
        waiting = iter(groups)
        with ThreadPoolExecutor(_READERS) as pool:
            try:
                for _ in range(_READERS):
                    pool.submit(self._read, waiting)
                for _ in groups:
                    self._hand_on(left, copies, looks)
            finally:
                with self.lock:
                    deque(waiting, maxlen=0)  # after an error, nothing more is begun
                for _ in range(_READERS):
                    self.free.put(None)  # wakes who waits for a slot that no one will free
                for stream in (copies, looks):
                    self._event(stream).synchronize()

    def _stream(self) -> Any:
        return self.module.Stream() if self.device.type == "cpu" else self.module.Stream(self.device)

    def _event(self, stream: Any) -> Any:
        event = self.module.Event()
        event.record(stream)
        return event

    def _read(self, waiting: Iterator[list[_Part]]) -> None:
        """Fill slots until nothing is left to read, or until an end is called."""
        try:
            if self.device.type != "cpu":
                self.module.set_device(self.device)  # of this thread, which would wait for events on the first device
            while (slot := self.free.get()) is not None:
                with self.lock:
                    parts = next(waiting, None)
                if parts is None:
                    return
                slot.fill(parts)
                self.full.put((slot, parts))
        except BaseException as error:
            self.full.put(error)

    def _hand_on(self, left: dict[int, int], copies: Any, looks: Any) -> None:
        """Give the next full slot to the device; whole tensors are then looked at behind it."""
        taken = self.full.get()
        if isinstance(taken, BaseException):
            raise taken
        slot, parts = taken
        with torch.no_grad(), self.module.stream(copies):
            _copy(slot.memory, parts, self.device)
        slot.copied = self._event(copies)
        self.free.put(slot)
        for part in parts:
            left[id(part.read)] -= part.length
            if part.read.each is not None and not left[id(part.read)]:
                looks.wait_event(slot.copied)
                with torch.no_grad(), self.module.stream(looks):
                    part.read.each(0, len(part.read.target))


def _copy(slot: Tensor, parts: Sequence[_Part], device: torch.device) -> None:
    """Hand the bytes of a full slot to the device; nothing here waits for it."""
    if len(parts) == 1 and parts[0].is_plain:
        parts[0].target().copy_(parts[0].value(slot), non_blocking=True)
        return
    used = slot[: parts[-1].place + parts[-1].length]
    there = used if device.type == "cpu" else used.to(device, non_blocking=True)
    alike: dict[object, list[_Part]] = {}  # one call takes one pair of dtypes
    for part in parts:
        alike.setdefault(None if part.is_plain else (part.read.dtype, part.read.target.dtype), []).append(part)
    for group in alike.values():
        torch._foreach_copy_([part.target() for part in group], [part.value(there) for part in group])


def _groups(reads: Sequence[Read]) -> Iterator[list[_Part]]:
    """What goes through one slot: neighbours in one file, each at a place that fits every dtype."""
    parts: list[_Part] = []
    room = _SLOT
    for read in reads:
        extent = read.extent
        if parts:
            last = parts[-1]
            gap = extent.start - (last.start + last.length)
            if last.read.extent.file is not extent.file or not 0 <= gap <= GAP or len(parts) >= _PARTS:
                yield parts
                parts, room = [], _SLOT
        offset = 0
        while offset < extent.nbytes:
            if room < min(_ALIGNMENT, extent.nbytes - offset):
                yield parts
                parts, room = [], _SLOT
            length = min(room, extent.nbytes - offset)
            if length < extent.nbytes - offset:
                length -= length % _ALIGNMENT
            parts.append(_Part(read, offset, length, _SLOT - room))
            offset += length
            room -= -(-length // _ALIGNMENT) * _ALIGNMENT
    if parts:
        yield parts
