"""Writing a ZIP archive as a stream: stored records, aligned, each with its CRC-32."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

__all__ = ["ArchiveWriter"]

_LOCAL = struct.Struct("<4s5H3L2H")
_CRC_AT = 14  # in the local header
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_WIDE, _MANY = 0xFFFFFFFF, 0xFFFF  # a field with this value sends the reader to the ZIP64 field
_LIMIT, _MAX_COUNT = _WIDE, _MANY  # from here on that is needed
_VERSION, _UTF8 = 45, 0x0800  # needs a reader that knows ZIP64; names are UTF-8
_DATE = 0x21  # 1980-01-01, so that equal content is equal bytes


class _Written(NamedTuple):
    name: bytes
    header: int
    size: int
    crc: int


class ArchiveWriter:
    """Writes records one after the other into a file that is open for writing.

    Args:
        stream: Where to write; its position must be 0.
        alignment: The content of each record begins at a multiple of this many bytes, so that it can be mapped.
    """

    def __init__(self, stream: BinaryIO, alignment: int) -> None:
        self.stream = stream
        self.alignment = alignment
        self.position = 0
        self.records: list[_Written] = []

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Add one record."""
        self._begin(name, len(data), zlib.crc32(data))
        self._put(data)

    def write_pieces(self, name: str, pieces: Iterable[memoryview], size: int) -> None:
        """Add one record of `size` bytes that come piece by piece; its checksum is filled in after the last."""
        header = self.position
        self._begin(name, size, 0)
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            self._put(piece)
        self.stream.seek(header + _CRC_AT)
        self.stream.write(struct.pack("<L", crc))
        self.stream.seek(self.position)
        self.records[-1] = self.records[-1]._replace(crc=crc)

    def _begin(self, name: str, size: int, crc: int) -> None:
        encoded = name.encode()
        wide = size >= _LIMIT
        extra = struct.pack("<2H2Q", 1, 16, size, size) if wide else b""
        extra += self._padding(_LOCAL.size + len(encoded) + len(extra))
        shown = _WIDE if wide else size
        header = _LOCAL.pack(b"PK\x03\x04", _VERSION, _UTF8, 0, 0, _DATE, crc, shown, shown, len(encoded), len(extra))
        self.records.append(_Written(encoded, self.position, size, crc))
        self._put(header + encoded + extra)

    def finish(self) -> None:
        """Write the directory."""
        start = self.position
        for record in self.records:
            self._put(self._entry(record))
        size, count = self.position - start, len(self.records)
        if count >= _MAX_COUNT or start >= _LIMIT or size >= _LIMIT:
            end64 = self.position
            self._put(_END64.pack(b"PK\x06\x06", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, start))
            self._put(_END64_LOCATOR.pack(b"PK\x06\x07", 0, end64, 1))
        shown = _MANY if count >= _MAX_COUNT else count
        self._put(_END.pack(b"PK\x05\x06", 0, 0, shown, shown, _narrow(size), _narrow(start), 0))

    def _entry(self, record: _Written) -> bytes:
        wide = [value for value in (record.size, record.size, record.header) if value >= _LIMIT]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, header = _narrow(record.size), _narrow(record.header)
        return (
            _ENTRY.pack(
                b"PK\x01\x02", _VERSION, _VERSION, _UTF8, 0, 0, _DATE, record.crc, size, size,
                len(record.name), len(extra), 0, 0, 0, 0, header,
            )
            + record.name
            + extra
        )  # fmt: skip

    def _padding(self, header: int) -> bytes:
        """An extra field that makes the content begin at the alignment; 0x4246 ("FB") is the tag that torch uses."""
        space = -(self.position + header + 4) % self.alignment
        return struct.pack("<2H", 0x4246, space) + b"Z" * space

    def _put(self, data: bytes | memoryview) -> None:
        self.stream.write(data)
        self.position += len(data)


def _narrow(value: int) -> int:
    return _WIDE if value >= _LIMIT else value
