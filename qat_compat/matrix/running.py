"""What became of a cell."""

from __future__ import annotations

import re
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qat_compat.devices import forked_rng
from qat_compat.errors import CompatError
from qat_compat.matrix.cases import Case, Cell, Refused
from qat_compat.matrix.directions import DIRECTIONS
from qat_compat.matrix.flows import Flow, NotApplicable
from qat_compat.matrix.planning import declared_reason, donor_of
from qat_compat.testing import QATModel

__all__ = ["FAILED", "INAPPLICABLE", "PASSED", "UNSUPPORTED", "Outcome", "run_cell"]

PASSED, FAILED, UNSUPPORTED, INAPPLICABLE = "passed", "failed", "not supported", "not applicable"

_SHOWN_FRAMES = 6


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        kind: `passed`; `failed`; `not supported` by this package, which said so with an error of its own; or `not
            applicable`, because the framework itself cannot do it.
        reason: Why it has not passed, in a few lines.
        seconds: Wall-clock time.
    """

    kind: str
    reason: str
    seconds: float

    def as_row(self, cell: Cell) -> dict[str, Any]:
        """The row of results that is sent between processes and written to JSON."""
        return {**asdict(cell), "outcome": self.kind, "reason": self.reason, "seconds": round(self.seconds, 3)}


def run_cell(cell: Cell, declared: QATModel, flow: Flow, folder: Path) -> Outcome:
    """Run the check of one cell.

    Args:
        cell: The cell.
        declared: Its model.
        flow: Its flow.
        folder: An empty folder for its files.
    """
    started = time.perf_counter()
    with forked_rng():
        torch.manual_seed(0)
        kind, reason = _judged(Case(cell, declared, flow, donor_of(flow), folder))
    reason = reason.replace(f"{folder}/", "").replace(str(folder), "the folder")
    return Outcome(kind, reason, time.perf_counter() - started)


def _judged(case: Case) -> tuple[str, str]:
    cell, declared = case.cell, case.declared
    where = (cell.flow, cell.direction, cell.granularity)
    refused = declared_reason(declared.refused, *where)
    unsupported = declared_reason(declared.unsupported, *where)
    try:
        _check(case)
    except (NotApplicable, Refused) as error:
        return _refused(str(error), refused, declared)
    except CompatError as error:
        text = f"{type(error).__name__}: {error}"
        if unsupported is not None and re.search(unsupported, text):
            return UNSUPPORTED, text
        return (UNSUPPORTED if DIRECTIONS[cell.direction].optional and unsupported is None else FAILED), text
    except AssertionError as error:
        return FAILED, str(error) or "an assertion failed"
    except Exception as error:  # a fault of this package: it is shown with its place, not passed on
        frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[-_SHOWN_FRAMES:])
        return FAILED, f"{type(error).__name__}, which is a fault: {error}\n" + "".join(frames).rstrip()
    if refused or unsupported:
        return FAILED, f"is declared as refused ({refused or unsupported}), and works: take it off the declaration"
    return PASSED, ""


def _check(case: Case) -> None:
    try:
        DIRECTIONS[case.cell.direction].check(case)
    except AssertionError:
        case.repeatable()
        raise


def _refused(reason: str, expected: str | None, declared: QATModel) -> tuple[str, str]:
    if declared.refused is None or (expected is not None and re.search(expected, reason)):
        return INAPPLICABLE, reason
    return FAILED, f"{reason}\n{f'declared is {expected!r}' if expected else 'no such refusal is declared'}"
