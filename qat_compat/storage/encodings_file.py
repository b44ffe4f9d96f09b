"""AIMET's JSON of quantization encodings, which `QuantizationSimModel.export` writes beside the weights.

What is known here, and what it rests on (AIMET's encoding specification; aimet-torch 2.42): beside `<prefix>.pth` lie
`<prefix>_torch.encodings`, in the names of the modules, and `<prefix>.encodings`, in those of the ONNX graph. They
are never needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_compat.storage.beside import is_there, json_beside

__all__ = ["ENCODINGS", "encodings_beside"]

ENCODINGS = "aimet_encodings"  # among the metadata of an opened file: `file`, the name, and what it holds
_ENDINGS = ("_torch.encodings", ".encodings")  # the first that is there is read: it knows the modules
_LISTS = ("param_encodings", "activation_encodings", "encodings")
_MAX_SIZE = 256 << 20


def encodings_beside(path: Path) -> tuple[dict[str, Any], str]:
    """What AIMET wrote beside a file of weights, and why it was passed over, if it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "net_torch.encodings").write_text('{"version": "0.6.1", "param_encodings": {}}')
        ...     encodings_beside(Path(folder) / "net.pth")
        ({'file': 'net_torch.encodings', 'version': '0.6.1', 'param_encodings': {}}, '')
    """
    if path.is_dir():
        return {}, ""
    for ending in _ENDINGS:
        beside = path.with_name(path.stem + ending)
        if not is_there(beside):
            continue
        found, note = json_beside(beside, _MAX_SIZE)
        if note:
            return {}, note
        if not isinstance(found, Mapping) or not any(name in found for name in _LISTS):
            return {}, f"{beside.name} beside the weights is passed over: it holds none of {', '.join(_LISTS)}"
        return {"file": beside.name, **found}, ""
    return {}, ""
