"""`qat-compat plan`: show what a load would do."""

from __future__ import annotations

import argparse
import re
from typing import Any

from torch import nn

from qat_compat.api import plan_load
from qat_compat.cli.console import console
from qat_compat.cli.factory import made_by
from qat_compat.errors import ProblemKind
from qat_compat.report import fit, write_page
from qat_compat.text import counted

__all__ = ["add"]


def add(commands: Any, select: argparse.ArgumentParser) -> None:
    about = "show what loading a checkpoint into a prepared model would do"
    parser = commands.add_parser("plan", parents=[select], help=about)
    parser.add_argument("file", help="the checkpoint")
    parser.add_argument("factory", help="module:factory; called without arguments, it returns the prepared model")
    parser.add_argument("--keep", metavar="GLOB", action="append", default=[], help="float entries that may stay")
    parser.add_argument("--drop", metavar="GLOB", action="append", default=[], help="keys of the file to ignore")
    parser.add_argument(
        "--rename", metavar="REGEX=NEW", action="append", default=[], type=_renaming, help="rename keys of the file"
    )
    parser.add_argument(
        "--calibration",
        metavar="HOW",
        help="where activation ranges will come from: batches (default, if any are needed), defer, none, or the path "
        "of a saved calibration",
    )
    parser.add_argument("--html", metavar="PATH", help="write the plan as a page, too")
    parser.set_defaults(run=_plan)


def _renaming(text: str) -> tuple[str, str]:
    pattern, equals, replacement = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form REGEX=NEW")
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern, replacement


def _plan(arguments: argparse.Namespace) -> int:
    model, how = made_by(arguments.factory), arguments.calibration
    options = {name: getattr(arguments, name) for name in ("select", "keep", "drop", "rename")}
    plan = plan_load(model, arguments.file, calibration=how if how not in ("batches", "none") else None, **options)
    needed = any(problem.kind is ProblemKind.UNCALIBRATED for problem in plan.problems)
    if how == "batches" or (how is None and needed):
        plan = plan_load(model, arguments.file, calibration=_batches, **options)
    out = console()
    out.print(fit(str(plan), out.width), soft_wrap=True)
    if arguments.html:
        write_page(plan, arguments.html)
    if plan.ok:
        return 0
    out.print(f"this cannot be loaded: {counted(len(plan.problems), 'problem')}", style="bold red")
    return 1


def _batches(model: nn.Module) -> None:
    """Stands for calibration data: a plan says what the data is for, and reads none of it."""
