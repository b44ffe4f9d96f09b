"""Which checkpoint of a folder to go on from."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qat_compat.errors import CheckpointError
from qat_compat.storage import find_checkpoint, save


def checkpoint(folder: Path, name: str, age: int) -> Path:
    """A file that was written `age` seconds ago."""
    path = folder / name
    save({"w": torch.arange(64.0)}, path)
    os.utime(path, (1_700_000_000 - age,) * 2)
    return path


def test_the_newest(tmp_path: Path) -> None:
    checkpoint(tmp_path, "epoch=1.pt", 30)
    newest = checkpoint(tmp_path, "epoch=9.pt", 10)
    checkpoint(tmp_path, "epoch=10.pt", 20)
    checkpoint(tmp_path, "other.safetensors", 0)
    assert find_checkpoint(tmp_path, "epoch=*.pt") == newest


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "temporary"])
def test_incomplete_files_are_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    older = checkpoint(tmp_path, "a.pt", 30)
    newer = checkpoint(tmp_path, "b.pt", 10)
    data = newer.read_bytes()
    at = data.index(torch.arange(64.0).numpy().tobytes())
    damaged = {
        "cut": data[:-100],
        "flipped": data[:at] + b"\1" + data[at + 1 :],
        "empty": b"",
        "text": b"not yet",
        "temporary": data,
    }[damage]
    newer.write_bytes(damaged)
    if damage == "temporary":
        newer.rename(tmp_path / ".b.pt")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "*") == older
    assert ("b.pt is not complete" in caplog.text) == (damage != "temporary")


@pytest.mark.parametrize("place", ["a.pt", ""])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_what_cannot_be_read_now_is_an_error(
    tmp_path: Path, place: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is whole: from scratch, or from an older one, training would overwrite it."""
    checkpoint(tmp_path, "a.pt", 10)
    refused = tmp_path / place

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any) -> Any:
            if str(path) == str(refused):
                raise OSError(code, os.strerror(code))
            return real(path, *rest)

        return call

    for name in ("open", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        find_checkpoint(tmp_path, "*.pt")
    assert error.value.file == str(refused)


def test_a_link_that_leads_nowhere_is_passed_over(tmp_path: Path) -> None:
    older = checkpoint(tmp_path, "a.pt", 10)
    (tmp_path / "last.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    assert find_checkpoint(tmp_path, "*.pt") == older


@pytest.mark.parametrize("folder", [b".", None, 5])
def test_what_is_no_folder_is_said(folder: Any) -> None:
    with pytest.raises(CheckpointError, match="this is no folder"):
        find_checkpoint(folder, "*.pt")


def test_none_means_from_scratch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path / "missing", "*.pt") is None
    assert "training starts from scratch" in caplog.text


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_sidecar_is_compared(tmp_path: Path, kind: str) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pth")
    digest = hashlib.new(kind, (tmp_path / "m.pth").read_bytes()).hexdigest()
    sidecar = tmp_path / f"m.pth.{kind}"
    sidecar.write_text(f"{digest.upper()}  m.pth\n")
    assert find_checkpoint(tmp_path, "m*") == tmp_path / "m.pth"
    sidecar.write_text("0" * len(digest))
    assert find_checkpoint(tmp_path, "m*") is None
    sidecar.write_text("later")
    assert find_checkpoint(tmp_path, "m*") is None


def test_the_configuration_is_in_the_name(tmp_path: Path) -> None:
    small = checkpoint(tmp_path, "pretrain_32.pth", 0)
    large = checkpoint(tmp_path, "pretrain_512_moe.pth", 0)
    pattern = "pretrain_{hidden_size}*.pth"
    assert find_checkpoint(tmp_path, pattern, config={"hidden_size": 512}) == large
    assert find_checkpoint(tmp_path, pattern, config={"hidden_size": 32}) == small
    with pytest.raises(CheckpointError, match="field") as error:
        find_checkpoint(tmp_path, pattern, config={"layers": 2})
    assert error.value.found == "hidden_size"
    with pytest.raises(CheckpointError, match="pattern is malformed"):
        find_checkpoint(tmp_path, "pretrain_{*.pth")


def test_a_value_of_the_configuration_is_no_pattern(tmp_path: Path) -> None:
    checkpoint(tmp_path, "run_lr0.pt", 0)
    wanted = checkpoint(tmp_path, "run_lr[0.1].pt", 0)
    assert find_checkpoint(tmp_path, "run_{name}*.pt", config={"name": "lr[0.1]"}) == wanted


def test_which_of_several_sets_is_meant_is_not_asked_here(tmp_path: Path) -> None:
    torch.save({"generator": {"w": torch.ones(2)}, "discriminator": {"w": torch.ones(3)}}, tmp_path / "gan.pt")
    assert find_checkpoint(tmp_path, "*.pt") == tmp_path / "gan.pt"


@pytest.mark.parametrize("pattern", ["/abs/*.pt", "", "{hidden_size:04d}.pt", "{hidden_size.x}.pt"])
def test_what_is_no_pattern_is_said(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(CheckpointError, match="pattern"):
        find_checkpoint(tmp_path, pattern, config={"hidden_size": "512"})
