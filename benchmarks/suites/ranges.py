"""Ranges and scales of weights that are in memory, against the native per-channel observer."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Figures, device, summary, timed
from qat_compat.driving import observe_weights
from qat_compat.frameworks import Needs, Quantizer, describe_model

__all__ = ["native_scales", "one", "prepare", "prepared", "rows", "scales", "table"]

_DTYPES = ("float32", "bfloat16")


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    width = "64" if tiny else "2048"
    return [(f"{label} {dtype}", width) for dtype in _DTYPES for label in ("native observer", "qat_compat")]


def one(how: str, width: str) -> Figures:
    dtype = getattr(torch, how.rsplit(" ", 1)[1])
    torch.manual_seed(0)
    model = prepared([nn.Linear(int(width), 4 * int(width), bias=False) for _ in range(4)], dtype)
    chosen = [q for q in describe_model(model).quantizers if q.needs is Needs.WEIGHTS]
    expected = native_scales(model)
    observe_weights(chosen)  # what is imported late is there
    figures = timed(lambda: observe_weights(chosen) if how.startswith("qat_compat") else native_scales(model))
    if not all(torch.equal(a, b) for a, b in zip(scales(chosen), expected, strict=True)):
        raise RuntimeError("scales differ from the native observer's")
    return figures


def prepared(layers: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module:
    """Layers whose weights have a scale per output channel; activations are left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver, QConfig, prepare_qat

        weight = FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )
        model = nn.Sequential(*layers).to(dtype)
        model.qconfig = QConfig(activation=nn.Identity, weight=weight)  # type: ignore[assignment]
        return prepare_qat(model.train()).to(device())  # type: ignore[no-any-return]


def scales(quantizers: Sequence[Quantizer]) -> list[Tensor]:
    return [quantizer.module.scale for quantizer in quantizers]  # type: ignore[misc]


def native_scales(model: nn.Module) -> list[Tensor]:
    """What the model's own observers make of its weights."""
    found = []
    with torch.no_grad():
        for layer in model.children():
            observer: Any = layer.weight_fake_quant.activation_post_process  # type: ignore[union-attr]
            observer.reset_min_max_vals()
            observer(layer.weight)
            found.append(observer.calculate_qparams()[0])
    return found


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    made = []
    for case, figures in taken.items():
        how, width = case
        baseline = f"native observer {how.rsplit(' ', 1)[1]}"
        speedup = medians[baseline, width] / medians[case]
        made.append(summary(figures, suite="ranges", how=how, width=int(width), baseline=baseline, speedup=speedup))
    return made


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| ranges of weights, per channel | ms | against the native observer |", "| --- | ---: | ---: |"]
    return lines + [f"| {row['how']} | {row['median_s'] * 1e3:.1f} | {row['speedup']:.2f}x |" for row in rows]
