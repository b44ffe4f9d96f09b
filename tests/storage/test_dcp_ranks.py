"""Folders of torch.distributed.checkpoint that several ranks wrote, with one index for all of them or one for each."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat_compat.errors import CheckpointError
from qat_compat.storage import open_source


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def apart(written: Path, tmp_path: Path) -> Path:
    """A copy of the folder in which each rank has an index of its own."""
    return shutil.copytree(written / "apart", tmp_path / "apart")


@pytest.fixture
def whole(written: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(written / "whole.pt", weights_only=True)
    return state


def edit(path: Path, change: Callable[[Any], None]) -> None:
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("name", ["together", "apart"])
def test_what_the_ranks_saved(written: Path, whole: dict[str, Tensor], name: str) -> None:
    found = open_source(written / name)
    assert set(found) == set(whole)
    assert all(torch.equal(found[key], value) for key, value in whole.items())
    assert found.metadata["epoch"] == 3


def test_order_and_copies_of_ranks_that_saved_apart(apart: Path, whole: dict[str, Tensor]) -> None:
    """Statistics are not sharded: each rank has its own, and what is read is rank 0's, as torch itself has it."""
    found = open_source(apart)
    assert list(found) == list(whole)
    assert found.notes == (
        "each of 2 ranks saved its own copy of 3 of 10 entries: those are read from the first that has them",
    )


def test_a_rank_that_is_missing(apart: Path) -> None:
    (apart / "__1.metadata").unlink()
    with pytest.raises(CheckpointError, match="pieces") as caught:
        open_source(apart)
    assert caught.value.key == "state_dict.0.weight"
    assert (caught.value.expected, caught.value.found) == ("30 elements, each once", "18 in 1 piece")


def test_a_rank_that_is_missing_in_between(apart: Path) -> None:
    (apart / "__0.metadata").unlink()
    with pytest.raises(CheckpointError, match="index of a rank is missing") as caught:
        open_source(apart)
    assert caught.value.found == "no __0.metadata"


def test_a_rank_left_over_from_a_save_with_more_of_them(apart: Path) -> None:
    shutil.copy(apart / "__1.metadata", apart / "__2.metadata")
    assert len(open_source(apart)) == 9  # the very same pieces once more

    def shift(index: Any) -> None:
        (chunk,) = index.state_dict_metadata["state_dict.0.bias"].chunks
        place = next(where for where in index.storage_data if where.fqn == "state_dict.0.bias")
        chunk.offsets = torch.Size([2])
        index.storage_data = {
            type(where)(where.fqn, torch.Size([2]) if where is place else where.offset): what
            for where, what in index.storage_data.items()
        }

    edit(apart / "__2.metadata", shift)
    with pytest.raises(CheckpointError, match="pieces") as caught:
        open_source(apart)
    assert caught.value.key == "state_dict.0.bias"
    assert "left over" in str(caught.value.remedy)


def test_ranks_that_disagree(apart: Path) -> None:
    def grow(index: Any) -> None:
        index.state_dict_metadata["state_dict.0.weight"].size = torch.Size([7, 6])

    edit(apart / "__1.metadata", grow)
    with pytest.raises(CheckpointError, match="two ranks disagree") as caught:
        open_source(apart)
    assert (caught.value.expected, caught.value.found) == ("float32[5, 6]", "float32[7, 6]")


def test_one_index_for_all_goes_before_those_of_ranks(written: Path, apart: Path) -> None:
    """Left over from an earlier save into the same folder; torch reads it first, too."""
    for path in (written / "together").iterdir():
        shutil.copy(path, apart / path.name)
    assert open_source(apart).notes == ()
