"""Hugging Face's sharded checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qat_compat.errors import CheckpointError, LimitError, UnsafeCheckpointError
from qat_compat.storage import open_source

TENSORS = {"b": torch.arange(3.0), "a": torch.ones(2, 2), "c": torch.zeros(1).half()}


def shards(folder: Path, parts: dict[str, list[str]] | None = None) -> Path:
    """A folder with an index; the keys are in another order than the shards."""
    parts = parts or {"model-1.safetensors": ["a"], "model-2.safetensors": ["b", "c"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, keys in parts.items():
        save_file({key: TENSORS[key] for key in keys}, folder / name)
    where = {key: name for key in TENSORS for name, keys in parts.items() if key in keys}
    return index(folder, where)


def index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}))
    return path


def assert_whole(source: Path) -> None:
    checkpoint = open_source(source)
    assert list(checkpoint) == list(TENSORS)
    assert all(torch.equal(checkpoint[key], value) for key, value in TENSORS.items())
    assert checkpoint.metadata["total_size"] == 9


def test_folder_and_index(tmp_path: Path) -> None:
    path = shards(tmp_path / "model")
    assert_whole(path)
    assert_whole(tmp_path / "model")


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert set(open_source(tmp_path)) == set(TENSORS)


def test_shards_that_torch_wrote(tmp_path: Path) -> None:
    def part(*keys: str) -> dict[str, Tensor]:
        return {key: TENSORS[key] for key in keys}

    torch.save(part("a"), tmp_path / "pytorch_model-1.bin")
    torch.save(part("b", "c"), tmp_path / "pytorch_model-2.bin")
    weight_map = {"b": "pytorch_model-2.bin", "a": "pytorch_model-1.bin", "c": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(open_source(tmp_path)) == ["b", "a", "c"]


def test_the_hugging_face_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0af", tmp_path / "models--x" / "blobs"
    shards(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    assert_whole(snapshot)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "sub/../../x", "..", ""])
def test_paths_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shards(folder)
    save_file({"a": TENSORS["a"]}, tmp_path / "model-1.safetensors")
    path = index(folder, {"a": name})
    with pytest.raises(UnsafeCheckpointError, match="outside its folder") as error:
        open_source(path)
    assert error.value.key == name


def test_a_link_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    path = shards(folder)
    (folder / "model-1.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model-1.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeCheckpointError, match="outside its folder"):
        open_source(path)


def test_a_missing_shard(tmp_path: Path) -> None:
    path = shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file") as error:
        open_source(path)
    assert error.value.file is not None
    assert error.value.file.endswith("model-2.safetensors")


def test_a_key_in_two_shards(tmp_path: Path) -> None:
    path = shards(tmp_path, {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["b", "c"]})
    with pytest.raises(CheckpointError, match="in two shards") as error:
        open_source(path)
    assert error.value.key == "b"


def test_a_key_that_is_in_another_shard(tmp_path: Path) -> None:
    shards(tmp_path)
    path = index(tmp_path, dict.fromkeys(TENSORS, "model-1.safetensors"))
    with pytest.raises(CheckpointError, match="not in the shard that the index names") as error:
        open_source(path)
    assert error.value.key == "b"


def test_a_key_that_the_index_does_not_list(tmp_path: Path) -> None:
    shards(tmp_path)
    path = index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match="does not list") as error:
        open_source(path)
    assert error.value.key == "c"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"weight_map": {"a": "x", "a": "y"}}', CheckpointError),
        ('{"weight_map": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}", LimitError),
        ('{"weight_map": {"a": 1}}', CheckpointError),
        ('{"architectures": ["Bert"]}', CheckpointError),
    ],
    ids=["duplicate key", "deep", "number", "config.json"],
)
def test_malformed_indexes(tmp_path: Path, text: str, kind: type[Exception]) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(kind):
        open_source(path)
