"""The safetensors format: a JSON header and the tensors' bytes, end to end."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError, SaveError
from qat_compat.schema import Spec
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.extent import CAN_STREAM, Extent, pieces
from qat_compat.storage.lazy import LazyTensor, LazyTensors
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.standins import OWN
from qat_compat.storage.writing import Contents, as_memory, plain_bytes

__all__ = ["CONTAINER", "write"]

_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_HEADER = 100_000_000  # as in the format's own reader
_FRESH_COPY = "the file is corrupt or was cut short; get a fresh copy"
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "F16":
    torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64":
    torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Keys of `__metadata__` that are this package's own. Sums are CRC-32 of each tensor's bytes; the digest is SHA-256 of
# the header with an empty digest in it.
_SUMS, _DIGEST, _VERSIONS, _STATE = f"{OWN}.crc32", f"{OWN}.digest", f"{OWN}.versions", f"{OWN}.metadata"
_HIDDEN = f"{OWN}.hidden/"
_DCP_PARTS = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's: where each tensor begins in the whole one


def _matches(source: Source) -> bool:
    if len(source.head) < 9 or source.head[8:9] != b"{":
        return False
    return int.from_bytes(source.head[:8], "little") < 1 << 40  # else it is text that happens to have a brace there


def _refuse_part(file: MappedFile, text: str) -> None:
    """One rank's shard has parts of tensors under the names, and in the shapes, of whole ones."""
    told = _decoded(text)
    parts = told.values() if isinstance(told, dict) else ()
    offsets = [part.get("saved_offsets") for part in parts if isinstance(part, dict)]
    if file.path.name.startswith("shard-") or any(any(found) for found in offsets if isinstance(found, list)):
        raise CheckpointError(
            "the file is one rank's shard of a distributed checkpoint: its tensors may be parts of whole ones",
            file=file.path,
            expected="whole tensors",
            found=_DCP_PARTS,
            remedy="join the shards with torch.distributed.checkpoint's consolidate_safetensors_files, and pass that",
        )


def _open(source: Source) -> Opened:
    file = source.file
    header, start = _header(file)
    about = _metadata(file, header.pop("__metadata__", {}))
    if _DCP_PARTS in about:
        _refuse_part(file, about[_DCP_PARTS])
    sums = _own_json(file, about, _SUMS) if _SUMS in about else {}
    if any(key.startswith(f"{OWN}.") for key in about):
        _check_digest(file, {"__metadata__": about, **header})
    expected = sums if source.verify is not False else {}
    tensors = {
        name: _FileTensor(spec, file, begin, length, name, expected.get(name))
        for name, (spec, begin, length) in _entries(file, header, start).items()
    }
    if source.verify:
        for tensor in tensors.values():
            tensor.check()
    opened = Opened({name: tensor for name, tensor in tensors.items() if not name.startswith(_HIDDEN)})
    opened.record = dict(_own_json(file, about, OWN)) if OWN in about else {}
    hidden = {name.removeprefix(_HIDDEN): tensor for name, tensor in tensors.items() if name.startswith(_HIDDEN)}
    if "hidden" in opened.record or hidden:
        opened.record["hidden"] = LazyTensors(hidden)
    opened.versions = _own_json(file, about, _VERSIONS) if _VERSIONS in about else {}
    header = {key: _decoded(value) for key, value in about.items() if not key.startswith(OWN)}
    if header.get("format") == "pt":
        del header["format"]
    opened.headers = (header,)
    opened.metadata = _own_json(file, about, _STATE) if _STATE in about else {}
    if source.verify and not sums:
        opened.notes = ("the file was written without checksums: nothing to verify",)
    return opened


CONTAINER = Container("safetensors", _matches, _open)


