"""Any float checkpoint onto any QAT-prepared PyTorch model, and back."""

from __future__ import annotations

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
