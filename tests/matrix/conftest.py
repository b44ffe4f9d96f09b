"""Cells of our own matrix that fail for a known reason do not stop the tests; the report shows them as failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from fnmatch import fnmatchcase

import pytest
from no_compiler import no_compiler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from declared import DEFECTS

    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        name = f"{cell.model}/{cell.id}"
        for reason in (why for glob, why in DEFECTS.items() if fnmatchcase(name, glob)):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))  # it may be in some models only


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    cell = getattr(item, "cell", None)
    with no_compiler() if cell is not None and cell.flow == "nncf" else nullcontext():
        yield
