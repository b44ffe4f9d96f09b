"""torch's files from before 1.6; the oracle is torch.load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_torch_zip import assert_like_torch
from torch import nn

from qat_compat.errors import CheckpointError
from qat_compat.storage import open_source


def legacy(value: object, path: Path) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def test_a_training_checkpoint(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    tensors = {"a": weight, "tied": weight, "part": weight[1:, ::2], "half": torch.ones(3).half(), "n": torch.tensor(7)}
    path = legacy({"state_dict": tensors, "epoch": 3}, tmp_path / "f")
    assert_like_torch(path, torch.load(path, weights_only=True)["state_dict"])
    checkpoint = open_source(path)
    assert checkpoint.metadata == {"epoch": 3}
    assert checkpoint.alias("a") == checkpoint.alias("tied") != checkpoint.alias("part")


def test_a_module_saved_whole_with_its_source(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    assert_like_torch(legacy(model, tmp_path / "f.pt"), dict(model.state_dict()))


def test_files_that_were_saved_on_a_gpu(tmp_path: Path) -> None:
    path = legacy({"w": torch.arange(3.0)}, tmp_path / "f.pt")
    data = path.read_bytes()
    assert data.count(b"X\x03\x00\x00\x00cpu") == 1
    path.write_bytes(data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1"))
    found = open_source(path)["w"]
    assert found.device.type == "cpu"
    assert found.tolist() == [0.0, 1.0, 2.0]


def test_a_storage_of_another_length(tmp_path: Path) -> None:
    path = legacy({"w": torch.arange(3.0)}, tmp_path / "f.pt")
    data = bytearray(path.read_bytes())
    assert data[-20:-12] == (3).to_bytes(8, "little")
    data[-20] = 2
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        open_source(path)
    assert (error.value.expected, error.value.found) == ("12 bytes", "8 bytes")


def test_bytes_after_the_last_storage(tmp_path: Path) -> None:
    path = legacy({"w": torch.arange(3.0)}, tmp_path / "f.pt")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="corrupt"):
        open_source(path)