class _FileTensor(LazyTensor):
    """A dense tensor of which the header says where it lies."""

    __slots__ = ("crc", "file", "name", "nbytes", "start")

    def __init__(self, spec: Spec, file: MappedFile, start: int, nbytes: int, name: str, crc: str | None) -> None:
        self.spec = spec
        self.file = file
        self.start = start
        self.nbytes = nbytes
        self.name = name
        self.crc = crc

    def check(self) -> None:
        """Compare its bytes with their checksum, if there is one, once."""
        if self.crc is None:
            return
        found = f"{self.file.crc32(self.start, self.nbytes):08x}"
        if found != self.crc:
            raise CheckpointError(
                "a tensor differs from its checksum",
                file=self.file.path, key=self.name, expected=f"CRC-32 {self.crc}", found=found, remedy=_FRESH_COPY,
            )  # fmt: skip
        self.crc = None

    def read(self) -> Tensor:
        self.check()
        raw = self.file.tensor(self.start, self.nbytes)
        if self.nbytes and raw.data_ptr() % self.spec.dtype.itemsize:
            raw = raw.clone()  # the format has no alignment, and kernels expect addresses that fit the element
        return raw.view(self.spec.dtype).view(self.spec.shape)

    @property
    def alias(self) -> Hashable | None:
        return (id(self.file), self.start) if self.nbytes else None

    def extent(self) -> Extent | None:
        check = self.check if self.crc is not None else None
        return Extent(self.file, self.start, self.nbytes, check) if CAN_STREAM else None


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(0, 8), "little")
    if length > _MAX_HEADER:
        raise LimitError(
            "the header is too long",
            file=file.path,
            expected=f"at most {_MAX_HEADER} bytes",
            found=length,
            remedy=_FRESH_COPY,
        )
    raw = file.read(8, length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except CheckpointError as error:
        error.file = str(file.path)
        raise
    except RecursionError as error:
        raise LimitError(
            "the header is nested too deeply",
            file=file.path,
            expected="a flat JSON object",
            found="a deep one",
            remedy=_FRESH_COPY,
        ) from error
    except ValueError as error:
        raise CheckpointError(
            "the header is not valid JSON", file=file.path, expected="a JSON object", found=error, remedy=_FRESH_COPY
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            "the header is not a JSON object",
            file=file.path,
            expected="an object",
            found=type(header).__name__,
            remedy=_FRESH_COPY,
        )
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(
            "a key occurs twice", key=twice, expected="each key once", found="two", remedy=_FRESH_COPY
        )
    return made


def _metadata(file: MappedFile, about: object) -> dict[str, str]:
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise CheckpointError(
            "the header's __metadata__ is malformed", file=file.path, key="__metadata__",
            expected="text values", found=about if not isinstance(about, dict) else "other values", remedy=_FRESH_COPY,
        )  # fmt: skip
    return about


def _entries(file: MappedFile, header: dict[str, Any], start: int) -> dict[str, tuple[Spec, int, int]]:
    """name -> spec, offset in the file and length in bytes; checked to tile the data without a hole."""
    room = file.size - start
    made: dict[str, tuple[Spec, int, int]] = {}
    for name, entry in header.items():
        spec, begin, end = _entry(file, name, entry)
        if end > room:
            raise _bad(
                file, name, "a tensor reaches beyond the end of the file", f"{room} bytes of data", f"its end at {end}"
            )
        made[name] = spec, start + begin, end - begin
    position = start
    for name, (_, begin, length) in sorted(made.items(), key=lambda item: (item[1][1], item[1][2])):
        if begin < position:
            raise _bad(file, name, "two tensors overlap", f"data from {position}", f"data from {begin}")
        if begin > position:
            raise _bad(file, name, "there is a hole before a tensor", f"data from {position}", f"data from {begin}")
        position = begin + length
    if position != file.size:
        raise _bad(file, None, "there are bytes after the last tensor", f"{position} bytes", f"{file.size} bytes")
    return made


def _entry(file: MappedFile, name: str, entry: object) -> tuple[Spec, int, int]:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _bad(file, name, "an entry of the header is malformed", "dtype, shape and data_offsets", str(entry)[:200])
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _bad(file, name, "a tensor has an unknown dtype", ", ".join(_DTYPES), str(entry["dtype"])[:80])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _bad(
            file,
            name,
            "an entry of the header is malformed",
            "whole numbers, not negative",
            f"{shape}, {offsets}"[:200],
        )
    if dtype is torch.float4_e2m1fn_x2:  # the file counts elements, torch counts pairs of them
        if not shape or shape[-1] % 2:
            raise _bad(file, name, "an F4 tensor has an odd last dimension", "an even one", shape)
        shape = [*shape[:-1], shape[-1] // 2]
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise _bad(
            file,
            name,
            "a tensor's length does not fit its shape",
            f"{size} bytes for {shape}",
            f"{offsets[1] - offsets[0]} bytes",
        )
    return Spec(tuple(shape), dtype), offsets[0], offsets[1]


def _sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > 64:
        return False
    for size in value:  # noqa: SIM110 - this runs for every tensor of a file
        if type(size) is not int or not 0 <= size < 1 << 63:
            return False
    return True


def _bad(file: MappedFile, key: str | None, message: str, expected: object, found: object) -> CheckpointError:
    return CheckpointError(message, file=file.path, key=key, expected=expected, found=found, remedy=_FRESH_COPY)


def _decoded(value: str) -> Any:
    """Lists and objects come as JSON text, since the format has only text values."""
    if value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _own_json(file: MappedFile, about: Mapping[str, str], key: str) -> Any:
    made = _decoded(about[key])
    if not isinstance(made, dict):
        raise _bad(
            file, f"__metadata__[{key!r}]", "what this package wrote about the file is corrupt", "JSON", about[key][:80]
        )
    return made


def _check_digest(file: MappedFile, header: dict[str, Any]) -> None:
    """Nothing of ours is written without it: where it is missing, its name was damaged."""
    expected = header["__metadata__"].get(_DIGEST, "missing")
    found = _digest(header)
    if found != expected:
        raise _bad(file, None, "the header differs from its checksum", f"SHA-256 {expected[:80]}", found)


def _digest(header: Mapping[str, Any]) -> str:
    about = {**header["__metadata__"], _DIGEST: ""}
    text = json.dumps({**header, "__metadata__": about}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write(stream: BinaryIO, contents: Contents) -> None:
    """Write a state_dict; at most one tensor at a time is in memory, and only a block of what is copied as it is.

    The header comes first in the file, so it is written twice: with empty checksums, to know how long it is, and again
    when all tensors have been read.

    Raises:
        SaveError: A dtype or a value has no form in safetensors.
    """
    specs = contents.specs()
    hidden = dict(contents.hidden or {})
    specs |= {_HIDDEN + key: Spec(tuple(value.shape), value.dtype) for key, value in hidden.items()}
    # Large elements first: then every tensor is aligned, though the format has no padding between them.
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header = _make_header(contents, specs, order)
    if (length := len(_encoded(header))) > _MAX_HEADER:
        raise SaveError(
            "what is beside the tensors is too long for a safetensors file",
            expected=f"a header of at most {_MAX_HEADER} bytes",
            found=f"{length} bytes",
            remedy="save as .pt",
        )
    stream.write(_encoded(header))
    sums: dict[str, str] = {}
    for name in order:
        own = hidden.get(name.removeprefix(_HIDDEN)) if name.startswith(_HIDDEN) else None
        crc = 0
        for data in _pieces(contents, name, own):
            crc = zlib.crc32(data, crc)
            stream.write(data)
        sums[name] = f"{crc:08x}"
    header["__metadata__"][_SUMS] = json.dumps(dict.fromkeys(specs) | sums)
    header["__metadata__"][_DIGEST] = _digest(header)
    stream.seek(0)
    stream.write(_encoded(header))


def _pieces(contents: Contents, name: str, hidden: Tensor | None) -> Iterable[memoryview]:
    """The bytes of one tensor in row-major order, straight from the file that they are in, if they are in one."""
    if hidden is None and (extent := contents.extent(name)) is not None:
        return pieces(extent)
    tensor = contents.read(name) if hidden is None else hidden
    return [as_memory(plain_bytes(tensor.contiguous())[0])]


def _make_header(contents: Contents, specs: Mapping[str, Spec], order: list[str]) -> dict[str, Any]:
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name in order:
        end = position + math.prod(specs[name].shape) * specs[name].dtype.itemsize
        offsets[name] = position, end
        position = end
    about = {"format": "pt", _SUMS: json.dumps(dict.fromkeys(specs, "0" * 8)), _DIGEST: "0" * 64}
    record = dict(contents.record)
    if ties := contents.ties():
        record.setdefault("ties", ties)
    if contents.hidden is not None:
        record["hidden"] = sorted(contents.hidden)
    if record:
        about[OWN] = json.dumps(record)
    if contents.versions:
        about[_VERSIONS] = json.dumps(contents.versions)
    state = {}
    for key, value in contents.metadata.items():
        if isinstance(value, str) and value[:1] not in ("{", "[") and not key.startswith(OWN) and key != "format":
            about[key] = value
        else:
            state[key] = value
    if state:
        about[_STATE] = _state_json(state)
    header: dict[str, Any] = {"__metadata__": {**about, **contents.header}}
    for name, (shape, dtype) in specs.items():
        packed = dtype is torch.float4_e2m1fn_x2  # two numbers, of which a tensor without dimensions has but one
        if name == "__metadata__" or dtype not in _NAMES or (packed and not shape):
            raise SaveError(
                "a tensor has no form in safetensors", key=name, expected=", ".join(_DTYPES), found=str(dtype),
                remedy="save as .pt",
            )  # fmt: skip
        sizes = [*shape[:-1], shape[-1] * 2] if packed else list(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": sizes, "data_offsets": list(offsets[name])}
    return header


def _state_json(state: Mapping[str, Any]) -> str:
    try:
        return json.dumps(state)
    except (TypeError, ValueError) as error:
        raise SaveError(
            "the metadata has no form in safetensors",
            key="metadata", expected="text, numbers, lists and mappings", found=error,
            remedy="save as .pt, which also takes tensors, or leave it out",
        ) from error  # fmt: skip


def _encoded(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
