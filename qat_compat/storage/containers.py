"""All file formats."""

from __future__ import annotations

from pathlib import Path

from qat_compat.storage import dcp, npz, safetensors, sharded, torch_legacy, torch_zip
from qat_compat.storage.config import quantization_config
from qat_compat.storage.container import Container, Opened, Source
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
            return _with_config(container.open(source), path if source.is_folder else path.parent)
    raise describe(source)


def _with_config(opened: Opened, folder: Path) -> Opened:
    config, passed_over = quantization_config(folder)
    if config:
        opened.metadata.setdefault("quantization_config", config)
    if passed_over:
        opened.notes = (*opened.notes, passed_over)
    return opened
