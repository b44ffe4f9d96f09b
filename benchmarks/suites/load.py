"""A file into a model that is there, or is made: seconds until every value is in its place."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, floor, summary, timed, touch_memory
from benchmarks.models import build, same_values, size_of, write_files
from benchmarks.ways import WAYS, available, baseline

__all__ = ["one", "prepare", "rows", "table"]

_FEW = ("load_file + load_state_dict", "qat_compat", "qat_compat inplace")
_FILES = tuple(name for name, way in WAYS.items() if way.container in ("safetensors", "pt"))
_FOLDERS = tuple(name for name, way in WAYS.items() if way.container in ("shards", "dcp"))
# name -> which ways; `load_state_dict` takes half a minute for the last
_MODELS: Mapping[str, Sequence[str]] = {
    "llama-1b-bf16": _FILES,
    "llama-4-layers-bf16": _FOLDERS,
    "resnet152-like": _FILES,
    "resnet50-like": _FEW,
    "yolov8n-like": _FEW,
    "minilm-like": _FEW,
    "flat-20k": _FEW,
}


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    models = {"tiny": tuple(WAYS)} if tiny else _MODELS
    for name, ways in {"tiny": tuple(WAYS), **models}.items():
        write_files(name, folder, [WAYS[how].container for how in ways])
    return [(name, how, str(folder)) for name, ways in models.items() for how in available(ways)]


def one(name: str, how: str, folder: str) -> Figures:
    way = WAYS[how]
    path = Path(folder, f"{name}.{way.container}")
    way.load(way.model("tiny"), Path(folder, f"tiny.{way.container}"))  # what is imported late is there
    model = way.model(name)
    before = floor(path)
    touch_memory(size_of(path) * 5 // 4)
    figures = timed(lambda: way.load(model, path))
    after = floor(path)
    same_values(model, build(name))
    return {**figures, "bytes": size_of(path), "floor": min(before, after)}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    return [
        summary(
            figures,
            suite="load",
            model=name,
            bytes=int(figures[0]["bytes"]),
            how=how,
            gb_per_s=figures[0]["bytes"] / medians[name, how, folder] / 1e9,
            floor_s=statistics.median(one["floor"] for one in figures),
            share_of_floor=statistics.median(one["floor"] / one["seconds"] for one in figures),
            baseline=baseline(how),
            speedup=medians[name, baseline(how), folder] / medians[name, how, folder],
        )
        for (name, how, folder), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| model | how | ms | GB/s | share of the floor | against the first of its container |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        mark = " (noisy)" if row["noisy"] else ""
        lines.append(
            f"| {row['model']} | {row['how']}{mark} | {row['median_s'] * 1e3:.1f} | {row['gb_per_s']:.3g} "
            f"| {row['share_of_floor']:.2f} "
            f"| {row['speedup']:.2f}x |"
        )
    return lines
