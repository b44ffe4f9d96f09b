"""What the package must not disturb: random state, and the pace of the garbage collector."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["paused_collector", "preserved_random_state"]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Random state of torch (every device in use), numpy and Python as before, whatever happens inside.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with preserved_random_state():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if in_use else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def paused_collector() -> Iterator[None]:
    """No garbage collection: each run would look at every object of a plan again, which makes planning quadratic."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
