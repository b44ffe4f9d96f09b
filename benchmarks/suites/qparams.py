"""A file into a QAT model with a scale per channel: reading and ranges together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import qat_compat as qc
from benchmarks.harness import Figures, floor, summary, timed, touch_memory
from benchmarks.suites.ranges import native_scales, prepared

__all__ = ["one", "prepare", "rows", "table"]

_DTYPES = ("float32", "bfloat16")


def _safe_open(model: nn.Module, path: Path) -> object:
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, layer in model.named_children():
            layer.weight.copy_(file.get_tensor(f"{name}.weight"))  # type: ignore[operator,union-attr]
    return native_scales(model)


# the first is the baseline
_HOW: dict[str, Callable[[nn.Module, Path], object]] = {
    "safe_open + native observers": _safe_open,
    "qat_compat": lambda m, p: qc.load_checkpoint(m, p, progress=False),
    "qat_compat inplace": lambda m, p: qc.load_checkpoint(m, p, inplace=True, progress=False),
}


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    width = 64 if tiny else 2048
    for dtype in _DTYPES:
        save_file(dict(_layers(width, dtype).state_dict()), folder / f"weights.{dtype}.safetensors")
    return [(how, dtype, str(width), str(folder)) for dtype in _DTYPES for how in _HOW]


def _layers(width: int, dtype: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, 4 * width, bias=False) for _ in range(8)]
    return nn.Sequential(*layers).to(getattr(torch, dtype))


def one(how: str, dtype: str, width: str, folder: str) -> Figures:
    path = Path(folder, f"weights.{dtype}.safetensors")

    def model() -> nn.Module:
        return prepared(list(_layers(int(width), dtype)), getattr(torch, dtype))

    expected = native_scales(model())
    _HOW[how](model(), path)  # what is imported late is there
    target = model()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    touch_memory(path.stat().st_size * 5 // 4)
    figures = timed(lambda: _HOW[how](target, path))
    found = native_scales(target) if "native" in how else [layer.weight_fake_quant.scale for layer in target.children()]
    if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise RuntimeError("scales differ from the native observer's")
    return {**figures, "bytes": path.stat().st_size, "floor": floor(path)}


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    baseline = next(iter(_HOW))
    return [
        summary(
            figures,
            suite="load+ranges",
            how=how,
            dtype=dtype,
            bytes=int(figures[0]["bytes"]),
            share_of_floor=statistics.median(one["floor"] / one["seconds"] for one in figures),
            baseline=baseline,
            speedup=medians[baseline, dtype, width, folder] / medians[how, dtype, width, folder],
        )
        for (how, dtype, width, folder), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| load, and ranges per channel | dtype | ms | against safe_open and the native observers |",
        "| --- | --- | ---: | ---: |",
    ]
    for row in rows:
        mark = " (noisy)" if row["noisy"] else ""
        lines.append(f"| {row['how']}{mark} | {row['dtype']} | {row['median_s'] * 1e3:.1f} | {row['speedup']:.2f}x |")
    return lines
