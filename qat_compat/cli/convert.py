"""`qat-compat to-float` and `qat-compat convert`: write a checkpoint in another form."""

from __future__ import annotations

import argparse
from typing import Any

from qat_compat.api import convert_checkpoint, open_checkpoint, save_checkpoint, to_float
from qat_compat.cli.console import bytes_held, console, size_text
from qat_compat.cli.factory import layout_of
from qat_compat.report import fit
from qat_compat.text import counted
from qat_compat.writers import WRITERS

__all__ = ["add"]


def add(commands: Any, select: argparse.ArgumentParser) -> None:
    back = commands.add_parser("to-float", parents=[select], help="write a QAT checkpoint under its float keys")
    back.add_argument("source", help="the QAT checkpoint")
    back.add_argument("out", help="the file to write: torch's format, or safetensors if the name ends so")
    layout = "a float checkpoint that has the wanted keys, order and dtypes, or module:factory of the float model"
    back.add_argument("--like", metavar="LAYOUT", help=layout)
    back.add_argument("--backup", action="store_true", help="keep the file that is replaced, under a dated name")
    back.set_defaults(run=_to_float)

    across = commands.add_parser("convert", parents=[select], help="write a checkpoint in another form")
    across.add_argument("source", help="a QAT checkpoint that this package saved, or one of integers")
    across.add_argument("out", help="the file or, for compressed-tensors and modelopt, the folder to write")
    across.add_argument("--to", required=True, metavar="FORM", help=", ".join(WRITERS))
    across.add_argument("--like", metavar="LAYOUT", help=f"{layout}; modelopt needs the model")
    across.set_defaults(run=_convert)


def _to_float(arguments: argparse.Namespace) -> int:
    checkpoint = to_float(arguments.source, like=layout_of(arguments.like), select=arguments.select)
    save_checkpoint(checkpoint, arguments.out, backup=arguments.backup)
    out = console()
    for note in checkpoint.notes:
        out.print(fit(f"note: {note}", out.width), soft_wrap=True)
    about = f"{counted(len(checkpoint), 'float tensor')}, {size_text(bytes_held(checkpoint))}"
    out.print(f"{arguments.out}: {about}", soft_wrap=True)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    like = layout_of(arguments.like)
    path = convert_checkpoint(arguments.source, arguments.to, arguments.out, select=arguments.select, like=like)
    written = open_checkpoint(path)
    about = f"{counted(len(written), 'tensor')}, {written.framework}, {written.stage}"
    console().print(f"{path}: {about}, {size_text(bytes_held(written))}", soft_wrap=True)
    return 0
