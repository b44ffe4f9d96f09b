"""What the commands print with."""

from __future__ import annotations

import math

from rich.console import Console

from qat_compat.storage import Checkpoint

__all__ = ["bytes_held", "console", "distinct", "size_text"]


class _Pipe(Console):
    """Says that its reader has gone, where rich would end the process with the status of a failure."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Standard output, without colours of its own choice."""
    return _Pipe(highlight=False, markup=False, emoji=False)


def distinct(checkpoint: Checkpoint) -> list[str]:
    """One key for each tensor; tied keys are one tensor."""
    return list({checkpoint.alias(key) or key: key for key in checkpoint}.values())


def bytes_held(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors, tied ones counted once."""
    specs = [checkpoint.spec(key) for key in distinct(checkpoint)]
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def size_text(count: float) -> str:
    """A number of bytes in a unit that fits.

    Example:
        >>> size_text(1536)
        '1.5 KiB'
    """
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "bytes" else f"{count:.1f} {units[0]}"
