"""Cells of our own matrix that fail for a known reason do not stop the tests; the report shows them as failed."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from declared import DEFECTS

    for item in items:
        cell = getattr(item, "cell", None)
        name = "" if cell is None else f"{cell.model}/{cell.id}"
        for glob, reason in DEFECTS.items():
            if cell is not None and fnmatchcase(name, glob):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
