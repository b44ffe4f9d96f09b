"""What a Hugging Face `config.json` beside the weights says about their quantization. It is never needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat_compat.storage.beside import json_beside

__all__ = ["CONFIG", "quantization_config"]

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
    config, note = json_beside(folder / _FILE, _MAX_SIZE)
    found = next((config[name] for name in _NAMES if isinstance(config, dict) and name in config), None)
    return (dict(found) if isinstance(found, dict) else {}), note
