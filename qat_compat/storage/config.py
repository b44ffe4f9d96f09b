"""What a Hugging Face `config.json` beside the weights says about their quantization. It is never needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qat_compat.errors import CheckpointError
from qat_compat.storage.mapped import MappedFile

__all__ = ["CONFIG", "leads_outside", "quantization_config"]

_FILE = "config.json"
CONFIG = "quantization_config"  # among the metadata of an opened file
_NAMES = (CONFIG, "compression_config")  # today's name, and the one before it
_MAX_SIZE = 16 << 20


def quantization_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The `quantization_config` of the folder's `config.json`, and why it was passed over, if it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
        ...     quantization_config(Path(folder))
        ({'quant_method': 'awq'}, '')
    """
    path = folder / _FILE
    if not path.exists():
        return {}, ""
    try:
        config = _read(path)
    except (CheckpointError, ValueError, RecursionError) as error:
        reason = error.message if isinstance(error, CheckpointError) else f"it is not valid JSON ({error})"
        return {}, f"{_FILE} beside the weights is passed over: {reason}"
    found = next((config[name] for name in _NAMES if isinstance(config, dict) and name in config), None)
    return (dict(found), "") if isinstance(found, dict) else ({}, "")


def _read(path: Path) -> Any:
    if leads_outside(path):
        raise CheckpointError("it is a link to a file outside its folder")
    file = MappedFile(path)
    if file.size > _MAX_SIZE:
        raise CheckpointError(f"it has {file.size} bytes")
    return json.loads(file.read(0, file.size).decode())


def leads_outside(path: Path) -> bool:
    """Whether a link leads out of its folder, other than into the blobs of the Hugging Face cache that it is in."""
    if not path.is_symlink():
        return False
    real, root = path.resolve(), path.parent.resolve()
    # cache layout: models--x/snapshots/<revision>/model-1.safetensors -> ../../blobs/<hash>
    is_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return not is_cache and root not in real.parents
