"""Saving: the old file or the new one, whatever happens in between, and a SaveError that says what happened."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat_compat.errors import SaveError
from qat_compat.schema import Spec
from qat_compat.storage import Checkpoint, new_folder, open_source, save

BOTH = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


@pytest.fixture
def old(tmp_path: Path, suffix: str) -> Path:
    """A file that must survive."""
    return save({"w": torch.tensor(1.0)}, tmp_path / f"model{suffix}")


def assert_untouched(path: Path, before: bytes) -> None:
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


UNSUPPORTED: dict[str, Any] = {
    "an object": object(),
    "a list": [torch.ones(1)],
    "a lambda": lambda: None,
    "sparse": torch.eye(2).to_sparse(),
    "on meta": torch.ones(2, device="meta"),
}


@BOTH
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_value_half_way(old: Path, name: str) -> None:
    before = old.read_bytes()
    with pytest.raises(SaveError) as error:
        save({"a": torch.ones(3), "bad": UNSUPPORTED[name]}, old)
    assert error.value.key == "bad"
    assert error.value.file == str(old)
    assert_untouched(old, before)


@BOTH
@pytest.mark.parametrize("part", ["record", "metadata", "versions"])
def test_an_unsupported_value_beside_the_tensors(old: Path, part: str) -> None:
    before = old.read_bytes()
    with pytest.raises(SaveError) as error:
        save({"a": torch.ones(3)}, old, **{part: {"inner": {"bad": object()}}})
    assert "bad" in str(error.value.key)
    assert_untouched(old, before)


@BOTH
@pytest.mark.parametrize(
    "failure", [RuntimeError("out of memory"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")]
)
def test_a_source_that_fails_in_the_middle(old: Path, failure: BaseException) -> None:
    before = old.read_bytes()

    def read(key: str) -> Tensor:
        if key == "2":
            raise failure
        return torch.ones(4)

    source = Checkpoint({str(i): Spec((4,), torch.float32) for i in range(4)}, read, name="<source>")
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else SaveError
    with pytest.raises(expected):
        save(source, old)
    assert_untouched(old, before)


@BOTH
def test_a_tensor_that_is_not_what_was_announced(tmp_path: Path, suffix: str) -> None:
    source = Checkpoint({"w": Spec((4,), torch.float32)}, lambda key: torch.ones(5), name="<source>")
    with pytest.raises(SaveError, match="announced") as error:
        save(source, tmp_path / f"f{suffix}")
    assert (error.value.key, error.value.expected, error.value.found) == ("w", "float32[4]", "float32[5]")


@BOTH
def test_a_folder_that_is_missing(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(SaveError) as error:
        save({"w": torch.ones(1)}, tmp_path / "none" / f"f{suffix}")
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOENT
    assert f"[errno {errno.ENOENT}]" in str(error.value.found)


def test_a_destination_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(SaveError, match="not a regular file"):
        save({"w": torch.ones(1)}, tmp_path / "folder.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(SaveError, match="not a regular file"):
        save({"w": torch.ones(1)}, tmp_path / "pipe.pt")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(SaveError) as error:
        save({"w": torch.ones(1)}, tmp_path / ("n" * 300))
    assert isinstance(error.value.__cause__, OSError)
    assert save({"w": torch.ones(1)}, tmp_path / ("n" * 255)).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@BOTH
def test_permissions(old: Path) -> None:
    before = old.read_bytes()
    old.chmod(0o444)
    with pytest.raises(SaveError, match="could not be written") as error:
        save({"w": torch.ones(1)}, old)
    assert str(errno.EACCES) in str(error.value.found)
    old.chmod(0o644)
    old.parent.chmod(0o555)
    try:
        with pytest.raises(SaveError, match="could not be written"):
            save({"w": torch.ones(1)}, old)
    finally:
        old.parent.chmod(0o755)
    assert_untouched(old, before)


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
    )


def test_a_full_disk(tmp_path: Path) -> None:
    """A file size limit fails in the same place as a full disk, with an errno of its own."""
    paths = [save({"w": torch.tensor(1.0)}, tmp_path / f"model{suffix}") for suffix in (".pt", ".safetensors")]
    before = [path.read_bytes() for path in paths]
    process = run(
        """
        import resource, signal, sys, torch
        from qat_compat.errors import SaveError
        from qat_compat.storage import save
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        for path in sys.argv[1:]:
            try:
                save({str(i): torch.zeros(1 << 18) for i in range(4)}, path)
            except SaveError as error:
                print(error.__cause__.errno)
        """,
        *paths,
    )
    output, errors = process.communicate(timeout=120)
    assert output.split() == [str(errno.EFBIG)] * 2, errors
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_folder_that_fails_is_called_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(SaveError) as error, new_folder(tmp_path / "out") as folder:
        save({"w": torch.zeros(2, dtype=torch.complex128)}, folder / "model.safetensors")
    assert error.value.file == str(tmp_path / "out" / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    """A writer that is killed at different moments always leaves a whole file."""
    path = tmp_path / "model.pt"
    save({"w": torch.zeros(1 << 20), "n": torch.tensor(0)}, path)
    process = run(
        """
        import sys, torch
        from qat_compat.storage import save
        print("ready", flush=True)
        for number in range(1, 100000):
            save({"w": torch.full((1 << 20,), float(number)), "n": torch.tensor(number)}, sys.argv[1])
            print(number, flush=True)
        """,
        path,
    )
    assert process.stdout is not None
    try:
        for _ in range(3):
            assert process.stdout.readline(), "the writer ended"
        for moment in range(8):
            os.kill(process.pid, signal.SIGSTOP)  # as good as dead, for as long as we look
            found = open_source(path, verify=True)
            number = found["n"].item()
            assert (found["w"] == number).all(), moment
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.003 * moment)
    finally:
        process.kill()
        process.communicate()
    found = open_source(path, verify=True)
    assert (found["w"] == found["n"].item()).all()


def test_several_writers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(5):
                save({"w": torch.full((1 << 16,), float(number)), "n": torch.tensor(number)}, path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            found = open_source(path, verify=True)
            assert (found["w"] == found["n"].item()).all()
    assert failures == []
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@BOTH
def test_file_and_folder_are_brought_to_the_disk_before_and_after_the_rename(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    save({"w": torch.ones(1)}, tmp_path / f"f{suffix}")
    assert events == ["file", "rename", "folder"]
