"""What a file that is no checkpoint really is."""

from __future__ import annotations

from qat_compat.errors import CheckpointError
from qat_compat.storage.archive import Archive
from qat_compat.storage.container import Source

__all__ = ["describe"]

_EXPORT = "write the weights with `torch.save(model.state_dict(), path)` or as safetensors"
_FETCH = "the download gave something else; fetch the file itself"

_LEVELDB = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # last bytes of a table, the form of TensorFlow's index

# First bytes -> what it is, and what to do.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for", "run `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page", _FETCH),
    (b"<!doctype", "an HTML page", _FETCH),
    (b"<html", "an HTML page", _FETCH),
    (b"<?xml", "an XML document", _FETCH),
    (b"GGUF", "a GGUF file", "convert it to safetensors first"),
    (b"ggml", "a GGML file", "convert it to safetensors first"),
    (b"\x89HDF", "an HDF5 file (Keras)", "convert it to safetensors or .npz first"),
    (b"\x93NUMPY", "a single numpy array (.npy)", "save named arrays with `numpy.savez`"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"BZh", "a bzip2 archive", "unpack it first"),
    (b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"\x7fELF", "a program or shared library", "pass the checkpoint itself"),
    (b"PTNP", "a TensorRT engine", _EXPORT),
    (b"ptrt", "a TensorRT engine", _EXPORT),
    (b"ftrt", "a TensorRT engine", _EXPORT),
    (b"PK\x05\x06", "an empty ZIP archive", "pass the checkpoint itself"),
    (b"\x89PNG", "a PNG image", "pass the checkpoint itself"),
    (b"\xff\xd8\xff", "a JPEG image", "pass the checkpoint itself"),
    (b"%PDF", "a PDF document", "pass the checkpoint itself"),
)


def describe(source: Source) -> CheckpointError:
    """The error for a source that no container takes.

    Raises:
        CheckpointError: Already looking into it shows that it is corrupt.
    """
    found, remedy = _folder(source) if source.is_folder else _file(source)
    return CheckpointError(
        "not a checkpoint that can be read",
        file=source.path,
        expected="a file of torch.save, safetensors, .npz, or a folder of shards",
        found=found,
        remedy=remedy,
    )


def _folder(source: Source) -> tuple[str, str]:
    names = sorted(path.name for path in source.path.iterdir())
    if "saved_model.pb" in names:
        return "a TensorFlow SavedModel", "convert it to safetensors or .npz first"
    if "checkpoint" in names or any(name.endswith(".ckpt.index") for name in names):
        return "a TensorFlow checkpoint", "convert it to safetensors or .npz first"
    if any(name.endswith(".distcp") for name in names):
        return "shards of a distributed checkpoint without their .metadata", "copy the whole folder, hidden files too"
    if not names:
        return "an empty folder", "check the path"
    return f"a folder with {', '.join(names[:6])}", "pass one of its files"


def _file(source: Source) -> tuple[str, str]:
    head = source.head
    for signature, what, remedy in _SIGNATURES:
        if head.lstrip()[: len(signature)] == signature or head[: len(signature)] == signature:
            return what, remedy
    if head.startswith(b"PK\x03\x04"):
        return _zip(source.archive)
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model", _EXPORT
    if head[257:262] == b"ustar":
        return "a tar archive (NeMo, or torch before 0.2)", "unpack it, or load and save it again with a newer torch"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return f"a plain pickle (protocol {head[1]}), not written by torch.save", _EXPORT
    if source.file.size >= 48 and source.file.read(source.file.size - 8, 8) == _LEVELDB:
        return "the index of a TensorFlow checkpoint", "convert the checkpoint to safetensors or .npz first"
    if head[:3] == b"\x08\x01\x12" and b"pytorch" not in head[:64]:
        return "a TensorFlow SavedModel", "convert it to safetensors or .npz first"
    if head[:1] == b"\x08" and (b"pytorch" in head[:64] or b"onnx" in head[:256]):
        return "an ONNX model", _EXPORT
    if not head.strip(b"\0"):
        return "zeros only: space that was reserved and never written", "the copy was interrupted; get a fresh copy"
    if len(head) < 16:
        return f"{len(head)} bytes: {head!r}", "the file was cut short; get a fresh copy"
    if head.lstrip()[:1] in (b"{", b"["):
        return "a JSON file", "pass the checkpoint, or the index of a sharded one (`*.index.json`)"
    if all(byte in b"\t\r\n\f\x1b" or 32 <= byte < 127 for byte in head):
        return f"text: {head[:60].decode('ascii')!r}", "pass the checkpoint itself"
    return (
        f"an unknown format that begins with {head[:8]!r}",
        "the file may be cut short or encrypted; get a fresh copy",
    )


def _zip(archive: Archive) -> tuple[str, str]:
    names = list(archive.records)
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends or any("/code/" in name for name in names):
        return "a TorchScript archive (torch.jit.save)", "write `torch.save(torch.jit.load(path).state_dict(), ...)`"
    if "archive_format" in ends or any("/models/" in name for name in names):
        return "a torch.export archive (.pt2)", "write `torch.save(torch.export.load(path).state_dict, ...)`"
    if "config.json" in ends and any(name.endswith(".weights.h5") for name in names):
        return "a Keras archive", "convert it to safetensors or .npz first"
    return f"a ZIP archive with {', '.join(names[:5]) or 'nothing in it'}", "unpack it, and pass the checkpoint itself"
