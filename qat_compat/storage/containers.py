"""All file formats."""

from __future__ import annotations

from pathlib import Path

from qat_compat.storage import dcp, npz, safetensors, sharded, torch_legacy, torch_zip
from qat_compat.storage.config import CONFIG, quantization_config
from qat_compat.storage.container import Container, Opened, Source
from qat_compat.storage.encodings_file import ENCODINGS, encodings_beside
from qat_compat.storage.sniff import describe

__all__ = ["open_path"]

# A new format is a file beside this one, and a line here.
_CONTAINERS: tuple[Container, ...] = (
    torch_zip.CONTAINER,
    safetensors.CONTAINER,
    torch_legacy.CONTAINER,
    npz.CONTAINER,
    dcp.CONTAINER,
    sharded.CONTAINER,
)


def open_path(path: Path, verify: bool | None) -> Opened:
    """Open a file or folder by what is in it, whatever its name.

    Raises:
        CheckpointError: It is of no known format, or is corrupt.
    """
    source = Source(path, verify)
    for container in _CONTAINERS:
        if container.matches(source):
            return _with_beside(container.open(source), path, path if source.is_folder else path.parent)
    raise describe(source)


def _with_beside(opened: Opened, path: Path, folder: Path) -> Opened:
    """With what other files say of the weights; each is passed over, with a note, where it cannot be read."""
    for name, (found, passed_over) in {
        CONFIG: quantization_config(folder),
        ENCODINGS: encodings_beside(path),
    }.items():
        if found:
            opened.metadata.setdefault(name, found)
        if passed_over:
            opened.notes = (*opened.notes, passed_over)
    return opened
