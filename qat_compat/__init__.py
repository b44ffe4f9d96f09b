"""Any float checkpoint onto any QAT-prepared PyTorch model, and back."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat_compat.api import (
        calibrate,
        convert_checkpoint,
        load_checkpoint,
        open_checkpoint,
        plan_load,
        save_checkpoint,
        to_float,
    )
    from qat_compat.calibration import Calibration
    from qat_compat.errors import (
        CalibrationError,
        CheckpointError,
        CompatError,
        LimitError,
        PlanError,
        Problem,
        ProblemKind,
        QParamError,
        SaveError,
        UnsafeCheckpointError,
    )
    from qat_compat.plan import Plan
    from qat_compat.report import Report
    from qat_compat.storage import Checkpoint, find_checkpoint

__version__ = "0.1.0"

# Where each public name lives. It is imported when it is first asked for: pytest imports this package in every run of
# whoever has it installed, to find its plugin, and must not wait for torch.
_HOMES = {
    "api": (
        *("calibrate", "convert_checkpoint", "load_checkpoint", "open_checkpoint", "plan_load", "save_checkpoint"),
        "to_float",
    ),
    "calibration": ("Calibration",),
    "errors": (
        *("CalibrationError", "CheckpointError", "CompatError", "LimitError", "PlanError", "Problem", "ProblemKind"),
        *("QParamError", "SaveError", "UnsafeCheckpointError"),
    ),
    "plan": ("Plan",),
    "report": ("Report",),
    "storage": ("Checkpoint", "find_checkpoint"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Calibration",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "CompatError",
    "LimitError",
    "Plan",
    "PlanError",
    "Problem",
    "ProblemKind",
    "QParamError",
    "Report",
    "SaveError",
    "UnsafeCheckpointError",
    "calibrate",
    "convert_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "plan_load",
    "save_checkpoint",
    "to_float",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
