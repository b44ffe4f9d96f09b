"""Files that are something else: each gets a clear word for what it is."""

from __future__ import annotations

import os
import pickle
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.storage import open_source

FOREIGN = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "HTML page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "GGUF": b"GGUF\x03\0\0\0" + bytes(64),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "gzip": b"\x1f\x8b\x08" + bytes(64),
    "ONNX": b"\x08\x08\x12\x07pytorch\x1a\x052.3.0" + bytes(64),
    "TensorFlow Lite": b"\x1c\0\0\0TFL3" + bytes(64),
    "SavedModel": b"\x08\x01\x12\xb7\x04*\x02\x08\x01" + bytes(64),
    "index of a TensorFlow": bytes(64) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
    "tar archive": bytes(257) + b"ustar\x0000" + bytes(300),
    r"plain pickle \(protocol 4\)": pickle.dumps({"w": [1.0]}, protocol=4),
    "numpy array": b"\x93NUMPY\x01\0" + bytes(64),
    "zeros only": bytes(5000),
    "0 bytes": b"",
    "text": b"epoch,loss\n1,0.5\n2,0.4\n",
    "weight_map": b'{"hidden_size": 3}',
    "empty ZIP": b"PK\x05\x06" + bytes(18),
    "unknown format": b"\xde\xad\xbe\xef" * 20,
}


@pytest.mark.parametrize("word", FOREIGN)
def test_each_is_named(tmp_path: Path, word: str) -> None:
    (tmp_path / "model.pt").write_bytes(FOREIGN[word])
    with pytest.raises(CheckpointError, match=word) as error:
        open_source(tmp_path / "model.pt")
    assert error.value.file == str(tmp_path / "model.pt")
    assert error.value.remedy


def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="TorchScript") as error:
        open_source(tmp_path / "m.pt")
    assert "torch.jit.load" in str(error.value.remedy)


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("README.md", "hello")
    with pytest.raises(CheckpointError, match=r"ZIP archive with README\.md"):
        open_source(tmp_path / "m.zip")


def test_the_name_says_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "model.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_source(tmp_path / "model.pt")) == list(open_source(tmp_path / "model.safetensors")) == ["w"]


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["saved_model.pb"], "SavedModel"),
        (["checkpoint", "a.index"], "TensorFlow"),
        ([], "empty folder"),
        (["a.txt"], "a.txt"),
    ],
)
def test_folders(tmp_path: Path, names: list[str], word: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=word):
        open_source(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(tmp_path / "none.pt")
    with pytest.raises(CheckpointError):
        open_source("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    errors: list[Exception] = []

    def read() -> None:
        try:
            open_source(tmp_path / "pipe")
        except CheckpointError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert "pipe" in str(errors[0])


def test_a_device() -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_source("/dev/null")


def test_a_file_of_holes(tmp_path: Path) -> None:
    with (tmp_path / "m.safetensors").open("wb") as stream:
        header = b'{"w":{"dtype":"U8","shape":[68719476672],"data_offsets":[0,68719476672]}}'
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.flush()
        try:
            stream.truncate(8 + len(header) + 68719476672)
        except OSError:
            pytest.skip("the file system has no sparse files of 64 GB")
        os.fsync(stream.fileno())
    if (tmp_path / "m.safetensors").stat().st_blocks == 0:
        pytest.skip("the file system does not say how much of a file is on disk")
    with pytest.raises(LimitError, match="holes"):
        open_source(tmp_path / "m.safetensors")
