"""What a row of the table of flows holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat_compat.testing import QATModel, native_calibration
from qat_compat.testing.modes import Inputs

__all__ = ["PER_CHANNEL", "PER_GROUP", "PER_TENSOR", "Flow", "NotApplicable"]

PER_TENSOR, PER_CHANNEL, PER_GROUP = "per_tensor", "per_channel", "per_group"

Prepare = Callable[[nn.Module, QATModel], nn.Module]
Calibrate = Callable[[nn.Module, Iterable[Any], Inputs | None], None]


class NotApplicable(Exception):
    """There is nothing in this model that the flow could quantize."""


@dataclass(frozen=True)
class Flow:
    """One way to prepare a model for QAT.

    Args:
        name: Its name in test ids and reports.
        framework: The framework in a reader's words; neighbours with the same stand together in a report.
        prepare: Granularity of the weight quantizers -> float model and its declaration -> prepared model.
        convert: Prepared and calibrated model -> the model of integers, where the framework has one.
        needs: Packages without which the flow is not there.
        calibrate: The framework's own calibration.
        hidden: Whether it keeps quantizer state that its state_dict does not hold.
    """

    name: str
    framework: str
    prepare: Mapping[str, Prepare]
    convert: Callable[[nn.Module, QATModel, str], nn.Module] | None = None
    needs: tuple[str, ...] = ()
    calibrate: Calibrate = native_calibration
    hidden: bool = False

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]
