"""The most memory that a load takes beyond the model that it fills."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Figures, device, peak_of, summary, timed
from benchmarks.models import build, same_values, write_files
from benchmarks.ways import WAYS, available

__all__ = ["one", "prepare", "rows", "table"]

_HOW = (
    "load_file + load_state_dict",
    "qat_compat",
    "qat_compat inplace",
    "qat_compat into a meta model",
    "torch.load + load_state_dict",
    "qat_compat from .pt, inplace",
)


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    name = "tiny" if tiny else "llama-4-layers-bf16"
    for each in {"tiny", name}:
        write_files(each, folder)
    return [(name, how, str(folder)) for how in available(_HOW)]


def one(name: str, how: str, folder: str) -> Figures:
    way = WAYS[how]
    way.load(way.model("tiny"), Path(folder, f"tiny.{way.container}"))
    path, model = Path(folder, f"{name}.{way.container}"), way.model(name)
    made = sum(t.nbytes for t in model.state_dict().values() if t.is_meta)  # the model itself is no extra
    figures: Figures = {}
    on_device = {"device_extra": 0.0}
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats(device())
        held = torch.cuda.memory_allocated(device())
    before, peak = peak_of(lambda: figures.update(timed(lambda: way.load(model, path))))
    if device().type == "cuda":
        on_device["device_extra"] = max(0, torch.cuda.max_memory_allocated(device()) - held - made)
        made = 0
    same_values(model, build(name))
    return {**figures, **on_device, "extra": max(0, peak - before - made), "bytes": path.stat().st_size}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    return [
        summary(
            figures,
            suite="memory",
            model=name,
            how=how,
            bytes=int(figures[0]["bytes"]),
            extra_bytes=int(statistics.median(one["extra"] for one in figures)),
            device_extra_bytes=int(statistics.median(one["device_extra"] for one in figures)),
        )
        for (name, how, _), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    size = f"{rows[0]['model']}, a file of {rows[0]['bytes'] >> 20} MiB"
    lines = [f"| memory beyond the model ({size}) | MiB of the host at the peak | of the device |"]
    lines.append("| --- | ---: | ---: |")
    return lines + [
        f"| {row['how']} | {row['extra_bytes'] / (1 << 20):.1f} | {row['device_extra_bytes'] / (1 << 20):.1f} |"
        for row in rows
    ]
