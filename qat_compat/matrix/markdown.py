"""The results of a matrix as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qat_compat.matrix.cases import AXES
from qat_compat.matrix.overview import by_value, overview
from qat_compat.matrix.report import OUTCOMES

__all__ = ["as_markdown"]

_AXES = AXES[2:]  # the first two have a table of their own


def as_markdown(found: Mapping[str, Any]) -> str:
    """A page that GitHub renders: the table, the numbers per axis, the reasons as footnotes."""
    seen = overview(found)
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    counts = ", ".join(f"{OUTCOMES[kind][0]} {count:,} {kind}" for kind, count in found["counts"].items() if count)
    rows = [["", *(flow.replace("-", "<br>", 1) for flow in seen.flows)]]
    for model in seen.models:
        entries = [seen.fields.get((model, flow)) for flow in seen.flows]
        rows.append([model, *("" if e is None else e.text + _marks(e.notes) for e in entries)])
    parts = [
        "# Compatibility matrix",
        f"{counts}. Made {found['made']} with {versions}.",
        _size(found),
        _table(rows),
        "\n".join(f"- {symbol} {kind}: {meaning}" for kind, (symbol, meaning) in OUTCOMES.items()),
        "## What each direction asserts",
        _directions(found),
        "## By axis",
        *(_axis(found, axis) for axis in _AXES),
        *(["## Not here", _absent(found)] if found["absent"] else []),
        *(["## Reasons"] if seen.notes else []),
        "\n".join(f"[^{n.number}]: {n.kind}: {_escaped(n.text)} ({len(n.cells)}: `{n.cells[0]}`)" for n in seen.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _size(found: Mapping[str, Any]) -> str:
    pairs = found["pairs"]
    return (
        f"The {found['size']} matrix: {len(found['cells']):,} cells stand for {found['combinations']:,} combinations: "
        f"{found['covers']}. "
        f"{pairs['run']:,} pairs of values of two axes are in some cell, {pairs['passed']:,} of them in one "
        f"that passed; {found['impossible']:,} of those wanted cannot occur."
    )


def _axis(found: Mapping[str, Any], axis: str) -> str:
    kinds = list(OUTCOMES)
    rows = [[axis, *(f"{symbol} {kind}" for kind, (symbol, _) in OUTCOMES.items())]]
    rows += [[v, *(str(count[kind] or "") for kind in kinds)] for v, count in by_value(found, axis).items()]
    return _table(rows)


def _directions(found: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}, {title}: {means}" for name, (title, means) in found["directions"].items())


def _absent(found: Mapping[str, Any]) -> str:
    return "\n".join(f"- {value}: {why}" for value, why in found["absent"].items())


def _marks(numbers: Sequence[int]) -> str:
    return "".join(f"[^{number}]" for number in numbers)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, [":--", *(":-:" for _ in head[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
