"""The results of a matrix as a page that needs nothing but itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape
from itertools import groupby
from typing import Any

from qat_compat.matrix.cases import AXES
from qat_compat.matrix.overview import Field, Note, Overview, by_value, overview
from qat_compat.matrix.page_style import STYLE
from qat_compat.matrix.report import OUTCOMES

__all__ = ["as_page"]

_AXES = AXES[2:]  # the first two have a table of their own
_SHOWN = 3


def as_page(found: Mapping[str, Any]) -> str:
    """HTML with its style sheet inside, for light and dark screens."""
    seen = overview(found)
    versions = " &middot; ".join(f"{escape(name)} {escape(number)}" for name, number in found["versions"].items())
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>QAT compatibility matrix</title>\n<style>{STYLE}</style>\n<main>\n<header>\n"
        f'<p class="above">qat_compat &middot; {escape(found["made"])}</p>\n<h1>Compatibility matrix</h1>\n'
        f'<p class="below">{_size(found)}</p>\n<p class="below">{versions}</p>\n</header>\n'
        f"{_counts(found)}{_grid(found, seen)}{_axes(found)}{_directions(found)}{_notes(seen)}{_absent(found)}"
        "</main>\n</html>\n"
    )


def _size(found: Mapping[str, Any]) -> str:
    pairs = found["pairs"]
    return (
        f"{len(found['cells']):,} cells of the {escape(found['size'])} matrix stand for {found['combinations']:,} "
        f"combinations: {escape(found['covers'])}. {pairs['run']:,} pairs of values of two axes are in some cell, "
        f"{pairs['passed']:,} of them in one that passed; {found['impossible']:,} of those wanted cannot occur."
    )


def _name(kind: str) -> str:
    """The outcome as a class of the style sheet."""
    return kind.replace(" ", "-")


def _counts(found: Mapping[str, Any]) -> str:
    counts = found["counts"]
    bars = "".join(f'<i class="{_name(kind)}" style="flex-grow:{n}"></i>' for kind, n in counts.items() if n)
    tiles = "".join(
        f'<div class="{_name(kind)}"><dt>{symbol} {kind}</dt><dd><b>{counts[kind]:,}</b>{meaning}</dd></div>\n'
        for kind, (symbol, meaning) in OUTCOMES.items()
    )
    # the bar shows what the numbers below it say, so that a screen reader passes it over
    return f'<div class="bar" aria-hidden="true">{bars}</div>\n<dl class="counts">\n{tiles}</dl>\n'


def _grid(found: Mapping[str, Any], seen: Overview) -> str:
    frameworks = found["frameworks"]
    groups = [(title, list(flows)) for title, flows in groupby(seen.flows, key=lambda flow: frameworks[flow])]
    first = {flows[0] for _, flows in groups}
    head = "".join(
        f'<th scope="colgroup" class="first" colspan="{len(flows)}">{escape(title)}</th>' for title, flows in groups
    )
    names = "".join(f'<th scope="col"{_edge(flow, first)}>{escape(_short(flow))}</th>' for flow in seen.flows)
    notes = {note.number: note for note in seen.notes}
    rows = ""
    for model in seen.models:
        fields = (
            f"<td{_edge(flow, first)}>{_field(seen.fields.get((model, flow)), notes)}</td>" for flow in seen.flows
        )
        rows += f'<tr><th scope="row">{escape(model)}</th>{"".join(fields)}</tr>\n'
    return (
        '<h2 id="grid">Models and flows</h2>\n<div class="card"><table class="grid" aria-labelledby="grid">\n<thead>'
        f"<tr><th></th>{head}</tr>\n<tr><th></th>{names}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _edge(flow: str, first: set[str]) -> str:
    return ' class="first"' if flow in first else ""


def _short(flow: str) -> str:
    """The name within its framework: `x86` of `eager-x86`."""
    return flow.partition("-")[2] or flow


def _field(entry: Field | None, notes: Mapping[int, Note]) -> str:
    if entry is None:
        return ""
    reasons = "\n".join(f"{notes[number].kind}: {notes[number].text}" for number in entry.notes)
    title = "\n".join([", ".join(f"{count} {kind}" for kind, count in entry.counts.items()), reasons]).strip()
    inner = f'<span class="{_name(entry.kind)}" title="{escape(title)}">{escape(entry.text)}</span>'
    return f'<a href="#n{entry.notes[0]}">{inner}</a>' if entry.notes else inner


def _axes(found: Mapping[str, Any]) -> str:
    sections = ""
    for axis in _AXES:
        rows = "".join(_value(value, counts) for value, counts in by_value(found, axis).items())
        sections += f"<section><h3>{axis}</h3>\n{rows}</section>\n"
    return f'<h2>By axis: cells that passed, of those that were run</h2>\n<div class="axes">\n{sections}</div>\n'


def _value(value: str, counts: Counter[str]) -> str:
    bars = "".join(
        f'<i class="{_name(kind)}" style="flex-grow:{counts[kind]}"></i>' for kind in OUTCOMES if counts[kind]
    )
    return (
        f'<div><span>{escape(value)}</span><span class="mini" aria-hidden="true">{bars}</span>'
        f'<span class="n">{counts["passed"]}/{counts.total()}</span></div>\n'
    )


def _directions(found: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(name)}: {escape(title)}</dt><dd>{escape(means)}</dd>\n"
        for name, (title, means) in found["directions"].items()
        if name in by_value(found, "direction")
    )
    return f'<h2>What each direction asserts</h2>\n<dl class="facts">\n{rows}</dl>\n'


def _notes(seen: Overview) -> str:
    items = "".join(
        f'<li id="n{note.number}" class="{_name(note.kind)}"><b>{OUTCOMES[note.kind][0]} {note.kind}</b> '
        f"{escape(note.text)}{_cells(note)}</li>\n"
        for note in seen.notes
    )
    return f'<h2>Reasons</h2>\n<ul class="notes">\n{items}</ul>\n' if items else ""


def _cells(note: Note) -> str:
    if len(note.cells) <= _SHOWN:
        return "".join(f"<br><small><code>{escape(cell)}</code></small>" for cell in note.cells)
    inside = "".join(f"<code>{escape(cell)}</code>" for cell in note.cells)
    return f"<details><summary>{len(note.cells)} cells</summary>{inside}</details>"


def _absent(found: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(value)}</dt><dd>{escape(why)}</dd>\n" for value, why in found["absent"].items())
    return f'<h2>Not here</h2>\n<dl class="facts">\n{rows}</dl>\n' if rows else ""
