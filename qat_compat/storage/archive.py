"""The directory of a ZIP archive (APPNOTE.TXT 6.3.10, ZIP64 included), checked before anything is read through it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.storage.extent import Extent
from qat_compat.storage.mapped import MappedFile

__all__ = ["Archive", "Record"]

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # central directory entry
_LOCAL = struct.Struct("<4s5H3L2H")  # local file header
_STORED, _DEFLATED = 0, 8
_FRESH_COPY = "the download or the copy was interrupted; get a fresh copy"
_MAX_INFLATED = 16 << 20  # a compressed record up to this size is always read; a larger one only up to _MAX_RATIO
_MAX_RATIO = 100


@dataclass(slots=True)
class Record:
    """One entry of an archive; `crc` is 0 where the writer did not compute it."""

    name: str
    header: int
    packed: int
    size: int
    crc: int
    method: int
    start: int = -1
    checked: bool = False


class Archive:
    """The records of a ZIP archive in `file[start:end]`.

    Args:
        file: The mapped file.
        start: Where the archive begins in it.
        end: Where it ends; the end of the file by default.
        verify: Check the CRC-32 of each record when it is first read.

    Raises:
        CheckpointError: The directory is cut short or contradicts itself.
    """

    def __init__(self, file: MappedFile, start: int = 0, end: int | None = None, *, verify: bool = False) -> None:
        self.file = file
        self.start = start
        self.end = file.size if end is None else end
        self.verify = verify
        self.records = self._directory()

    def read(self, record: Record) -> bytes:
        """A copy of the content of one record."""
        if record.method == _DEFLATED:
            return bytes(self._inflate(record))
        return bytes(self.file.read(self._data(record), record.size))

    def head(self, record: Record, length: int) -> bytes:
        """The first bytes of one record; of a compressed one, all of them."""
        if record.method == _DEFLATED:
            return bytes(self._inflate(record, most=length))
        return self.file.read(self.data_start(record), min(length, record.size))

    def tensor(self, record: Record) -> Tensor:
        """The content of one record as a uint8 tensor, over the file where it is not compressed."""
        if record.method == _DEFLATED:
            return torch.frombuffer(self._inflate(record) or bytearray(1), dtype=torch.uint8)[: record.size]
        return self.file.tensor(self._data(record), record.size)

    def extent(self, record: Record) -> Extent | None:
        """Where the content of one record lies in the file; None where it is compressed."""
        if record.method == _DEFLATED:
            return None
        check = partial(self.check, record) if self.verify else None
        return Extent(self.file, self.data_start(record), record.size, check)

    def data_start(self, record: Record) -> int:
        """Offset in the file of the content of one record."""
        if record.start < 0:
            header = self.file.read(self.start + record.header, _LOCAL.size)
            magic, *_, name_length, extra_length = _LOCAL.unpack(header)
            found = self.file.read(self.start + record.header + _LOCAL.size, name_length)
            if magic != b"PK\x03\x04" or found != record.name.encode():
                raise self._broken("a record is not where the directory says", record.name, record.name, repr(found))
            record.start = self.start + record.header + _LOCAL.size + name_length + extra_length
            if record.start + record.packed > self.end:
                raise self._broken(
                    "a record is cut short", record.name, f"{record.packed} bytes", "the end of the archive"
                )
        return record.start

    def check_last_name(self) -> None:
        """Compare the directory's name of the record that comes last in the file with the one that stands there."""
        if self.records:
            self.data_start(max(self.records.values(), key=lambda record: record.header))

    def check_all(self) -> None:
        """Compare every record with its CRC-32."""
        for record in self.records.values():
            self.check(record)

    def check(self, record: Record) -> None:
        """Compare one record with its CRC-32, once; a writer that left the sums out wrote 0."""
        if record.checked or record.crc == 0 or record.size == 0:
            return
        if record.method == _DEFLATED:
            found = zlib.crc32(self._inflate(record, check=False))
        else:
            found = self.file.crc32(self.data_start(record), record.size)
        if found != record.crc:
            raise self._broken(
                "a record differs from its checksum", record.name, f"CRC-32 {record.crc:08x}", f"{found:08x}"
            )
        record.checked = True

    def _data(self, record: Record) -> int:
        start = self.data_start(record)
        if self.verify:
            self.check(record)
        return start

    def _inflate(self, record: Record, *, check: bool = True, most: int | None = None) -> bytearray:
        start = self.data_start(record)
        if record.size > max(_MAX_INFLATED, record.packed * _MAX_RATIO):
            raise LimitError(
                "a compressed record would inflate to far more than the file holds",
                file=self.file.path,
                key=record.name,
                expected=f"at most {_MAX_RATIO} times its {record.packed} bytes",
                found=f"{record.size} bytes",
                remedy="this is no trainer's file; do not use it",
            )
        engine, data = zlib.decompressobj(-15), bytearray()
        room = record.size + 1 if most is None else most
        try:
            for block in self.file.blocks(start, record.packed):
                if engine.eof or len(data) == room:
                    break
                data += engine.decompress(block, room - len(data))
        except zlib.error as error:
            raise self._broken("a compressed record is corrupt", record.name, "a deflate stream", error) from error
        if most is not None:
            return data
        if len(data) != record.size or not engine.eof:
            raise self._broken(
                "a compressed record is corrupt", record.name, f"{record.size} bytes", f"{len(data)} or more"
            )
        if check and self.verify:
            self.check(record)
        return data

    def _directory(self) -> dict[str, Record]:
        count, size, offset = self._end_record()
        if self.start + offset + size > self.end:
            raise self._broken(
                "the archive's directory is cut short", None, f"{size} bytes at {offset}", "the end of the file"
            )
        data = self.file.read(self.start + offset, size)
        records: dict[str, Record] = {}
        position = 0
        for _ in range(count):
            if position + _ENTRY.size > len(data):
                raise self._broken("the archive's directory is cut short", None, f"{count} records", f"{len(records)}")
            record, position = self._entry(data, position)
            if record.name in records:
                raise self._broken("a record occurs twice", record.name, "one record of that name", "two")
            records[record.name] = record
        if position != len(data):
            raise self._broken("the archive's directory has bytes left over", None, f"{position} bytes", f"{len(data)}")
        self._check_overlap(records, offset)
        return records

    def _end_record(self) -> tuple[int, int, int]:
        """Number of records, size and offset of the directory."""
        low = max(self.start, self.end - _END.size - 0xFFFF)
        at = self.file.find_last(b"PK\x05\x06", low, self.end) if self.end - low >= _END.size else -1
        if at < 0 or at + _END.size > self.end:
            raise self._broken("the archive has no directory at its end", None, "an end-of-directory record", "none")
        _, disk, first_disk, _, count, size, offset, comment = _END.unpack(self.file.read(at, _END.size))
        if disk or first_disk or at + _END.size + comment != self.end:
            raise self._broken(
                "the archive's last record is malformed", None, "the end of the file after it", "more, or less"
            )
        locator_at = at - _END64_LOCATOR.size
        if locator_at >= self.start:
            magic, _, end64_at, _ = _END64_LOCATOR.unpack(self.file.read(locator_at, _END64_LOCATOR.size))
            if magic == b"PK\x06\x07":
                if self.start + end64_at + _END64.size > locator_at:
                    raise self._broken(
                        "the archive's last record is malformed", None, "a ZIP64 record", f"offset {end64_at}"
                    )
                magic, *_, count, size, offset = _END64.unpack(self.file.read(self.start + end64_at, _END64.size))
                if magic != b"PK\x06\x06":
                    raise self._broken("the archive's last record is malformed", None, "a ZIP64 record", repr(magic))
                at = self.start + end64_at
        if self.start + offset + size != at:
            raise self._broken(
                "the archive's directory is not where it should be", None, f"its end at {at}", f"{offset + size}"
            )
        return count, size, offset

    def _entry(self, data: bytes, position: int) -> tuple[Record, int]:
        (
            magic,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            name_length,
            extra_length,
            comment_length,
            _,
            _,
            _,
            header,
        ) = _ENTRY.unpack_from(data, position)
        names = position + _ENTRY.size
        extras = names + name_length
        if magic != b"PK\x01\x02" or extras + extra_length + comment_length > len(data):
            raise self._broken("the archive's directory is corrupt", None, "a directory entry", repr(magic))
        try:
            name = data[names:extras].decode()
        except UnicodeDecodeError as error:
            raise self._broken("a record's name is corrupt", None, "UTF-8", repr(data[names:extras])) from error
        if 0xFFFFFFFF in (packed, size, header):
            size, packed, header = self._zip64(data[extras : extras + extra_length], name, size, packed, header)
        if flags & 1 or method not in (_STORED, _DEFLATED) or (method == _STORED and packed != size):
            raise self._broken(
                "a record is stored in a way that no trainer uses", name, "stored or deflated", f"method {method}"
            )
        return Record(name, header, packed, size, crc, method), extras + extra_length + comment_length

    def _zip64(self, extra: bytes, name: str, *fields: int) -> tuple[int, int, int]:
        """Replace the fields that are 0xFFFFFFFF by the 64-bit ones, which follow in the same order."""
        position = 0
        while position + 4 <= len(extra):
            tag, length = struct.unpack_from("<HH", extra, position)
            body = extra[position + 4 : position + 4 + length]
            if tag == 1:
                wide = iter(value for (value,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8]))
                full = [next(wide, -1) if field == 0xFFFFFFFF else field for field in fields]
                if -1 not in full:
                    return full[0], full[1], full[2]
            position += 4 + length
        raise self._broken("a record's 64-bit sizes are missing", name, "a ZIP64 field", "none")

    def _check_overlap(self, records: dict[str, Record], directory: int) -> None:
        """Two entries over the same bytes are how a small archive pretends to hold much."""
        free = 0
        for record in sorted(records.values(), key=lambda entry: entry.header):
            if record.header < free:
                raise self._broken("two records overlap", record.name, f"offset {free} or later", record.header)
            free = record.header + _LOCAL.size + len(record.name.encode()) + record.packed
        if free > directory:
            raise self._broken("a record reaches into the directory", None, f"{directory} or less", free)

    def _broken(self, message: str, record: str | None, expected: object, found: object) -> CheckpointError:
        return CheckpointError(
            message, file=self.file.path, key=record, expected=expected, found=found, remedy=_FRESH_COPY
        )
