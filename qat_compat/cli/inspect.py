"""`qat-compat inspect`: say what a checkpoint holds."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qat_compat.api import open_checkpoint
from qat_compat.cli.console import bytes_held, console, distinct, size_text
from qat_compat.report import fit
from qat_compat.schema import Spec
from qat_compat.storage import Checkpoint
from qat_compat.text import collapse

__all__ = ["add"]

_FIRST_OF_BRACES = re.compile(r"\{([^{},.]+)(?:,|\.\.\.)[^{}]*\}")


def add(commands: Any, select: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("inspect", parents=[select], help="say what a checkpoint holds")
    parser.add_argument("file", help="a checkpoint file or folder")
    parser.add_argument("--json", action="store_true", help="every key, for programs")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.file, select=arguments.select)
    if arguments.json:
        print(json.dumps(_facts(checkpoint), indent=2))
        return 0
    specs = {key: checkpoint.spec(key) for key in checkpoint}
    dtypes = Counter(_dtype(spec) for spec in specs.values())
    numbers = sum(math.prod(spec.shape) for spec in specs.values())
    tied = len(specs) - len(distinct(checkpoint))
    rows = [
        ("framework", f"{checkpoint.framework}, {checkpoint.stage}"),
        ("tensors", f"{len(specs):,}, {numbers:,} numbers" + (f"; {tied} tied to another" if tied else "")),
        ("dtypes", ", ".join(f"{name} ({count})" for name, count in dtypes.most_common())),
        ("size", size_text(bytes_held(checkpoint))),
    ]
    if checkpoint.metadata:
        rows.append(("beside", ", ".join(map(str, checkpoint.metadata))))
    rows += [("note", note) for note in checkpoint.notes]
    out = console()
    out.print(Text(checkpoint.name, style="bold"), soft_wrap=True)
    out.print(Padding(_columns([(Text(name, style="dim"), value) for name, value in rows]), (0, 0, 1, 2)))
    room = out.width - 4 - max([0, *(len(str(spec)) for spec in specs.values())])
    table = _columns([(fit(name, max(room, 20)), str(spec)) for name, spec in _collapsed(specs)])
    out.print(Padding(table, (0, 0, 0, 2)))
    return 0


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    specs = {key: checkpoint.spec(key) for key in checkpoint}
    return {
        "file": checkpoint.name,
        "framework": checkpoint.framework,
        "stage": checkpoint.stage,
        "tensors": len(specs),
        "bytes": bytes_held(checkpoint),
        "dtypes": dict(Counter(_dtype(spec) for spec in specs.values())),
        "metadata": list(map(str, checkpoint.metadata)),
        "notes": list(checkpoint.notes),
        "keys": {key: {"shape": list(spec.shape), "dtype": _dtype(spec)} for key, spec in specs.items()},
    }


def _dtype(spec: Spec) -> str:
    return str(spec.dtype).removeprefix("torch.")


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
