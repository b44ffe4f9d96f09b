"""Ranges and scales of weights that are in memory, against the quantizers' own way to them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Figures, pass_over, summary, timed
from benchmarks.quantized import GRANULARITIES, by_granularity
from qat_compat.driving import observe_weights
from qat_compat.frameworks import Needs, describe_model

__all__ = ["one", "prepare", "rows", "table"]

_HOW = ("native", "qat_compat")  # the first is the baseline
_DTYPES: Mapping[str, Sequence[str]] = {
    "per channel": ("float32", "bfloat16", "float16"),
    "per channel, axis 1": ("float32",),
    "per tensor": ("float32", "bfloat16"),
    "per group of 32": ("float32", "bfloat16"),
}


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    width = "64" if tiny else "2048"
    return [(kind, dtype, how, width) for kind, dtypes in _DTYPES.items() for dtype in dtypes for how in _HOW]


def one(kind: str, dtype: str, how: str, width: str) -> Figures:
    granularity = GRANULARITIES[kind]
    model = granularity.prepared(4, int(width), getattr(torch, dtype))
    chosen = [q for q in describe_model(model).quantizers if q.needs is Needs.WEIGHTS]
    expected = granularity.native_scales(model)
    observe_weights(chosen)  # what is imported late is there
    figures = timed(lambda: granularity.native_scales(model) if how == "native" else observe_weights(chosen))
    if not all(torch.equal(a, b) for a, b in zip(granularity.scales(model), expected, strict=True)):
        raise RuntimeError("scales differ from those of the framework itself")
    weights = list(model.parameters())
    return {**figures, "bytes": sum(weight.nbytes for weight in weights), "floor": pass_over(weights)}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    return [
        summary(
            figures,
            suite="ranges",
            granularity=kind,
            dtype=dtype,
            how=how,
            width=int(width),
            gb_per_s=figures[0]["bytes"] / medians[kind, dtype, how, width] / 1e9,
            share_of_floor=statistics.median(one["floor"] / one["seconds"] for one in figures),
            baseline=_HOW[0],
            speedup=medians[kind, dtype, _HOW[0], width] / medians[kind, dtype, how, width],
        )
        for (kind, dtype, how, width), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return by_granularity("ranges of weights in memory", "against the quantizer's own way", rows)
