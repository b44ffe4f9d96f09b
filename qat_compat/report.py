"""What a load did, for people and for programs."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from qat_compat.errors import Problem, SaveError
from qat_compat.plan import Copy, Plan, Step, body, grouped, reason_of
from qat_compat.text import collapse, counted

__all__ = ["Report", "fit", "write_page"]

_WIDTH = 100  # columns of the text, whatever the terminal: a report ends in logs, where equal loads give equal lines
_SHOWN = 8  # names of one group on a page, before the rest is folded away


@dataclass(frozen=True)
class Report:
    """The plan that was carried out, and what was seen on the way.

    Example:
        >>> from qat_compat.plan import Copy
        >>> print(Report(Plan((Copy("fc.weight", "fc.weight", "exact key"),)), batches=1, seconds=0.25))
        loaded <source> -> <target>
          1 copied; 1 calibration batch; 0.25 s
          copy          1  exact key
                            fc.weight

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
        """Where the value of one target key came from: the step, the source's name for it if it differs, and why."""
        step = self._by_key[key]
        of = f" of {step.source}" if isinstance(step, Copy) and step.source != key else ""
        return f"{type(step).__name__.lower()}{of}: {reason_of(step)}"

    @cached_property
    def _by_key(self) -> Mapping[str, Step]:
        return {step.key: step for step in reversed(self.plan.steps)}  # of two, the target's comes first

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything, as JSON."""
        data: dict[str, Any] = {
            **self.plan.to_dict(),
            "warnings": list(self.warnings),
            "losses": dict(self.losses),
            "findings": list(self.findings),
            "counts": _counts(self.plan),
            "batches": self.batches,
            "seconds": round(self.seconds, 6),
        }
        return json.dumps(data, indent=indent)

    def _headline(self) -> str:
        parts = [", ".join(f"{count} {name}" for name, count in _counts(self.plan).items() if count) or "nothing to do"]
        return "; ".join([*parts, *self._circumstances()])

    def _circumstances(self) -> list[str]:
        batches = [counted(self.batches, "calibration batch")] if self.batches else []
        return [*batches, f"{self.seconds:.2f} s"]

    def __str__(self) -> str:
        shown = Plan(self.plan.steps, (), self.warnings)
        title = f"loaded {self.plan.source} -> {self.plan.target}"
        return fit("\n".join([title, f"  {self._headline()}", *body(shown)]), _WIDTH)

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write a page that needs nothing but itself, and return its path."""
        return write_page(self.plan, path, report=self)


def _counts(plan: Plan) -> dict[str, int]:
    return {name: getattr(plan, name) for name in ("copied", "derived", "synthesized", "kept", "dropped")}


# --- text -------------------------------------------------------------------------------------------------------------


_HEAD = re.compile(r" *(?:[a-z]+: +|[a-z]+ +\d+ +)?")  # what stands before the text of a line, and is not repeated
_BREAK = re.compile(r"(?<=,)|(?=(?<!\.)\.(?!\.))")  # where a name may be cut: after a comma, before a single dot


def fit(text: str, width: int) -> str:
    """Break lines that are wider than a screen, at spaces and within long names, and indent what follows.

    Example:
        >>> print(fit("  keep  3  encoder.layer.{0...5}.output.dense.{weight,bias} stay", 40))
          keep  3  encoder.layer.{0...5}.output
                   .dense.{weight,bias} stay
    """
    return "\n".join(piece for line in text.splitlines() for piece in _pieces(line, width))


def _pieces(line: str, width: int) -> list[str]:
    head = _HEAD.match(line)
    indent = len(head.group()) if head else 0
    if indent > width // 2 or indent == len(line) - len(line.lstrip()):
        indent = len(line) - len(line.lstrip()) + 2
    found: list[str] = []
    while len(line) > width:
        end = line.rfind(" ", indent + 1, width + 1)
        if end <= indent or not line[:end].strip():
            cuts = [cut.start() for cut in _BREAK.finditer(line, indent + 1) if cut.start() <= width]
            dots = [cut for cut in cuts if line[cut] == "." and cut > width * 0.6]
            end = max(dots or cuts, default=width)
        found.append(line[:end].rstrip())
        line = " " * indent + line[end:].lstrip(" ")
    return [*found, line]


