"""What a reader of a matrix sees first: one field per model and flow, and numbered reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qat_compat.matrix.cases import AXES
from qat_compat.matrix.report import OUTCOMES, brief

__all__ = ["Field", "Note", "Overview", "by_value", "overview"]

# Worst first: the symbol of a field is that of the first that is in it.
_ORDER = ("failed", "passed", "not supported", "not applicable")


@dataclass
class Note:
    """One reason, and the cells that give it."""

    number: int
    kind: str
    text: str
    cells: list[str] = field(default_factory=list)


@dataclass
class Field:
    """The cells of one model in one flow."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[int] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The outcome that it is coloured by."""
        return next(kind for kind in _ORDER if self.counts[kind])

    @property
    def text(self) -> str:
        """Symbols with counts: `✓ 4 ○ 1`; a framework's own refusal beside other cells is left out."""
        kinds = [kind for kind in _ORDER if self.counts[kind] and (kind != "not applicable" or kind == self.kind)]
        shown = [OUTCOMES[kind][0] + (f" {self.counts[kind]}" if kind != "not applicable" else "") for kind in kinds]
        return " ".join(shown)


@dataclass(frozen=True)
class Overview:
    """Fields by (model, flow), the axes of the table, and the reasons."""

    fields: Mapping[tuple[str, str], Field]
    models: tuple[str, ...]
    flows: tuple[str, ...]
    notes: tuple[Note, ...]


def overview(found: Mapping[str, Any]) -> Overview:
    """The table of some results; see :func:`qat_compat.matrix.report.results`."""
    fields: dict[tuple[str, str], Field] = {}
    notes: dict[tuple[str, str], Note] = {}
    kinds = list(OUTCOMES)
    for row in sorted(found["cells"], key=lambda row: kinds.index(row["outcome"])):
        entry = fields.setdefault((row["model"], row["flow"]), Field())
        entry.counts[row["outcome"]] += 1
        if row["outcome"] == "passed":
            continue
        text = brief(row["reason"])
        note = notes.setdefault((row["outcome"], text), Note(len(notes) + 1, row["outcome"], text))
        names = (row[axis] for axis in AXES)
        note.cells.append("/".join(names))
        if note.number not in entry.notes:
            entry.notes.append(note.number)
    shown = {axis: {row[axis] for row in found["cells"]} for axis in ("model", "flow")}
    return Overview(
        fields,
        tuple(model for model in found["axes"]["model"] if model in shown["model"]),
        tuple(flow for flow in found["axes"]["flow"] if flow in shown["flow"]),
        tuple(notes.values()),
    )


def by_value(found: Mapping[str, Any], axis: str) -> dict[str, Counter[str]]:
    """Value of an axis -> how its cells came out."""
    counts: dict[str, Counter[str]] = {value: Counter() for value in found["axes"][axis]}
    for row in found["cells"]:
        counts[row[axis]][row["outcome"]] += 1
    return {value: count for value, count in counts.items() if count}
