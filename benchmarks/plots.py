"""`python -m benchmarks.plots`: draw the committed results, for the README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.__main__ import RESULTS

__all__ = ["growth", "main", "throughput"]

_FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
_OURS, _OTHERS, _FLOOR = "#1f6feb", "#8b949e", "#d1242f"
Row = Mapping[str, Any]


def throughput(rows: Sequence[Row], model: str) -> Figure:
    """How fast each way fills a model, against the line that nothing that copies can pass."""
    chosen = [row for row in rows if row["suite"] == "load" and row["model"] == model]
    figure = Figure(figsize=(8, 0.6 + 0.34 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    names = [row["how"] for row in chosen]
    speeds = [row["gb_per_s"] for row in chosen]
    # from the fastest to the slowest run
    around = [
        [speed - row["bytes"] / row["max_s"] / 1e9 for row, speed in zip(chosen, speeds, strict=True)],
        [row["bytes"] / row["min_s"] / 1e9 - speed for row, speed in zip(chosen, speeds, strict=True)],
    ]
    colors = [_OURS if name.startswith("qat_compat") else _OTHERS for name in names]
    axes.barh(names, speeds, xerr=around, color=colors, ecolor="#24292f", error_kw={"linewidth": 0.8, "capsize": 2})
    floor = max(row["bytes"] / row["floor_s"] / 1e9 for row in chosen)
    axes.axvline(floor, color=_FLOOR, linestyle="--", linewidth=1)
    axes.annotate("read floor ", (floor, -0.6), color=_FLOOR, ha="right", va="bottom", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"GB/s into {model}: median, and range of {chosen[0]['runs']} fresh processes")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def growth(rows: Sequence[Row]) -> Figure:
    """How the time to plan grows with the number of keys."""
    chosen = sorted((row for row in rows if row["suite"] == "planning"), key=lambda row: row["keys"])
    keys, seconds = [row["keys"] for row in chosen], [row["median_s"] for row in chosen]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.loglog(keys, seconds, "o-", color=_OURS, label=f"measured: keys^{chosen[0]['fitted_exponent']:.2f}")
    axes.loglog(keys, [seconds[0] * count / keys[0] for count in keys], ":", color=_OTHERS, label="linear")
    axes.set_xlabel("keys")
    axes.set_ylabel("seconds to plan")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(results: Path = RESULTS / "cpu.json", folder: Path = _FOLDER) -> list[Path]:
    """Draw one throughput for each model with more than a handful of ways, and the growth of planning."""
    rows = json.loads(results.read_text())["rows"]
    device = json.loads(results.read_text())["machine"]["device"]
    counts: dict[str, int] = {}
    for row in rows:
        if row["suite"] == "load":
            counts[row["model"]] = counts.get(row["model"], 0) + 1
    figures = {f"{device}-{model}": throughput(rows, model) for model, count in counts.items() if count > 4}
    figures[f"{device}-planning"] = growth(rows)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context({"svg.hashsalt": "qat_compat", "font.size": 9}):
        for name, figure in figures.items():
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None})
    return written


if __name__ == "__main__":
    print(*main(), sep="\n")