# --- page -------------------------------------------------------------------------------------------------------------

_MEANING = {
    "copy": ("copied", "from the file, as it is"),
    "derive": ("derived", "computed from the file"),
    "synthesize": ("synthesized", "computed from weights or data"),
    "keep": ("kept", "the model's own value"),
    "drop": ("dropped", "in the file, taken by nothing"),
}

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #fff; --ink: #1c1d21; --soft: #5b5e66; --line: #e2e2de; --tint: #f1f1ee;
  --copy: #2f6db5; --derive: #7d4bb0; --synthesize: #1f7d4d; --keep: #6a6d75; --drop: #a35a12;
  --warn: #8a5a00; --warn-tint: #fff6e0; --bad: #b3261e; --bad-tint: #fdecea;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #15161a; --card: #1d1f24; --ink: #e8e8ea; --soft: #a3a6af; --line: #33363d; --tint: #262930;
  --copy: #7db3f0; --derive: #c29bec; --synthesize: #6fcf97; --keep: #a7abb4; --drop: #e8a55c;
  --warn: #f0c36b; --warn-tint: #2f2818; --bad: #ff8a80; --bad-tint: #3a1f1e;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem); }
code { font: .84em/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
p, h1, h2, ul, dl, dd { margin: 0; }
h1 { font-size: clamp(1.3rem, 3.5vw, 1.8rem); line-height: 1.25; letter-spacing: -.01em; overflow-wrap: anywhere; }
h1 span { color: var(--soft); font-weight: 400; }
h2 { font-size: 1rem; margin: 2.25rem 0 .75rem; }
.above { color: var(--soft); font-size: .8rem; letter-spacing: .04em; margin-bottom: .35rem; }
.below { color: var(--soft); margin-top: .5rem; }
.bar { display: flex; gap: 2px; height: .8rem; margin: 1.75rem 0 1rem; border-radius: .4rem; overflow: hidden; }
.bar i { min-width: 3px; background: var(--c); }
.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.counts > div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.counts dt { color: var(--c); font-weight: 600; font-size: .9rem; }
.counts dd b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.counts dd { color: var(--soft); font-size: .8rem; } .counts b { color: var(--ink); font-weight: 600; }
.notes { list-style: none; padding: 0; display: grid; gap: .5rem; }
.notes li { border-left: 4px solid var(--warn); background: var(--warn-tint); border-radius: .3rem;
  padding: .5rem .8rem; overflow-wrap: anywhere; }
.notes.bad li { border-color: var(--bad); background: var(--bad-tint); }
.notes b { color: var(--warn); font-weight: 600; } .notes.bad b { color: var(--bad); }
.steps { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .7rem .9rem; vertical-align: top; font-weight: 400; }
thead th { color: var(--soft); font-size: .8rem; padding-block: .5rem; background: var(--tint); }
tbody tr { border-top: 1px solid var(--line); }
tbody th { white-space: nowrap; color: var(--c); font-weight: 600; }
tbody th::before { content: ""; display: inline-block; width: .6rem; height: .6rem; margin-right: .5rem;
  border-radius: 50%; background: var(--c); }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.why { width: 19%; }
td code { display: block; padding-left: 1.2em; text-indent: -1.2em; }
summary { cursor: pointer; color: var(--soft); font-size: .85rem; padding: .15rem 0; }
summary:focus-visible { outline: 2px solid var(--copy); outline-offset: 2px; border-radius: .2rem; }
.copy { --c: var(--copy); } .derive { --c: var(--derive); } .synthesize { --c: var(--synthesize); }
.keep { --c: var(--keep); } .drop { --c: var(--drop); }
@media (max-width: 44rem) {
  thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  tbody tr { display: grid; grid-template-columns: 1fr auto; padding: .5rem 0; }
  th, td { padding: .15rem .9rem; } td.why, td.names { grid-column: 1 / -1; width: auto; }
  td.why { color: var(--soft); }
}
@media print { body { background: #fff; } main { padding: 0; } tr { break-inside: avoid; } }
"""


def write_page(plan: Plan, path: str | PathLike[str], *, report: Report | None = None) -> Path:
    """Write a plan, or the report of what it became, as a page that needs nothing but itself.

    Raises:
        SaveError: The file cannot be written.
    """
    destination = Path(path)
    try:
        destination.write_text(_page(plan, report), encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise SaveError(
            "the page cannot be written", file=destination, found=error, remedy="choose another path"
        ) from error
    return destination


def _page(plan: Plan, report: Report | None) -> str:
    esc = html.escape
    source = Path(plan.source).name or plan.source
    kind = "Plan" if report is None else "Load report"
    circumstances = [] if report is None else report._circumstances()
    below = [*([f"<code>{esc(plan.source)}</code>"] if source != plan.source else []), *map(esc, circumstances)]
    about = f'<p class="below">{" &middot; ".join(below)}</p>\n' if below else ""
    warnings = plan.warnings if report is None else report.warnings
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(source)} &rarr; {esc(plan.target)}</title>\n<style>{_STYLE}</style>\n<main>\n<header>\n"
        f'<p class="above">qat_compat &middot; {kind}</p>\n'
        f"<h1>{esc(source)} <span>&rarr;</span> {esc(plan.target)}</h1>\n"
        f"{about}</header>\n{_summary(plan)}"
        + _notes("Problems", [str(problem) for problem in plan.problems], "notes bad")
        + _notes("Warnings", warnings, "notes")
        + f"{_table(plan)}</main>\n</html>\n"
    )


def _summary(plan: Plan) -> str:
    counts = _counts(plan)
    present = {kind: counts[name] for kind, (name, _) in _MEANING.items() if counts[name]}
    bars = "".join(f'<i class="{kind}" style="flex-grow:{count}"></i>' for kind, count in present.items())
    tiles = "".join(
        f'<div class="{kind}"><dt>{name}</dt><dd><b>{counts[name]:,}</b>{meaning}</dd></div>\n'
        for kind, (name, meaning) in _MEANING.items()
        if kind in present
    )
    # the bar shows what the numbers below it say, so that a screen reader passes it over
    return f'<div class="bar" aria-hidden="true">{bars}</div>\n<dl class="counts">\n{tiles}</dl>\n'


def _notes(title: str, texts: Sequence[str], style: str) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>\n" for text in texts)
    return f'<h2>{title}</h2>\n<ul class="{style}">\n{items}</ul>\n' if items else ""


def _breakable(name: str) -> str:
    return "<wbr>".join(map(html.escape, _BREAK.split(name)))


def _table(plan: Plan) -> str:
    rows = []
    for (kind, reason), keys in grouped(plan.steps).items():
        names = [f"<code>{_breakable(name)}</code>" for name in collapse(keys)]
        first = len(names) if len(names) <= _SHOWN else _SHOWN - 2
        shown = "".join(names[:first])
        if names[first:]:
            shown += f"<details><summary>{len(names) - first:,} more</summary>{''.join(names[first:])}</details>"
        rows.append(
            f'<tr class="{kind}"><th scope="row">{kind}</th><td class="n">{len(keys):,}</td>'
            f'<td class="why">{html.escape(reason)}</td><td class="names">{shown}</td></tr>\n'
        )
    head = "".join(
        f'<th scope="col"{style}>{name}</th>'
        for name, style in (("step", ""), ("keys", ' class="n"'), ("why", ""), ("names", ""))
    )
    return (
        '<h2 id="steps">Where every value came from</h2>\n<div class="steps"><table aria-labelledby="steps">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table></div>\n"
    )
