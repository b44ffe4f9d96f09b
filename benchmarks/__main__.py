"""`python -m benchmarks`: run the suite, write JSON, print a table.

Every figure comes from several fresh processes, interleaved so that a slow moment of the machine hits every
candidate; a table shows medians with their range, and each one's ratio to the baseline of the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import qat_compat
from benchmarks import cases

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    import numpy
    import safetensors

    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "device": "cpu",
        "processor": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "qat_compat": qat_compat.__version__,
        "commit": _commit(),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _fresh(*arguments: str) -> float:
    """One figure, taken in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def _one(kind: str, *rest: str) -> float:
    torch.set_num_threads(os.cpu_count() or 1)
    if kind == "floor":
        return cases.floor(Path(rest[0]))
    if kind == "load":
        name, how, folder = rest
        return cases.load(name, how, {s: Path(folder) / f"{name}.{s}" for s in ("safetensors", "pt")})
    if kind == "ranges":
        return cases.ranges(rest[0], int(rest[1]))
    return cases.plan(int(rest[0]))


def _summary(seconds: list[float], **more: Any) -> dict[str, Any]:
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "runs": len(seconds),
        "noisy": max(seconds) > 1.5 * min(seconds),
        **more,
    }


def run_loads(models: list[str], runs: int) -> list[dict[str, Any]]:
    rows = []
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            paths = cases.write_files(name, Path(folder))
            size = paths["safetensors"].stat().st_size
            taken: dict[str, list[float]] = {"floor": [], **{how: [] for how in cases.LOADS}}
            for _ in range(runs):
                taken["floor"].append(_fresh("floor", str(paths["safetensors"])))
                for how in cases.LOADS:
                    taken[how].append(_fresh("load", name, how, folder))
        medians = {how: statistics.median(values) for how, values in taken.items()}
        for how, values in taken.items():
            container = cases.LOADS[how][0] if how in cases.LOADS else "safetensors"
            baseline = next(base for base, (kind, _) in cases.LOADS.items() if kind == container)
            rows.append(
                _summary(
                    values,
                    suite="load",
                    model=name,
                    bytes=size,
                    how=how,
                    gb_per_s=size / medians[how] / 1e9,
                    share_of_floor=medians["floor"] / medians[how],
                    baseline=baseline,
                    speedup=medians[baseline] / medians[how],
                )
            )
    return rows


def run_ranges(width: int, runs: int) -> list[dict[str, Any]]:
    taken: dict[str, list[float]] = {name: [] for name in cases.RANGES}
    for _ in range(runs):
        for name in cases.RANGES:
            taken[name].append(_fresh("ranges", name, str(width)))
    rows = []
    for name, values in taken.items():
        dtype = name.rsplit(" ", 1)[1]
        native = statistics.median(taken[f"native observer {dtype}"])
        rows.append(
            _summary(
                values,
                suite="ranges",
                how=name,
                width=width,
                baseline=f"native observer {dtype}",
                speedup=native / statistics.median(values),
            )
        )
    return rows


def run_plans(counts: list[int], runs: int) -> list[dict[str, Any]]:
    taken: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(runs):
        for count in counts:
            taken[count].append(_fresh("plan", str(count)))
    medians = {count: statistics.median(values) for count, values in taken.items()}
    logs = [(math.log(count), math.log(seconds)) for count, seconds in medians.items()]
    mean_x = statistics.fmean(x for x, _ in logs)
    mean_y = statistics.fmean(y for _, y in logs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return [
        _summary(values, suite="planning", keys=count, us_per_key=medians[count] / count * 1e6, fitted_exponent=slope)
        for count, values in taken.items()
    ]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    about = results["machine"]
    lines = [
        f"{about['processor']}, {about['cores']} cores, torch {about['torch']}, warm page cache;"
        " medians of fresh processes.",
        "",
        "| model | how | ms | GB/s | share of the read floor | against the baseline of its container |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        if row["suite"] == "load" and row["how"] != "floor":
            mark = " (noisy)" if row["noisy"] else ""
            lines.append(
                f"| {row['model']} | {row['how']}{mark} | {row['median_s'] * 1e3:.1f} | {row['gb_per_s']:.3g} "
                f"| {row['share_of_floor']:.2f} "
                f"| {row['speedup']:.2f}x |"
            )
    lines += ["", "| ranges of weights, per channel | ms | against the native observer |", "| --- | ---: | ---: |"]
    for row in results["rows"]:
        if row["suite"] == "ranges":
            lines.append(f"| {row['how']} | {row['median_s'] * 1e3:.1f} | {row['speedup']:.2f}x |")
    plans = [row for row in results["rows"] if row["suite"] == "planning"]
    if plans:
        lines += ["", "| keys | ms to plan | us per key |", "| ---: | ---: | ---: |"]
        lines += [f"| {r['keys']:,} | {r['median_s'] * 1e3:.1f} | {r['us_per_key']:.1f} |" for r in plans]
        lines += ["", f"Fitted growth of planning: keys^{plans[0]['fitted_exponent']:.2f}."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where the models are; only cpu so far")
    parser.add_argument("--only", choices=["load", "ranges", "planning"], help="one suite alone")
    parser.add_argument("--runs", type=int, default=5, help="fresh processes per figure (default 5)")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: to see that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="where the JSON goes")
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(_one(*options.one))
        return 0
    models = ["tiny"] if options.tiny else ["llama-4-layers-bf16", "llama-4-layers-fp32", "resnet152-like", "flat-5k"]
    rows: list[dict[str, Any]] = []
    if options.only in (None, "load"):
        rows += run_loads(models, options.runs)
    if options.only in (None, "ranges"):
        rows += run_ranges(64 if options.tiny else 2048, options.runs)
    if options.only in (None, "planning"):
        rows += run_plans([200, 400] if options.tiny else list(cases.PLANS), options.runs)
    results = {"machine": machine(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
