"""`qat-compat diff`: compare the float keys of two checkpoints."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from qat_compat.api import open_checkpoint, to_float
from qat_compat.casting import same_values
from qat_compat.cli.console import console
from qat_compat.errors import PlanError
from qat_compat.names import canonical
from qat_compat.report import fit
from qat_compat.schema import Stage
from qat_compat.storage import Checkpoint
from qat_compat.text import collapse, counted

__all__ = ["add"]


def add(commands: Any, select: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("diff", parents=[select], help="compare the float keys of two checkpoints")
    parser.add_argument("a", help="a checkpoint, float or QAT")
    parser.add_argument("b", help="another one")
    parser.add_argument("--values", action="store_true", help="compare the tensors too, bit for bit")
    parser.set_defaults(run=_diff)


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
    out = console()
    if bare:
        out.print("names are compared without wrapper prefixes")
    for (name, detail), keys in groups.items():
        if detail:
            out.print(f"{name:<9}  {detail}")
        for index, line in enumerate(collapse(keys)):
            head = "" if detail or index else name
            out.print(fit(f"{head:<9}  {line}", out.width), soft_wrap=True)
    counts = Counter[str]()
    for (name, _), keys in groups.items():
        counts[name] += len(keys)
    alike = len(common) - counts["spec"] - counts["values"]
    total = f"of {counted(len(common), 'key')} in common, {alike:,} {'is' if alike == 1 else 'are'} alike"
    if not groups:
        what = "keys, shapes, dtypes and values" if arguments.values else "keys, shapes and dtypes"
        out.print(f"A and B have the same {what}: {counted(len(common), 'float tensor')}")
        return 0
    out.print(f"A and B differ: {', '.join(f'{count} {name}' for name, count in counts.items())}; {total}")
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
    """How two tensors of one shape and dtype differ in their bits; "" if they do not."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if a == b else "extra state differs"
    if a.is_quantized or b.is_quantized:
        a, b = (torch.dequantize(value) for value in (a, b))
    if same_values(a, b):
        return ""
    unlike = (a != b) & ~((a != a) & (b != b))
    count = int(unlike.sum())
    if not count:
        return "only in the sign of zeros or the bits of NaN"
    if not (a.is_floating_point() or a.is_complex()):  # a float would not hold every difference of integers
        gaps = (abs(int(x) - int(y)) for x, y in zip(a[unlike].tolist(), b[unlike].tolist(), strict=True))
        return f"{count:,} of {a.numel():,} differ, at most by {max(gaps)}"
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide))[unlike].abs().max().item()
    return f"{count:,} of {a.numel():,} differ, at most by {gap:.3g}"
