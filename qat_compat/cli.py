"""The command line: look into checkpoints, compare them, plan a load, go back to float, go from form to form.

Each command is a thin layer over a public verb. Exit status: 0 is yes, 1 is no (files differ, a plan has problems),
2 is an error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import operator
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from qat_compat.api import convert_checkpoint, open_checkpoint, plan_load, save_checkpoint, to_float
from qat_compat.errors import CompatError, PlanError, ProblemKind
from qat_compat.names import canonical
from qat_compat.report import fit, write_page
from qat_compat.schema import Spec, Stage
from qat_compat.storage import Checkpoint
from qat_compat.text import collapse, counted

__all__ = ["main"]

_FIRST_OF_BRACES = re.compile(r"\{([^{},.]+)(?:,|\.\.\.)[^{}]*\}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"fc.weight": torch.ones(2)}, f"{folder}/a.pt")
        ...     torch.save({"fc.weight": torch.ones(3)}, f"{folder}/b.pt")
        ...     status = main(["diff", f"{folder}/a.pt", f"{folder}/b.pt"])
        spec       float32[2] -> float32[3]
                   fc.weight
        A and B differ: 1 spec; of 1 key in common, 0 are alike
        >>> status
        1
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except CompatError as error:
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        console.print(Text.assemble(("qat-compat: ", "bold red"), str(error)))
        return 2
    except BrokenPipeError:  # the reader has seen enough: `qat-compat inspect model.pt | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qat-compat",
        description="Checkpoints for quantization-aware training.",
        epilog="Exit status: 0 for yes, 1 for no (files differ, a plan has problems), 2 for an error.",
    )
    parser.add_argument("--version", action="version", version=f"qat-compat {version('qat-compat')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    select = argparse.ArgumentParser(add_help=False)
    select.add_argument(
        "--select", metavar="WHICH", help="which weights of the file: ema, model, or a dotted path inside it"
    )

    inspect = commands.add_parser("inspect", parents=[select], help="say what a checkpoint holds")
    inspect.add_argument("file", help="a checkpoint file or folder")
    inspect.add_argument("--json", action="store_true", help="every key, for programs")
    inspect.set_defaults(run=_inspect)

    back = commands.add_parser("to-float", parents=[select], help="write a QAT checkpoint under its float keys")
    back.add_argument("source", help="the QAT checkpoint")
    back.add_argument("out", help="the file to write: torch's format, or safetensors if the name ends so")
    back.add_argument("--like", metavar="FILE", help="a float checkpoint that has the wanted keys, order and dtypes")
    back.add_argument("--backup", action="store_true", help="keep the file that is replaced, under a dated name")
    back.set_defaults(run=_to_float)

    across = commands.add_parser("convert", parents=[select], help="write an integer checkpoint in another form")
    across.add_argument("source", help="the checkpoint, of torchao's tensors or of compressed-tensors")
    across.add_argument("out", help="the file or, for compressed-tensors, the folder to write")
    across.add_argument("--to", required=True, metavar="FORM", help="torchao, compressed-tensors or float")
    across.set_defaults(run=_convert)

    diff = commands.add_parser("diff", parents=[select], help="compare the float keys of two checkpoints")
    diff.add_argument("a", help="a checkpoint, float or QAT")
    diff.add_argument("b", help="another one")
    diff.add_argument("--values", action="store_true", help="compare the tensors too, bit for bit")
    diff.set_defaults(run=_diff)

    plan = commands.add_parser(
        "plan", parents=[select], help="show what loading a checkpoint into a prepared model would do"
    )
    plan.add_argument("file", help="the checkpoint")
    plan.add_argument("factory", help="module:factory; called without arguments, it returns the prepared model")
    plan.add_argument("--keep", metavar="GLOB", action="append", default=[], help="float entries that may stay")
    plan.add_argument("--drop", metavar="GLOB", action="append", default=[], help="keys of the file to ignore")
    plan.add_argument(
        "--rename", metavar="REGEX=NEW", action="append", default=[], type=_renaming, help="rename keys of the file"
    )
    plan.add_argument(
        "--calibration",
        metavar="HOW",
        help="where activation ranges will come from: batches (default, if any are needed), defer, none, or the path "
        "of a saved calibration",
    )
    plan.add_argument("--html", metavar="PATH", help="write the plan as a page, too")
    plan.set_defaults(run=_plan)
    return parser


def _renaming(text: str) -> tuple[str, str]:
    pattern, equals, replacement = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form REGEX=NEW")
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern, replacement


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


# --- inspect ----------------------------------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.file, select=arguments.select)
    if arguments.json:
        print(json.dumps(_facts(checkpoint), indent=2))
        return 0
    specs = {key: checkpoint.spec(key) for key in checkpoint}
    dtypes = Counter(_dtype(spec) for spec in specs.values())
    numbers = sum(math.prod(spec.shape) for spec in specs.values())
    tied = len(specs) - len(_distinct(checkpoint))
    rows = [
        ("framework", f"{checkpoint.framework}, {checkpoint.stage}"),
        ("tensors", f"{len(specs):,}, {numbers:,} numbers" + (f"; {tied} tied to another" if tied else "")),
        ("dtypes", ", ".join(f"{name} ({count})" for name, count in dtypes.most_common())),
        ("size", _size(_bytes(checkpoint))),
    ]
    if checkpoint.metadata:
        rows.append(("beside", ", ".join(map(str, checkpoint.metadata))))
    rows += [("note", note) for note in checkpoint.notes]
    console = _console()
    console.print(Text(checkpoint.name, style="bold"), soft_wrap=True)
    console.print(Padding(_columns([(Text(name, style="dim"), value) for name, value in rows]), (0, 0, 1, 2)))
    room = console.width - 4 - max([0, *(len(str(spec)) for spec in specs.values())])
    table = _columns([(fit(name, max(room, 20)), str(spec)) for name, spec in _collapsed(specs)])
    console.print(Padding(table, (0, 0, 0, 2)))
    return 0


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    specs = {key: checkpoint.spec(key) for key in checkpoint}
    return {
        "file": checkpoint.name,
        "framework": checkpoint.framework,
        "stage": checkpoint.stage,
        "tensors": len(specs),
        "bytes": _bytes(checkpoint),
        "dtypes": dict(Counter(_dtype(spec) for spec in specs.values())),
        "metadata": list(map(str, checkpoint.metadata)),
        "notes": list(checkpoint.notes),
        "keys": {key: {"shape": list(spec.shape), "dtype": _dtype(spec)} for key, spec in specs.items()},
    }


def _distinct(checkpoint: Checkpoint) -> list[str]:
    """One key for each tensor; tied keys are one tensor."""
    return list({checkpoint.alias(key) or key: key for key in checkpoint}.values())


def _bytes(checkpoint: Checkpoint) -> int:
    specs = [checkpoint.spec(key) for key in _distinct(checkpoint)]
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def _dtype(spec: Spec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _size(count: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def _collapsed(specs: dict[str, Spec]) -> list[tuple[str, Spec]]:
    """Names with one spec collapse into one line; lines stand where their first key stood."""
    by_spec: dict[Spec, list[str]] = {}
    for key, spec in specs.items():
        by_spec.setdefault(spec, []).append(key)
    place = {key: index for index, key in enumerate(specs)}
    lines = [(name, spec) for spec, keys in by_spec.items() for name in collapse(keys)]
    return sorted(lines, key=lambda line: place.get(_FIRST_OF_BRACES.sub(r"\1", line[0]), len(place)))


def _columns(rows: Iterable[tuple[Text | str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


# --- to-float ---------------------------------------------------------------------------------------------------------


def _to_float(arguments: argparse.Namespace) -> int:
    checkpoint = to_float(arguments.source, like=arguments.like, select=arguments.select)
    save_checkpoint(checkpoint, arguments.out, backup=arguments.backup)
    console = _console()
    for note in checkpoint.notes:
        console.print(fit(f"note: {note}", console.width), soft_wrap=True)
    console.print(f"{arguments.out}: {counted(len(checkpoint), 'float tensor')}, {_size(_bytes(checkpoint))}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    path = convert_checkpoint(arguments.source, arguments.to, arguments.out, select=arguments.select)
    written = open_checkpoint(path)
    about = f"{counted(len(written), 'tensor')}, {written.framework}, {written.stage}"
    _console().print(f"{path}: {about}, {_size(_bytes(written))}", soft_wrap=True)
    return 0


# --- diff -------------------------------------------------------------------------------------------------------------


def _diff(arguments: argparse.Namespace) -> int:
    a, b = _float_pair(arguments.a, arguments.b, arguments.select)
    left, right, bare = _names(a, b)
    common = [name for name in left if name in right]
    groups: dict[tuple[str, str], list[str]] = {}
    for side, mine, other in (("only in A", left, right), ("only in B", right, left)):
        for name in mine:
            if name not in other:
                groups.setdefault((side, ""), []).append(name)
    for name in common:
        before, after = a.spec(left[name]), b.spec(right[name])
        if before != after:
            groups.setdefault(("spec", f"{before} -> {after}"), []).append(name)
        elif arguments.values and (difference := _difference(a[left[name]], b[right[name]])):
            groups.setdefault(("values", difference), []).append(name)
    console = _console()
    if bare:
        console.print("names are compared without wrapper prefixes")
    for (name, detail), keys in groups.items():
        if detail:
            console.print(f"{name:<9}  {detail}")
        for index, line in enumerate(collapse(keys)):
            head = "" if detail or index else name
            console.print(fit(f"{head:<9}  {line}", console.width), soft_wrap=True)
    counts = Counter[str]()
    for (name, _), keys in groups.items():
        counts[name] += len(keys)
    alike = len(common) - counts["spec"] - counts["values"]
    total = f"of {counted(len(common), 'key')} in common, {alike:,} {'is' if alike == 1 else 'are'} alike"
    if not groups:
        what = "keys, shapes, dtypes and values" if arguments.values else "keys, shapes and dtypes"
        console.print(f"A and B have the same {what}: {counted(len(common), 'float tensor')}")
        return 0
    console.print(f"A and B differ: {', '.join(f'{count} {name}' for name, count in counts.items())}; {total}")
    return 1


def _float_pair(a: str, b: str, select: str | None) -> tuple[Checkpoint, Checkpoint]:
    """Both under their float names; a QAT file that does not tell them takes them from the other one."""
    opened = [open_checkpoint(path, select=select) for path in (a, b)]
    pair = []
    for mine, other in (opened, opened[::-1]):
        if mine.stage == Stage.FLOAT.value:
            pair.append(mine)
            continue
        try:
            pair.append(to_float(mine))
        except PlanError:
            if other.stage != Stage.FLOAT.value:
                raise
            pair.append(to_float(mine, like=other))
    return pair[0], pair[1]


def _names(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, str], dict[str, str], bool]:
    """Name -> key of either side, and whether names are keys without wrapper prefixes (`module.conv` is `conv`).

    They are where that makes more names common, and no two keys of one side the same.
    """
    left, right = ({canonical(key): key for key in side} for side in (a, b))
    unique = len(left) == len(a) and len(right) == len(b)
    if unique and len(left.keys() & right.keys()) > len(set(a) & set(b)):
        return left, right, True
    return dict(zip(a, a, strict=True)), dict(zip(b, b, strict=True)), False


def _difference(a: Any, b: Any) -> str:
    """How two tensors of one shape and dtype differ; "" if they do not. Two NaN are alike."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if a == b else "extra state differs"
    if a.is_quantized or b.is_quantized:
        a, b = (torch.dequantize(value) for value in (a, b))
    unlike = ~((a == b) | ((a != a) & (b != b)))
    count = int(unlike.sum())
    if not count:
        return ""
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide))[unlike].abs().max().item()
    return f"{count:,} of {a.numel():,} differ, at most by {gap:.3g}"


# --- plan -------------------------------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> int:
    model, how = _made_by(arguments.factory), arguments.calibration
    options = {name: getattr(arguments, name) for name in ("select", "keep", "drop", "rename")}
    plan = plan_load(model, arguments.file, calibration=how if how not in ("batches", "none") else None, **options)
    needed = any(problem.kind is ProblemKind.UNCALIBRATED for problem in plan.problems)
    if how == "batches" or (how is None and needed):
        plan = plan_load(model, arguments.file, calibration=_batches, **options)
    console = _console()
    console.print(fit(str(plan), console.width), soft_wrap=True)
    if arguments.html:
        write_page(plan, arguments.html)
    if plan.ok:
        return 0
    console.print(f"this cannot be loaded: {counted(len(plan.problems), 'problem')}", style="bold red")
    return 1


def _batches(model: nn.Module) -> None:
    """Stands for calibration data: a plan says what the data is for, and reads none of it."""


def _made_by(factory: str) -> nn.Module:
    """What the user's own function returns. An exception of that function is the user's, and passes."""
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


if __name__ == "__main__":
    raise SystemExit(main())
