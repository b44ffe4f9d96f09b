"""A file into a QAT model whose weights have scales: reading and ranges together, until the model can be trained."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import qat_compat as qc
from benchmarks.harness import Figures, floor, summary, timed, touch_memory
from benchmarks.quantized import GRANULARITIES, Granularity, by_granularity

__all__ = ["one", "prepare", "rows", "table"]

_DTYPES: Mapping[str, Sequence[str]] = {
    "per channel": ("float32", "bfloat16"),
    "per group of 32": ("bfloat16",),
    "per channel, Conv+BN": ("float32",),
}


def _safe_open(model: nn.Module, path: Path, granularity: Granularity) -> None:
    state = model.state_dict()
    with safe_open(path, "pt") as file, torch.no_grad():
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            state[granularity.name(key)].copy_(file.get_tensor(key))
    granularity.native_scales(model)


def _ours(model: nn.Module, path: Path, granularity: Granularity, **options: Any) -> None:
    qc.load_checkpoint(model, path, progress=False, **options)


# the first is the baseline
_HOW: dict[str, Callable[[nn.Module, Path, Granularity], object]] = {
    "safe_open + copy + native": _safe_open,
    "qat_compat": _ours,
    "qat_compat inplace": partial(_ours, inplace=True),
}


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    width = 64 if tiny else 2048
    cases = [(kind, dtype) for kind, dtypes in _DTYPES.items() for dtype in dtypes]
    for kind, dtype in cases:
        torch.manual_seed(0)
        model = GRANULARITIES[kind].layers(8, width).to(getattr(torch, dtype))
        save_file(dict(model.state_dict()), folder / f"{kind}.{dtype}.safetensors")
    return [(kind, dtype, how, str(width), str(folder)) for kind, dtype in cases for how in _HOW]


def one(kind: str, dtype: str, how: str, width: str, folder: str) -> Figures:
    granularity, path = GRANULARITIES[kind], Path(folder, f"{kind}.{dtype}.safetensors")
    model = granularity.prepared(8, int(width), getattr(torch, dtype))
    _HOW[how](model, path, granularity)  # what is imported late is there
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    touch_memory(path.stat().st_size * 5 // 4)
    figures = timed(lambda: _HOW[how](model, path, granularity))
    state, found = model.state_dict(), [scale.clone() for scale in granularity.scales(model)]
    if not all(torch.equal(state[granularity.name(key)].cpu(), value) for key, value in load_file(path).items()):
        raise RuntimeError("the model does not hold what the file does")
    if how.startswith("qat_compat") and not all(map(torch.equal, found, granularity.native_scales(model))):
        raise RuntimeError("scales differ from those of the framework itself")
    return {**figures, "bytes": path.stat().st_size, "floor": floor(path)}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    baseline = next(iter(_HOW))
    return [
        summary(
            figures,
            suite="load+ranges",
            granularity=kind,
            dtype=dtype,
            how=how,
            bytes=int(figures[0]["bytes"]),
            gb_per_s=figures[0]["bytes"] / medians[kind, dtype, how, *rest] / 1e9,
            share_of_floor=statistics.median(one["floor"] / one["seconds"] for one in figures),
            baseline=baseline,
            speedup=medians[kind, dtype, baseline, *rest] / medians[kind, dtype, how, *rest],
        )
        for (kind, dtype, how, *rest), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return by_granularity("load, and ranges", "against the first", rows)
