"""What every test of a real framework needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NNCF compiles its kernels for a minute or two, and does without them where there is no compiler."""
    logger = logging.getLogger("nncf")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "false")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        logger.setLevel(logging.ERROR)
        yield
    logger.setLevel(level)
