"""Forms that a checkpoint can be written in, one file each; a new one is a file and a line in `WRITERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qat_compat.writers import compressed_tensors, float_file, modelopt, torchao
from qat_compat.writers.job import Job

__all__ = ["TAKE_LIKE", "WRITERS", "Job"]

WRITERS: Mapping[str, Callable[[Job], None]] = {
    "float": float_file.write,
    "torchao": torchao.write,
    "compressed-tensors": compressed_tensors.write,
    "modelopt": modelopt.write,
}

TAKE_LIKE = ("float", "modelopt")
"""Those that are of a float layout's or model's own making."""
