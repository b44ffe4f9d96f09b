"""JSON that lies beside the weights. It is never needed, and whatever is wrong with it is said and passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qat_compat.errors import CheckpointError
from qat_compat.storage.mapped import MappedFile

__all__ = ["is_there", "json_beside", "leads_outside"]


def json_beside(path: Path, limit: int) -> tuple[Any, str]:
    """What a file holds, None where it is not there, and why it was passed over, if it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.json"
        ...     _ = path.write_text("{")
        ...     json_beside(path, limit=10)[1][:60], json_beside(Path(folder) / "other.json", limit=10)
        ('config.json beside the weights is passed over: it is not val', (None, ''))

    Args:
        path: The file.
        limit: Most bytes that it may have.
    """
    if not is_there(path):
        return None, ""
    try:
        return _read(path, limit), ""
    except (CheckpointError, ValueError, RecursionError) as error:
        reason = error.message if isinstance(error, CheckpointError) else f"it is not valid JSON ({error})"
        return None, f"{path.name} beside the weights is passed over: {reason}"


def is_there(path: Path) -> bool:
    """Whether a file is there, as far as one can see."""
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be looked into
        return False


def _read(path: Path, limit: int) -> Any:
    if leads_outside(path):
        raise CheckpointError("it is a link to a file outside its folder")
    file = MappedFile(path)
    if file.size > limit:
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
