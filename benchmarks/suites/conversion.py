"""A training checkpoint to a float one, file to file: seconds until it is on the disk, and memory on the way."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import qat_compat as qc
from benchmarks.harness import Figures, peak_of, summary, timed
from benchmarks.models import build

__all__ = ["one", "prepare", "rows", "table"]


def _torch(source: Path, target: Path) -> None:
    save_file(torch.load(source, weights_only=True), target)
    with target.open("rb") as file:  # as save_checkpoint does
        os.fsync(file.fileno())


# the first is the baseline
_HOW: dict[str, Callable[[Path, Path], object]] = {
    "torch.load + save_file": _torch,
    "qat_compat": lambda source, target: qc.save_checkpoint(qc.to_float(source), target),
}


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    name = "tiny" if tiny else "llama-4-layers-bf16"
    for each in {"tiny", name}:
        torch.save(dict(build(each).state_dict()), folder / f"{each}.pt")
    return [(name, how, str(folder)) for how in _HOW]


def one(name: str, how: str, folder: str) -> Figures:
    target = Path(folder, "converted.safetensors")
    _HOW[how](Path(folder, "tiny.pt"), target)  # what is imported late is there
    source = Path(folder, f"{name}.pt")
    source.read_bytes()  # warms the page cache
    figures: Figures = {}
    before, peak = peak_of(lambda: figures.update(timed(lambda: _HOW[how](source, target))))
    written = load_file(target)
    if not all(torch.equal(written[key], value) for key, value in build(name).state_dict().items()):
        raise RuntimeError("what was written is not what was read")
    target.unlink()
    return {**figures, "extra": max(0, peak - before), "bytes": source.stat().st_size}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    baseline = next(iter(_HOW))
    return [
        summary(
            figures,
            suite="conversion",
            model=name,
            how=how,
            bytes=int(figures[0]["bytes"]),
            extra_bytes=int(statistics.median(one["extra"] for one in figures)),
            baseline=baseline,
            speedup=medians[name, baseline, folder] / medians[name, how, folder],
        )
        for (name, how, folder), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    size = f"{rows[0]['model']}, {rows[0]['bytes'] >> 20} MiB"
    lines = [
        f"| to float, file to file ({size}) | ms, on the disk | MiB of memory | against the baseline |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        mark = " (noisy)" if row["noisy"] else ""
        lines.append(
            f"| {row['how']}{mark} | {row['median_s'] * 1e3:.0f} | {row['extra_bytes'] / (1 << 20):.0f} "
            f"| {row['speedup']:.2f}x |"
        )
    return lines
