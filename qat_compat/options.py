"""The options of a load: their types, their defaults, and what is wrong with a value that means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal, TypedDict

import torch
from torch import nn

from qat_compat.calibration import Calibration, check_statistic
from qat_compat.driving import Data, Inputs, check_data
from qat_compat.errors import CompatError
from qat_compat.names import Rename

__all__ = [
    "CalibrationLike",
    "Globs",
    "LoadOptions",
    "Options",
    "calibration_of",
    "check_options",
    "device_of",
    "globs_of",
]

CalibrationLike = Data | Calibration | str | PathLike[str] | Literal["defer"] | None
Globs = str | Sequence[str]


@dataclass(frozen=True)
class Options:
    """The options of `load_checkpoint`, with the same names and defaults."""

    calibration: CalibrationLike = None
    inputs: Inputs | None = None
    select: str | None = None
    float_model: nn.Module | None = None
    rename: Rename = ()
    keep: Globs = ()
    drop: Globs = ()
    statistic: str = "native"
    inplace: bool = False
    mmap: bool = False
    device: torch.device | str | None = None
    progress: bool | None = None


class LoadOptions(TypedDict, total=False):
    """The same as keywords, for those who check their types."""

    calibration: CalibrationLike
    inputs: Inputs | None
    select: str | None
    float_model: nn.Module | None
    rename: Rename
    keep: Globs
    drop: Globs
    statistic: str
    inplace: bool
    mmap: bool
    device: torch.device | str | None
    progress: bool | None


def globs_of(value: Globs) -> Sequence[str]:
    return (value,) if isinstance(value, str) else tuple(value)


def device_of(value: torch.device | str | None) -> torch.device | None:
    try:
        return None if value is None else torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise CompatError(f"no such device: {error}", key="device", found=repr(value)) from error


def check_options(model: object, options: Options) -> None:
    """Say which argument is not what it should be, before anything else happens."""
    check_statistic(options.statistic)
    rows: list[tuple[str, object, bool, str]] = [
        ("model", model, isinstance(model, nn.Module), "a module (load_checkpoint(model, source))"),
        (
            "float_model",
            options.float_model,
            options.float_model is None or isinstance(options.float_model, nn.Module),
            "the unprepared module",
        ),
        ("inputs", options.inputs, options.inputs is None or callable(options.inputs), "callable(batch)"),
        ("select", options.select, options.select is None or isinstance(options.select, str), "a dotted path"),
    ]
    for name in ("keep", "drop"):
        value = getattr(options, name)
        fine = isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(v, str) for v in value))
        rows.append((name, value, fine, "a glob or a list of globs"))
    pairs = options.rename
    fine = isinstance(pairs, Sequence) and not isinstance(pairs, str)
    fine = fine and all(isinstance(pair, (tuple, list)) and list(map(type, pair)) == [str, str] for pair in pairs)
    rows.append(("rename", pairs, fine, "a list of (pattern, replacement) pairs"))
    for name, value, fine, expected in rows:
        if not fine:
            raise CompatError(f"{name} is not what it should be", key=name, expected=expected, found=repr(value)[:80])


def calibration_of(value: CalibrationLike) -> tuple[Data | None, Calibration | None, str]:
    """Batches or callable, saved calibration, and the word that the plan uses."""
    if value is None:
        return None, None, "none"
    if isinstance(value, str) and value == "defer":
        return None, None, "defer"
    if isinstance(value, (str, PathLike)):
        value = Calibration.load(value)
    if isinstance(value, Calibration):
        return None, value, "record"
    check_data(
        value, "calibration", "an iterable of batches, a callable(model), a Calibration, its path, 'defer' or None"
    )
    return value, None, "batches"
