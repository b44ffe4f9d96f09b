"""`qat-compat plan`: show what a load would do."""

from __future__ import annotations

import argparse
import importlib
import operator
import re
import sys
from typing import Any

from torch import nn

from qat_compat.api import plan_load
from qat_compat.cli.console import console
from qat_compat.errors import CompatError, ProblemKind
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
    model, how = _made_by(arguments.factory), arguments.calibration
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


def _made_by(factory: str) -> nn.Module:
    """What the user's own function returns. An exception of that function is the user's, and is shown as it is."""
    name, colon, attribute = factory.partition(":")
    if not (name and colon and attribute):
        raise CompatError("this names no factory", key=factory, expected="module:factory", found=factory)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look into the current folder by itself
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise CompatError(
            "there is no such module",
            key=factory,
            found=error,
            remedy="run this where it can be imported: from its folder, or with PYTHONPATH",
        ) from error
    try:
        make = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise CompatError("the module has no such factory", key=factory, found=error) from error
    if not callable(make):
        raise CompatError("this is no factory", key=factory, expected="a callable", found=type(make).__name__)
    model = make()
    if not isinstance(model, nn.Module):
        raise CompatError(
            "the factory returned no model", key=factory, expected="an nn.Module", found=type(model).__name__
        )
    return model
