"""Two processes that train one sharded model and save it in every way of torch.distributed.checkpoint.

Run as `python two_ranks.py FOLDER`; leaves `together/` and `apart/`, and what they hold in `whole.pt`.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

RANKS = 2


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))  # 5 and 3 rows are cut unevenly
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()  # the same batch everywhere: statistics are equal
    optimizer.step()
    state = {"state_dict": model.state_dict(), "epoch": 3}
    dcp.save(state, checkpoint_id=folder / "together")
    dcp.save(state, checkpoint_id=folder / "apart", use_collectives=False)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    spawn(main, (Path(sys.argv[1]),), nprocs=RANKS)
