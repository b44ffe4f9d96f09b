"""Reading a file needs none of the frameworks that wrote it, and importing the package imports none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import batches, float_state, make_float

import qat_compat as qc

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
from qat_compat.schema import Role
from qat_compat.source import open_any

path, like = sys.argv[1:]
checkpoint = qc.open_checkpoint(path)
back = qc.to_float(path)
expected = torch.load(like, weights_only=True)
assert list(back) == list(expected), list(back)
assert all(torch.equal(back[key], expected[key]) for key in expected)
source = open_any(path)
scales = [key for key, entry in source.schema.items() if (entry.role, entry.site) == (Role.SCALE, "weight:fc1")]
assert all(bool((source.read(key) > 0).all()) for key in scales)
print(checkpoint.framework, checkpoint.stage, len(scales))
"""


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("framework", ["modelopt", "brevitas", "nncf"])
def test_a_file_is_read_without_the_package_that_wrote_it(framework: str, ours: bool, tmp_path: Path) -> None:
    """And its scales, where the file tells them: ModelOpt's own does, and every one that we write."""
    flows = pytest.importorskip(f"test_{framework}")
    options = {"build": flows.CONFIGS["learned"]} if framework == "brevitas" else {}
    model = make_float()
    model.load_state_dict(float_state())
    model = flows.prepare(model, batches(), **options)
    path, like = tmp_path / "qat.pt", tmp_path / "float.pt"
    if ours:
        qc.save_checkpoint(model, path)
    elif framework == "modelopt":
        flows.mto.save(model, path)
    else:
        torch.save(model.state_dict(), path)
    torch.save(float_state(), like)
    command = [sys.executable, "-W", "ignore", "-c", READ.format(packages=PACKAGES), str(path), str(like)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [framework, "prepared", str(int(ours or framework == "modelopt"))]
