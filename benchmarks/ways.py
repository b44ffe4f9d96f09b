"""The ways to load a file into a model that are compared: torch's and safetensors' own, peers', and ours."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

import qat_compat as qc
from benchmarks.harness import device
from benchmarks.models import blank, build

__all__ = ["WAYS", "Way", "available", "baseline"]

_BLOCK = 4 << 20


@dataclass(frozen=True)
class Way:
    """One way.

    Args:
        container: Suffix of the file or folder that it reads.
        load: Fills the model from the file.
        devices: Types of device where it works; all if there are none.
        package: What it needs besides what the project needs.
        meta: Whether the model is on the meta device, and made by the load.
    """

    container: str
    load: Callable[[nn.Module, Path], object]
    devices: tuple[str, ...] = ()
    package: str = "torch"
    meta: bool = False

    def model(self, name: str) -> nn.Module:
        """The model as it is before the load."""
        return build(name, "meta") if self.meta else blank(name, device())

    @property
    def is_available(self) -> bool:
        here = not self.devices or device().type in self.devices
        return here and find_spec(self.package) is not None


def _load_file(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path, device=str(device())))


def _torch_load(model: nn.Module, path: Path) -> None:
    model.load_state_dict(torch.load(path, map_location=device(), weights_only=True))


def _copied(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for key, value in tensors:
            state[key].copy_(value)


def _safe_open(model: nn.Module, path: Path) -> None:
    with safe_open(path, "pt") as file:
        _copied(model, ((key, file.get_tensor(key)) for key in file.keys()))  # noqa: SIM118 - the file is no mapping


def _pread(model: nn.Module, path: Path) -> None:
    """The least that any load into a model that is there must do: two threads, and nothing looked at."""
    header = 8 + int.from_bytes(path.open("rb").read(8), "little")
    with safe_open(path, "pt") as file:
        order = file.offset_keys()
    state = model.state_dict()
    blocks: list[tuple[memoryview, int]] = []
    for key in order:
        values = memoryview(state[key].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        blocks += [(values[at : at + _BLOCK], header + at) for at in range(0, len(values), _BLOCK)]
        header += len(values)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda block: os.preadv(descriptor, [block[0]], block[1]), blocks))
    finally:
        os.close(descriptor)


def _fastsafetensors(model: nn.Module, path: Path) -> None:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[str(path)], nogds=True, device=str(device())) as file:
        _copied(model, ((key, file.get_tensor(key)) for key in list(file.keys())))


def _runai(model: nn.Module, path: Path) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        _copied(model, streamer.get_tensors())


def _instanttensor(model: nn.Module, path: Path) -> None:
    from instanttensor import safe_open as instant_open

    with instant_open(str(path), framework="pt", device=device(), copy=False) as file:
        _copied(model, file.tensors())


def _shards(model: nn.Module, path: Path) -> None:
    for shard in sorted(path.glob("*.safetensors")):
        model.load_state_dict(load_file(shard, device=str(device())), strict=False)


def _distributed(model: nn.Module, path: Path) -> None:
    """Reads into the model's own tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(model.state_dict(), checkpoint_id=path)


def _mapped(model: nn.Module, path: Path) -> None:
    """With the time to touch every page, which a load that copies has spent."""
    qc.load_checkpoint(model, path, mmap=True, progress=False)
    for tensor in model.state_dict().values():
        tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _ours(model: nn.Module, path: Path, **options: Any) -> None:
    qc.load_checkpoint(model, path, progress=False, device=device() if model_is_meta(model) else None, **options)


def model_is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


# the first of each container is the baseline of its ratios
WAYS: Mapping[str, Way] = {
    "load_file + load_state_dict": Way("safetensors", _load_file),
    "safe_open + copy": Way("safetensors", _safe_open),
    "pread into the model, two threads": Way("safetensors", _pread, devices=("cpu",)),
    "fastsafetensors + copy": Way("safetensors", _fastsafetensors, devices=("cpu", "cuda"), package="fastsafetensors"),
    "runai_model_streamer + copy": Way("safetensors", _runai, devices=("cpu", "cuda"), package="runai_model_streamer"),
    "instanttensor + copy": Way("safetensors", _instanttensor, devices=("cuda",), package="instanttensor"),
    "qat_compat": Way("safetensors", _ours),
    "qat_compat inplace": Way("safetensors", partial(_ours, inplace=True)),
    "qat_compat into a meta model": Way("safetensors", _ours, meta=True),
    "qat_compat mmap, and each page touched": Way("safetensors", _mapped, devices=("cpu",)),
    "torch.load + load_state_dict": Way("pt", _torch_load),
    "qat_compat from .pt": Way("pt", _ours),
    "qat_compat from .pt, inplace": Way("pt", partial(_ours, inplace=True)),
    "load_file of each shard + load_state_dict": Way("shards", _shards),
    "qat_compat from shards": Way("shards", _ours),
    "qat_compat from shards, inplace": Way("shards", partial(_ours, inplace=True)),
    "torch.distributed.checkpoint.load": Way("dcp", _distributed),
    "qat_compat from DCP": Way("dcp", _ours),
    "qat_compat from DCP, inplace": Way("dcp", partial(_ours, inplace=True)),
}


def available(names: Iterable[str] = WAYS) -> list[str]:
    """Those that can be taken here."""
    return [name for name in names if WAYS[name].is_available]


def baseline(name: str) -> str:
    """What a way is compared with: the first of its container."""
    return next(base for base, way in WAYS.items() if way.container == WAYS[name].container)
