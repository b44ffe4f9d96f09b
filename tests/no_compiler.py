"""NNCF compiles its kernels for a minute or two, and does without them where there is no compiler."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def no_compiler() -> Iterator[None]:
    """Let NNCF find none, and say nothing of it."""
    logger = logging.getLogger("nncf")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("CXX", "false")
        patch.setenv("TORCH_EXTENSIONS_DIR", folder)
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        logger.setLevel(logging.ERROR)
        yield
    logger.setLevel(level)
