"""Reading and writing checkpoints: every container that people have, opened lazily and without running what is in it.

Example:
    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save({"fc.weight": torch.eye(2)}, f"{folder}/model.safetensors")
    ...     checkpoint = open_source(path)
    ...     print(checkpoint.spec("fc.weight"), checkpoint["fc.weight"].sum().item())
    float32[2, 2] 2.0
"""

from __future__ import annotations

from qat_compat.storage.checkpoint import Checkpoint
from qat_compat.storage.extent import Extent, Read
from qat_compat.storage.find import find_checkpoint
from qat_compat.storage.folder import new_folder
from qat_compat.storage.io import open_source, save
from qat_compat.storage.stream import read_all

__all__ = ["Checkpoint", "Extent", "Read", "find_checkpoint", "new_folder", "open_source", "read_all", "save"]
