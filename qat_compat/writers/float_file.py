"""Float: plain tensors under the original names, as `.pt` or `.safetensors`."""

from __future__ import annotations

from qat_compat.storage import save
from qat_compat.writers.job import Job

__all__ = ["write"]


def write(job: Job) -> None:
    """One file, by its suffix."""
    save(job.floats, job.out)
