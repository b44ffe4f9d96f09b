"""Folders of torch.distributed.checkpoint; the oracle is its own conversion to one file."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from qat_compat.errors import CheckpointError, UnsafeCheckpointError
from qat_compat.storage import open_source


def state() -> dict[str, Any]:
    model = {"0.weight": torch.randn(4, 3), "0.bias": torch.ones(4).bfloat16(), "n": torch.tensor(5)}
    return {"state_dict": model, "epoch": 3, "optimizer_states": [{"lr": 0.1, "m": torch.zeros(2)}]}


def write(folder: Path, value: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(value, checkpoint_id=folder, no_dist=True)
    return folder


def metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def test_folder_and_consolidated_file_are_equal(tmp_path: Path) -> None:
    folder = write(tmp_path / "dcp", state())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, tmp_path / "one.pt")
    found, expected = open_source(folder), open_source(tmp_path / "one.pt")
    assert list(found) == list(expected) == list(state()["state_dict"])
    for key in expected:
        assert found.spec(key) == expected.spec(key)
        assert torch.equal(found[key], expected[key]), key
    assert found.metadata["epoch"] == expected.metadata["epoch"] == 3
    assert found.metadata["optimizer_states"][0]["lr"] == 0.1


def test_a_flat_state_dict(tmp_path: Path) -> None:
    tensors = {"a.w": torch.randn(2), "b": torch.zeros(0, 3)}
    checkpoint = open_source(write(tmp_path / "dcp", dict(tensors)))
    assert list(checkpoint) == list(tensors)
    assert all(torch.equal(checkpoint[key], value) for key, value in tensors.items())


def test_lightnings_fsdp_folder(tmp_path: Path) -> None:
    """The module is under `model`, and the rest of the checkpoint in a file beside the shards."""
    folder = write(tmp_path / "dcp", {"model": {"net.w": torch.ones(2)}})
    torch.save({"epoch": 4, "pytorch-lightning_version": "2.6.6", "loops": {}}, folder / "meta.pt")
    checkpoint = open_source(folder)
    assert list(checkpoint) == ["net.w"]
    assert checkpoint.metadata["epoch"] == 4


def test_a_tensor_in_pieces(tmp_path: Path) -> None:
    """The index of two ranks: one tensor, cut along its first dimension."""
    whole = torch.arange(12.0).reshape(4, 3)
    folder = write(tmp_path / "dcp", {"low": whole[:3].clone(), "high": whole[3:].clone()})
    index = metadata(folder)
    entry = index.state_dict_metadata.pop("low")
    del index.state_dict_metadata["high"]
    entry.size = torch.Size([4, 3])
    entry.chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 3])),
        ChunkStorageMetadata(torch.Size([3, 0]), torch.Size([1, 3])),
    ]
    places = {key.fqn: value for key, value in index.storage_data.items()}
    index.state_dict_metadata, index.planner_data = {"w": entry}, {"w": ("w",)}
    index.storage_data = {MetadataIndex("w", (3, 0), 1): places["high"], MetadataIndex("w", (0, 0), 0): places["low"]}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert torch.equal(open_source(folder)["w"], whole)

    entry.chunks[1].offsets = torch.Size([2, 0])  # now they overlap, and a row is missing
    index.storage_data = {MetadataIndex("w", (2, 0), 1): places["high"], MetadataIndex("w", (0, 0), 0): places["low"]}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="pieces") as error:
        open_source(folder)
    assert error.value.key == "w"


@pytest.mark.parametrize("offset", [[], [0], [0, 0, 0]])
def test_a_place_in_another_number_of_dimensions(tmp_path: Path, offset: list[int]) -> None:
    folder = write(tmp_path / "dcp", {"w": torch.ones(2, 3)})
    index = metadata(folder)
    index.storage_data = {MetadataIndex("w", torch.Size(offset)): place for place in index.storage_data.values()}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="lies outside of it") as error:
        open_source(folder)
    assert error.value.key == "w"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch executed",)


def test_an_index_that_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "dcp", state())
    index = metadata(folder)
    index.planner_data = Evil()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeCheckpointError, match="run code") as error:
        open_source(folder)
    assert "system" in str(error.value.found)
    assert not (tmp_path / "executed").exists()


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "dcp", state())
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(folder)


def test_a_shard_that_was_cut_short(tmp_path: Path) -> None:
    folder = write(tmp_path / "dcp", state())
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        open_source(folder)


def test_a_shard_outside_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "dcp", state())
    index = metadata(folder)
    for place in index.storage_data.values():
        place.relative_path = "../dcp/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UnsafeCheckpointError, match="outside its folder"):
        open_source(folder)


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "dcp", state())
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError) as error:
        open_source(folder)
    assert error.value.found == "shards of a distributed checkpoint without their .metadata"


def cut(folder: Path, whole: torch.Tensor, boxes: list[tuple[slice, slice]]) -> Path:
    """A folder that holds `whole` in the given boxes."""
    write(folder, {str(number): whole[box].clone() for number, box in enumerate(boxes)})
    index = metadata(folder)
    places = {key.fqn: value for key, value in index.storage_data.items()}
    entry = index.state_dict_metadata["0"]
    starts = [tuple(part.start for part in box) for box in boxes]
    entry.size = whole.shape
    entry.chunks = [
        ChunkStorageMetadata(torch.Size(start), whole[box].shape) for start, box in zip(starts, boxes, strict=True)
    ]
    index.state_dict_metadata, index.planner_data = {"w": entry}, {"w": ("w",)}
    index.storage_data = {MetadataIndex("w", start, n): places[str(n)] for n, start in enumerate(starts)}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_a_tensor_cut_along_both_dimensions(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    boxes = [(slice(r, r + 2), slice(c, c + 3)) for c in (0, 3) for r in (0, 2)]
    assert torch.equal(open_source(cut(tmp_path / "four", whole, boxes))["w"], whole)
    boxes[3] = (slice(2, 4), slice(1, 4))  # as large as the one that is missing, over another
    with pytest.raises(CheckpointError, match="pieces"):
        open_source(cut(tmp_path / "overlapping", whole, boxes))
    with pytest.raises(CheckpointError, match="pieces"):
        open_source(cut(tmp_path / "missing", whole, boxes[:3]))
    columns = [(slice(0, 4), slice(c, c + 2)) for c in (4, 0, 2)]
    assert torch.equal(open_source(cut(tmp_path / "columns", whole, columns))["w"], whole)
