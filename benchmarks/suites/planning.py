"""How the time to plan a load grows with the number of keys."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import qat_compat as qc
from benchmarks.harness import Figures, summary, timed

__all__ = ["one", "prepare", "rows", "table"]


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    return [(str(count),) for count in ((200, 400) if tiny else (1_000, 10_000, 100_000))]


def one(count: str) -> Figures:
    """Plan a load of one-tensor modules under a wrapper prefix."""
    model = nn.ModuleList([nn.PReLU(4) for _ in range(int(count))])
    source = {f"module.{key}": value for key, value in model.state_dict().items()}
    qc.plan_load(nn.PReLU(4), {"module.weight": source["module.0.weight"]})  # what is imported late is there
    plans: list[qc.Plan] = []
    figures = timed(lambda: plans.append(qc.plan_load(model, source)))
    if not plans[0].ok or plans[0].copied != int(count):
        raise RuntimeError("the plan is not complete")
    return figures


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {int(count): statistics.median(f["seconds"] for f in figures) for (count,), figures in taken.items()}
    slope = statistics.linear_regression([math.log(n) for n in medians], [math.log(s) for s in medians.values()]).slope
    return [
        summary(
            figures,
            suite="planning",
            keys=int(count),
            us_per_key=medians[int(count)] / int(count) * 1e6,
            fitted_exponent=slope,
        )
        for (count,), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| keys | ms to plan | us per key |", "| ---: | ---: | ---: |"]
    lines += [f"| {r['keys']:,} | {r['median_s'] * 1e3:.1f} | {r['us_per_key']:.1f} |" for r in rows]
    return [*lines, "", f"Fitted growth of planning: keys^{rows[0]['fitted_exponent']:.2f}."]
