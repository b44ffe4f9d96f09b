"""A file into a model that is there, or is made: seconds until every value is in its place."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import qat_compat as qc
from benchmarks.harness import Figures, floor, summary, timed, touch_memory
from benchmarks.models import blank, build, same_values, write_files

__all__ = ["HOW", "one", "prepare", "rows", "table"]

_BLOCK = 4 << 20


def _safe_open(model: nn.Module, path: Path) -> None:
    state = model.state_dict()
    with safe_open(path, "pt") as file, torch.no_grad():
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            state[key].copy_(file.get_tensor(key))


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


# name -> (container, how); the first of each container is the baseline of its ratios
HOW: dict[str, tuple[str, Callable[[nn.Module, Path], object]]] = {
    "load_file + load_state_dict": ("safetensors", lambda m, p: m.load_state_dict(load_file(p))),
    "safe_open + copy": ("safetensors", _safe_open),
    "pread into the model, two threads": ("safetensors", _pread),
    "qat_compat": ("safetensors", lambda m, p: qc.load_checkpoint(m, p, progress=False)),
    "qat_compat inplace": ("safetensors", lambda m, p: qc.load_checkpoint(m, p, inplace=True, progress=False)),
    "qat_compat into a meta model": ("safetensors", lambda m, p: qc.load_checkpoint(m, p, progress=False)),
    "torch.load + load_state_dict": ("pt", lambda m, p: m.load_state_dict(torch.load(p, weights_only=True))),
    "qat_compat from .pt": ("pt", lambda m, p: qc.load_checkpoint(m, p, progress=False)),
    "qat_compat from .pt, inplace": ("pt", lambda m, p: qc.load_checkpoint(m, p, inplace=True, progress=False)),
}
_META = "qat_compat into a meta model"
# where `load_state_dict` takes half a minute
_FEW = ("load_file + load_state_dict", "qat_compat", "qat_compat inplace")


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    models = ["tiny"] if tiny else ["llama-4-layers-bf16", "resnet152-like", "flat-20k"]
    for name in {"tiny", *models}:
        write_files(name, folder)
    return [(name, how, str(folder)) for name in models for how in (_FEW if name == "flat-20k" else HOW)]


def one(name: str, how: str, folder: str) -> Figures:
    container, call = HOW[how]
    path = Path(folder, f"{name}.{container}")
    call(_model("tiny", how), Path(folder, f"tiny.{container}"))  # what is imported late is there
    model = _model(name, how)
    before = floor(path)
    touch_memory(path.stat().st_size * 5 // 4)
    figures = timed(lambda: call(model, path))
    same_values(model, build(name))
    return {**figures, "bytes": path.stat().st_size, "floor": min(before, floor(path))}


def _model(name: str, how: str) -> nn.Module:
    return build(name, "meta") if how == _META else blank(name)


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    made = []
    for case, figures in taken.items():
        name, how, folder = case
        baseline = next(base for base, (container, _) in HOW.items() if container == HOW[how][0])
        made.append(
            summary(
                figures,
                suite="load",
                model=name,
                bytes=int(figures[0]["bytes"]),
                how=how,
                gb_per_s=figures[0]["bytes"] / medians[case] / 1e9,
                floor_s=statistics.median(one["floor"] for one in figures),
                share_of_floor=statistics.median(one["floor"] / one["seconds"] for one in figures),
                baseline=baseline,
                speedup=medians[name, baseline, folder] / medians[case],
            )
        )
    return made


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| model | how | ms | GB/s | share of the read floor | against the baseline of its container |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row["how"] != "floor":
            mark = " (noisy)" if row["noisy"] else ""
            lines.append(
                f"| {row['model']} | {row['how']}{mark} | {row['median_s'] * 1e3:.1f} | {row['gb_per_s']:.3g} "
                f"| {row['share_of_floor']:.2f} "
                f"| {row['speedup']:.2f}x |"
            )
    return lines
