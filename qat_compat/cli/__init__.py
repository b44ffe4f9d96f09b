"""The command line: look into checkpoints, compare them, plan a load, go back to float, go from form to form.

Each command is a file here, a thin layer over a public verb. Exit status: 0 is yes, 1 is no (files differ, a plan has
problems), 2 is an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper

from rich.console import Console
from rich.text import Text

from qat_compat import __version__
from qat_compat.cli import convert, diff, inspect, plan
from qat_compat.errors import CompatError

__all__ = ["main"]


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may hold letters that the terminal has not
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
    except Exception:  # of the user's own factory, or a defect: not the status that means "no"
        traceback.print_exc()
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qat-compat",
        description="Checkpoints for quantization-aware training.",
        epilog="Exit status: 0 for yes, 1 for no (files differ, a plan has problems), 2 for an error.",
    )
    parser.add_argument("--version", action="version", version=f"qat-compat {__version__}")
    select = argparse.ArgumentParser(add_help=False)
    select.add_argument(
        "--select", metavar="WHICH", help="which weights of the file: ema, model, or a dotted path inside it"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (inspect, convert, diff, plan):
        command.add(commands, select)
    return parser
