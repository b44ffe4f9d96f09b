"""What is copied as it is goes from file to file: a checkpoint larger than the memory that is allowed can be saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qat_compat as qc

MIB = 1 << 20
# Private memory, the heap and writable mappings, is limited to what there is after start-up and `budget` bytes more.
# A first run with small tensors brings in all that is imported late.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
import qat_compat as qc

path, out, how, budget = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.save({"0.weight": torch.ones(2)}, out)
qc.save_checkpoint(qc.to_float(out), out)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = 1024 * int(status["VmData"].split()[0]) + budget
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
source = qc.to_float(path)
qc.save_checkpoint(dict(source) if how == "whole" else source, out)
"""


@pytest.fixture(scope="module", params=["safetensors", "pt"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB in tensors of 8 MiB, as QAT under a wrapper leaves them."""
    generator = torch.Generator().manual_seed(0)
    state = {f"module.{i}.weight": torch.randn(1024, 2048, generator=generator) for i in range(12)}
    path = tmp_path_factory.mktemp("whole") / f"qat.{request.param}"
    save_file(state, path) if request.param == "safetensors" else torch.save(state, path)
    return path


def run(path: Path, out: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(path), str(out), how, str(32 * MIB)]
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_third_of_the_file_is_memory_enough(path: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"float.{suffix}"
    done = run(path, out, "streamed")
    assert done.returncode == 0, done.stderr[-2000:]
    written = load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    expected = qc.to_float(path)
    assert list(expected) == sorted(written, key=list(expected).index)
    assert all(torch.equal(written[key], value) for key, value in expected.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_the_limit_is_one(path: Path, tmp_path: Path) -> None:
    done = run(path, tmp_path / "float.pt", "whole")
    assert done.returncode != 0
    assert "memory" in done.stderr.lower()


def test_sums_of_copied_tensors_are_right(tmp_path: Path) -> None:
    state = {"a": torch.randn(300, 70_000), "b": torch.tensor(3), "c": torch.zeros(0)}
    torch.save(state, tmp_path / "in.pt")
    for suffix in ("pt", "safetensors"):
        out = qc.save_checkpoint(qc.open_checkpoint(tmp_path / "in.pt"), tmp_path / f"out.{suffix}")
        checked = qc.storage.open_source(out, verify=True)
        assert not checked.notes
        assert all(torch.equal(checked[key], value) for key, value in state.items())
