"""What the package must not disturb: random state, warnings, and the pace of the garbage collector."""

from __future__ import annotations

import gc
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from qat_compat.devices import forked_rng

__all__ = ["paused_collector", "preserved_random_state", "quiet"]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Random state of torch (on every device), numpy and Python as before, whatever happens inside; grad mode, too.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with preserved_random_state():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    python, numpy = random.getstate(), np.random.get_state()
    grad = torch.is_grad_enabled()
    with forked_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_grad_enabled(grad)  # an interrupt may come in the middle of what changes it


class _Quiet:
    """How many are in :func:`quiet`, and what gives the process its filters back when the last of them leaves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.filters: list[Any] = []
        self.before: list[Any] = []


_QUIET = _Quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings; the filters, which all threads share, are as before when the last one that asked for it is done.

    `warnings.catch_warnings` in two threads at once can leave the filters of the one to the other for good.

    Example:
        >>> import warnings
        >>> before = list(warnings.filters)
        >>> with quiet(), quiet():
        ...     warnings.warn("nobody hears this")
        >>> warnings.filters == before
        True
    """
    entered = False
    try:  # an interrupt may come between any two steps
        with _QUIET.lock:
            _QUIET.inside, entered = _QUIET.inside + 1, True
            if _QUIET.inside == 1:
                _QUIET.filters, _QUIET.before = warnings.filters, list(warnings.filters)  # type: ignore[assignment]
                warnings.simplefilter("ignore")
        yield
    finally:
        with _QUIET.lock:
            _QUIET.inside -= entered
            if entered and not _QUIET.inside:
                _QUIET.filters[:] = _QUIET.before
                _QUIET.filters = _QUIET.before = []  # nothing of this time is given back another time


@contextmanager
def paused_collector() -> Iterator[None]:
    """No garbage collection: each run would look at every object of a plan again, which makes planning quadratic."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()
