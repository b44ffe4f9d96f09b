"""What all tests share: the zoo is importable, and a test that runs beside others on a small machine stays on one
core."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "matrix")]

import late  # noqa: E402
import torch  # noqa: E402  (the hub must be offline before anything imports it)

from qat_compat.devices import accelerator  # noqa: E402

torch.set_num_threads(1)
if late.is_wanted():
    late.register()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs an accelerator is skipped, and counted as skipped, where there is none."""
    if accelerator() is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(name="accelerator")
def _accelerator() -> str:
    """The type of the accelerator that tests marked `gpu` run on."""
    found = accelerator()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """No test depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_torch() -> object:
    """torch.ao warns on every observer that has seen nothing, and of its own future."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        yield
