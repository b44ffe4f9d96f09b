"""The most memory that a load takes beyond the model that it fills."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, peak_of, summary, timed
from benchmarks.models import build, same_values, write_files
from benchmarks.suites.load import HOW, _model

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
    return [(name, how, str(folder)) for how in _HOW]


def one(name: str, how: str, folder: str) -> Figures:
    container, call = HOW[how]
    call(_model("tiny", how), Path(folder, f"tiny.{container}"))
    path, model = Path(folder, f"{name}.{container}"), _model(name, how)
    made = sum(t.nbytes for t in model.state_dict().values() if t.is_meta)  # the model itself is no extra
    figures: Figures = {}
    before, peak = peak_of(lambda: figures.update(timed(lambda: call(model, path))))
    same_values(model, build(name))
    return {**figures, "extra": max(0, peak - before - made), "bytes": path.stat().st_size}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    return [
        summary(
            figures,
            suite="memory",
            model=name,
            how=how,
            bytes=int(figures[0]["bytes"]),
            extra_bytes=int(statistics.median(one["extra"] for one in figures)),
        )
        for (name, how, _), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    size = f"{rows[0]['model']}, a file of {rows[0]['bytes'] >> 20} MiB"
    lines = [f"| memory beyond the model ({size}) | MiB at the peak |", "| --- | ---: |"]
    return lines + [f"| {row['how']} | {row['extra_bytes'] / (1 << 20):.0f} |" for row in rows]
