"""The results of a matrix as data, as lines for a terminal, and written to a file; needs neither torch nor pytest."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

from qat_compat.errors import SaveError
from qat_compat.matrix.cases import AXES

__all__ = ["OUTCOMES", "brief", "results", "summary", "write_report"]

Row = Mapping[str, Any]
Results = dict[str, Any]

# outcome -> symbol, what it means
OUTCOMES = {
    "passed": ("✓", "asserted, bit for bit where the direction says so"),
    "failed": ("✗", "a defect: the result is not what it should be"),
    "not supported": ("○", "refused by this package, with an error that says so"),
    "not applicable": ("\N{EN DASH}", "refused by the framework itself, or nothing in the model for it"),
}
_PACKAGES = (
    *("torch", "torchao", "transformers", "safetensors", "lightning", "nvidia-modelopt", "brevitas", "nncf"),
    "qat-compat",
)
# What the containers of the matrix call their files, so that one reason is not told apart by them.
_FILES = re.compile(r"<mapping>|\bstate\.\w+|\blast\.ckpt\b|\bmodel\.safetensors\.index\.json\b")


def results(rows: Sequence[Row], designs: Sequence[Mapping[str, Any]], size: str) -> Results:
    """Everything that a report says, ready for JSON.

    Args:
        rows: One per cell that was run: its axes, `outcome`, `reason` and `seconds`.
        designs: One per test file: its axes and cells.
        size: The size of the matrix.
    """
    axes: dict[str, list[str]] = {}
    frameworks: dict[str, str] = {}
    absent: dict[str, str] = {}
    directions: dict[str, tuple[str, str]] = {}
    for design in designs:
        frameworks |= design["frameworks"]
        absent |= design["absent"]
        directions |= design["directions"]
        for axis in AXES:
            axes[axis] = list(dict.fromkeys([*axes.get(axis, []), *design["axes"][axis]]))
    order = [{value: index for index, value in enumerate(axes.get(axis, []))} for axis in AXES]
    ordered = sorted(rows, key=lambda row: [place.get(row[axis], -1) for axis, place in zip(AXES, order, strict=True)])
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": _versions(),
        "size": size,
        "covers": designs[0]["covers"] if designs else "",
        "axes": axes,
        "frameworks": frameworks,
        "directions": directions,
        "absent": absent,
        "combinations": sum(design["combinations"] for design in designs),
        "planned": sum(len(design["cells"]) for design in designs),
        "impossible": sum(design["impossible"] for design in designs),
        "counts": {kind: sum(row["outcome"] == kind for row in rows) for kind in OUTCOMES},
        "pairs": _pairs(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "cells": ordered,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _pairs(rows: Sequence[Row]) -> dict[str, int]:
    """Pairs of values of two axes that were met in some cell, and in one that passed."""
    met: set[tuple[tuple[str, str], ...]] = set()
    passed: set[tuple[tuple[str, str], ...]] = set()
    for row in rows:
        found = set(combinations([(axis, row[axis]) for axis in AXES], 2))
        met |= found
        passed |= found if row["outcome"] == "passed" else set()
    return {"run": len(met), "passed": len(passed)}


def summary(found: Results) -> Iterator[str]:
    """Lines for a terminal."""
    ran = len(found["cells"])
    of = "" if ran == found["planned"] else f" of {found['planned']:,}"
    yield (
        f"{found['size']}: {ran:,}{of} cells for {found['combinations']:,} combinations ({found['covers']}); "
        f"{found['pairs']['passed']:,} of {found['pairs']['run']:,} pairs of values are in a cell that passed"
    )
    yield ", ".join(f"{count:,} {kind}" for kind, count in found["counts"].items() if count)
    for kind in list(OUTCOMES)[1:]:
        reasons = Counter(brief(row["reason"]) for row in found["cells"] if row["outcome"] == kind)
        for reason, count in reasons.most_common(8):
            yield f"  {count:>4} {kind}: {reason[:150]}"
        if len(reasons) > 8:
            yield f"       {kind}: {len(reasons) - 8} more reasons"


def brief(reason: str) -> str:
    """The reason in one line: of an error with a list of problems, the first of them."""
    lines = [_FILES.sub("the file", " ".join(line.split())) for line in reason.splitlines()]
    lines = [line for line in lines if line and not line.startswith("file:")]
    if not lines:
        return ""
    if lines[0].endswith(("problem", "problems", "differs", "differ")) and len(lines) > 1:
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        return lines[1] + more
    return lines[0]


def _as_json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def write_report(found: Results, path: Path) -> Path:
    """Write the results in the form that the name of the file asks for.

    Raises:
        SaveError: The file cannot be written.
    """
    from qat_compat.matrix.markdown import as_markdown
    from qat_compat.matrix.page import as_page

    render = {".md": as_markdown, ".html": as_page, ".json": _as_json}[path.suffix]
    text = render(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(
            "the report cannot be written", file=path, found=error.strerror, remedy="choose another path"
        ) from error
    return path
