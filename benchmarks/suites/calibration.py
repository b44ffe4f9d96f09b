"""Driving data through a QAT-prepared model: samples per second against the bare forward and the native observers."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat_compat as qc
from benchmarks.harness import Figures, device, summary, timed

__all__ = ["one", "prepare", "rows", "table"]

_BATCH = 8


def _float(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    widths = [3, *[32] * blocks]
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers).to(device()).eval()


def _prepared(blocks: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import QuantStub, get_default_qat_qconfig, prepare_qat

        model = nn.Sequential(QuantStub(), *_float(blocks)).train()
        model.qconfig = get_default_qat_qconfig("x86")  # type: ignore[assignment]
        return prepare_qat(model)  # type: ignore[no-any-return]


def _native(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Observers on, fake-quant off, as one would do it by hand."""
    from torch.ao.quantization import disable_fake_quant, enable_observer

    model.apply(enable_observer).apply(disable_fake_quant).eval()
    _forward(model, batches)


def _forward(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


# name -> (model, how); the first is the baseline
_HOW: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module, Sequence[Tensor]], object]]] = {
    "float forward": (_float, _forward),
    "native observers": (_prepared, _native),
    "qat_compat.calibrate": (_prepared, lambda model, batches: qc.calibrate(model, batches)),
}


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    blocks, batches, size = ("2", "2", "8") if tiny else ("8", "16", "64")
    return [(how, blocks, batches, size) for how in _HOW]


def one(how: str, blocks: str, batches: str, size: str) -> Figures:
    make, run = _HOW[how]
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(_BATCH, 3, int(size), int(size), generator=generator).to(device()) for _ in range(int(batches))]
    run(make(int(blocks)), data[:1])  # what is imported late is there
    model = make(int(blocks))
    return {**timed(lambda: run(model, data)), "samples": float(_BATCH * len(data))}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    baseline = next(iter(_HOW))
    return [
        summary(
            figures,
            suite="calibration",
            how=case[0],
            samples=int(figures[0]["samples"]),
            samples_per_s=figures[0]["samples"] / medians[case],
            baseline=baseline,
            speedup=medians[baseline, *case[1:]] / medians[case],
        )
        for case, figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"| {rows[0]['samples']} images through eight convolutions | images per second | against the bare forward |",
        "| --- | ---: | ---: |",
    ]
    for row in rows:
        mark = " (noisy)" if row["noisy"] else ""
        lines.append(f"| {row['how']}{mark} | {row['samples_per_s']:.0f} | {row['speedup']:.2f}x |")
    return lines
