"""Progress on long work: drawn by rich on a terminal, silent anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bars"]

_WORDS = {"read": "reading tensors", "calibrate": "calibrating"}


def _is_watched() -> bool:
    """Whether standard error is a terminal; a service may have none, or have closed it."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


@contextmanager
def progress_bars(show: bool | None, totals: dict[str, int | None]) -> Iterator[Callable[[str], None]]:
    """A callable that advances one stage ("read", "calibrate") by one.

    Args:
        show: True or False, or None for "if standard error is a terminal".
        totals: Stage -> number of steps, None where that is not known before.
    """
    if not (_is_watched() if show is None else show):
        yield lambda _stage: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {stage: bars.add_task(_WORDS.get(stage, stage), total=total) for stage, total in totals.items()}
        yield lambda stage: bars.advance(tasks[stage]) if stage in tasks else None
