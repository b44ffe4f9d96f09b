"""What every test of a real framework needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from no_compiler import no_compiler


@pytest.fixture(scope="module", autouse=True)
def _without_compiler() -> Iterator[None]:
    with no_compiler():
        yield
