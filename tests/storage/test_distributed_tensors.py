"""DTensors of FSDP2 in a state dict: read where one process holds all of them, refused where it holds a part.

A model that holds them is not loaded, and says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What one of `sys.argv[1]` ranks finds; it must be a process of its own, since a process group is for the whole of it.
RANK = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.multiprocessing.spawn import spawn
import qat_compat as qc

def main(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    fully_shard(model, mesh=mesh)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    qc_sources = [model, model.state_dict(), folder / f"{rank}.pt"]
    for source in qc_sources:
        if ranks == 1:
            found = qc.open_checkpoint(source)
            assert all(type(found[key]) is torch.Tensor and torch.equal(found[key], expected[key]) for key in expected)
            fresh = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
            assert qc.load_checkpoint(fresh, source).copied == len(expected)
            refused({"w": DTensor.from_local(torch.ones(2), mesh, [Partial()])}, "a partial sum", folder)
        else:
            refused(source, f"a part: {[[2, 4], [1, 4]][rank]}", folder)
    held = [parameter.to_local().clone() for parameter in model.parameters()]
    try:
        qc.load_checkpoint(model, {key: value + 1 for key, value in expected.items()})
    except qc.CompatError as error:
        assert error.key == "0.weight" and "load first" in error.remedy and "Shard(dim=0)" in error.found, str(error)
    else:
        raise AssertionError("a distributed model was loaded")
    assert all(torch.equal(p.to_local(), value) for p, value in zip(model.parameters(), held, strict=True))
    dist.barrier()
    dist.destroy_process_group()

def refused(source, found, folder):
    try:
        qc.open_checkpoint(source)
    except qc.CheckpointError as error:
        assert error.found == found and "full_state_dict" in error.remedy, str(error)
    else:
        raise AssertionError(f"{source} was read")

if __name__ == "__main__":
    ranks = int(sys.argv[1])
    spawn(main, (ranks, Path(sys.argv[2])), nprocs=ranks)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_rank_holds(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(tmp_path / "rank.py"), str(ranks), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
