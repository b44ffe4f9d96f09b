"""What a load did, for people and for programs."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat_compat.errors import Problem, SaveError
from qat_compat.plan import Plan, Step, body, grouped, reason_of
from qat_compat.text import collapse

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """The plan that was carried out, and what was seen on the way.

    Args:
        plan: Every step, with the provenance of each value.
        batches: Calibration batches that were run.
        losses: Key -> what a cast to the model's dtype lost.
        findings: What is sound and should still be known.
        seconds: Wall time of the whole call.
    """

    plan: Plan
    batches: int = 0
    losses: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.plan.steps

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self.plan.problems

    @property
    def warnings(self) -> tuple[str, ...]:
        lost = [f"{key}: {text}" for key, text in self.losses.items()]
        return (*self.plan.warnings, *lost, *self.findings)

    @property
    def copied(self) -> int:
        return self.plan.copied

    @property
    def derived(self) -> int:
        return self.plan.derived

    @property
    def synthesized(self) -> int:
        return self.plan.synthesized

    @property
    def kept(self) -> int:
        return self.plan.kept

    @property
    def dropped(self) -> int:
        return self.plan.dropped

    def provenance(self, key: str) -> str:
        """Where the value of one target key came from."""
        for step in self.plan.steps:
            if step.key == key:
                return f"{type(step).__name__.lower()}: {reason_of(step)}"
        raise KeyError(key)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything, as JSON."""
        data: dict[str, Any] = {
            **self.plan.to_dict(),
            "warnings": list(self.warnings),
            "counts": self._counts(),
            "batches": self.batches,
            "seconds": round(self.seconds, 6),
        }
        return json.dumps(data, indent=indent)

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("copied", "derived", "synthesized", "kept", "dropped")}

    def _headline(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self._counts().items() if count)
        data = f", {self.batches} calibration batches" if self.batches else ""
        return f"{counts}{data}, {self.seconds:.2f} s"

    def __str__(self) -> str:
        shown = Plan(self.plan.steps, (), self.warnings, self.plan.source, self.plan.target)
        return "\n".join([f"loaded {self.plan.source} -> {self.plan.target}", f"  {self._headline()}", *body(shown)])

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page and return its path."""
        destination = Path(path)
        try:
            destination.write_text(_page(self), encoding="utf-8")
        except OSError as error:
            raise SaveError(f"the report cannot be written: {error.strerror}", file=destination) from error
        return destination


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; margin-bottom: .2rem; } h1 small { font-weight: normal; opacity: .7; }
.counts { display: flex; gap: .8rem; flex-wrap: wrap; margin: 1.2rem 0; padding: 0; list-style: none; }
.counts li { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; min-width: 6rem; }
.counts b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .6rem; vertical-align: top; }
tr { border-top: 1px solid var(--line); } thead tr { border: 0; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
.copy, .derive, .synthesize, .keep, .drop {
  border-radius: .3rem; padding: .05rem .45rem; color: #fff; font-size: .85rem; }
.copy { background: #2563a8; } .derive { background: #7a3fa0; } .synthesize { background: #1d7a46; }
.keep { background: #6b6b6b; } .drop { background: #a15c10; }
.warnings li { background: var(--soft); margin: .3rem 0; padding: .3rem .6rem; border-radius: .3rem; }
details summary { cursor: pointer; }
"""


def _page(report: Report) -> str:
    esc = html.escape
    counts = "".join(f"<li><b>{count}</b>{esc(name)}</li>" for name, count in report._counts().items())
    rows = []
    for (kind, reason), keys in grouped(report.steps).items():
        lines = [f"<code>{esc(name)}</code>" for name in collapse(keys)]
        shown = "<br>".join(lines[:6])
        if len(lines) > 6:
            shown += f"<details><summary>{len(lines) - 6} more</summary>{'<br>'.join(lines[6:])}</details>"
        rows.append(
            f'<tr><td><span class="{kind}">{kind}</span></td><td class="n">{len(keys)}</td>'
            f"<td>{esc(reason)}</td><td>{shown}</td></tr>"
        )
    notes = "".join(f"<li>{esc(text)}</li>" for text in report.warnings)
    warnings = f'<h2>Warnings</h2><ul class="warnings">{notes}</ul>' if notes else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>qat_compat: {esc(report.plan.source)}</title><style>{_STYLE}</style>"
        f"<h1>{esc(report.plan.source)} &rarr; {esc(report.plan.target)}<br>"
        f"<small>{esc(report._headline())}</small></h1>"
        f'<ul class="counts">{counts}</ul>{warnings}'
        "<h2>Where every value came from</h2>"
        "<table><thead><tr><th>step</th><th>keys</th><th>why</th><th>names</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></html>\n"
    )
