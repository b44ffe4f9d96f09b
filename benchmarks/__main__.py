"""`python -m benchmarks`: run the suites, write JSON, print a table.

Every figure comes from several fresh processes, interleaved so that a slow moment of the machine hits every
candidate; a table shows medians, and each one's ratio to the baseline of the same run. The floor of a load is read in
the process that is measured, before and after. Values are compared after every timed load.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import fresh, interleaved, machine, use_device
from benchmarks.models import MODELS
from benchmarks.suites import SUITES

__all__ = ["main", "table"]

RESULTS = Path(__file__).parent / "results"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    about = results["machine"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in results["rows"]))
    lines = [
        f"{about['accelerator'] or about['device']}: {about['processor']}, {about['cores']} cores,"
        f" torch {about['torch']}, qat_compat {about['qat_compat']} ({commits});"
        " medians of fresh processes; the page cache is warm where nothing else is said.",
    ]
    for name, suite in SUITES.items():
        rows = [row for row in results["rows"] if row["suite"] == name]
        if rows:
            lines += ["", *suite.table(rows)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda|xpu", help="where the models are")
    parser.add_argument("--only", choices=list(SUITES), help="one suite alone")
    parser.add_argument(
        "--model", choices=list(MODELS), help="with --only: one model alone, where the suite has several"
    )
    parser.add_argument("--runs", type=int, default=5, help="fresh processes per figure (default 5)")
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest sizes, all in this process: to see that everything runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where the JSON goes (default results/DEVICE.json beside this); with --only, the new rows go beside those"
        " of the other suites of the same machine",
    )
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.model and not options.only:
        parser.error("--model goes with --only")
    use_device(options.device)
    if options.one:
        torch.set_num_threads(os.cpu_count() or 1)
        print(json.dumps(SUITES[options.one[0]].one(*options.one[1:])))
        return 0
    about = machine()  # as it was before the run
    out = options.out or RESULTS / f"{options.device}.json"
    others = _others(out, about) if options.only else []
    taken: list[dict[str, Any]] = []
    for name, suite in SUITES.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                cases = suite.prepare(Path(folder), options.tiny)
                cases = [case for case in cases if options.model in (None, case[0])]
                if not cases:
                    parser.error(f"the suite {name} does not load {options.model}")
                measure = suite.one if options.tiny else partial(fresh, name)
                found = suite.rows(interleaved(cases, options.runs, measure))
            taken += [{**row, "commit": about["commit"]} for row in found]
            stay = [row for row in others if row["suite"] != name or options.model not in (None, row.get("model"))]
            rows = sorted([*stay, *taken], key=_place)
            out.parent.mkdir(parents=True, exist_ok=True)
            # after each suite: what has been measured is not lost with what fails later
            out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(table({"machine": about, "rows": rows}))
    return 0


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """Where a row stands among the others: its suite, and in that its model."""
    models = list(MODELS)
    return list(SUITES).index(row["suite"]), models.index(row["model"]) if row.get("model") in models else 0


def _others(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are there, to stay beside those of one suite; they must be of the same machine."""
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    same = ("device", "processor", "accelerator", "cores", "torch", "qat_compat")
    if any(results["machine"][name] != about[name] for name in same):
        raise SystemExit(f"{path} is of another machine or version: pass --out, or run all suites")
    rows: list[dict[str, Any]] = results["rows"]
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
