"""Reading a file needs none of the frameworks that wrote it, and importing the package imports none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import batches, float_state, make_float

PACKAGES = ("modelopt", "brevitas", "nncf", "compressed_tensors", "transformers")

READ = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ImportError(name + " was imported")

sys.meta_path.insert(0, Blocked())
import torch
import qat_compat as qc

path, like = sys.argv[1:]
checkpoint = qc.open_checkpoint(path)
back = qc.to_float(path)
expected = torch.load(like, weights_only=True)
assert list(back) == list(expected), list(back)
assert all(torch.equal(back[key], expected[key]) for key in expected)
print(checkpoint.framework, checkpoint.stage)
"""


@pytest.mark.parametrize("framework", ["modelopt", "brevitas", "nncf"])
def test_a_file_is_read_without_the_package_that_wrote_it(framework: str, tmp_path: Path) -> None:
    flows = pytest.importorskip(f"test_{framework}")
    options = {"build": flows.CONFIGS["learned"]} if framework == "brevitas" else {}
    model = make_float()
    model.load_state_dict(float_state())
    model = flows.prepare(model, batches(), **options)
    path, like = tmp_path / "qat.pt", tmp_path / "float.pt"
    if framework == "modelopt":
        flows.mto.save(model, path)
    else:
        torch.save(model.state_dict(), path)
    torch.save(float_state(), like)
    command = [sys.executable, "-W", "ignore", "-c", READ.format(packages=PACKAGES), str(path), str(like)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [framework, "prepared"]
