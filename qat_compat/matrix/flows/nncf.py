"""NNCF: `nncf.quantize`, which prepares and calibrates in one step, without bias correction.

NNCF compiles its kernels, once per machine and for a minute or more; where the environment names a compiler that does
not work (`CXX=false`), it does without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn

from qat_compat.matrix.flows.base import PER_CHANNEL, Flow, NotApplicable
from qat_compat.testing import QATModel
from qat_compat.testing.modes import Inputs

__all__ = ["FLOWS"]


def _prepare(model: nn.Module, declared: QATModel) -> nn.Module:
    """Calibrated with the declaration's own batches, without what changes weights: smoothing, correction of biases."""
    import nncf

    _compile_kernels()

    def arguments(batch: Any) -> Any:
        args, kwargs = declared.arguments(model, batch)
        if args and kwargs:
            raise NotApplicable("a data set of NNCF holds positional or keyword arguments, not both")
        return kwargs or args

    batches = declared.batches()
    skipped = [f"{re.escape(name.replace('.', ':'))}[:/].*" for name in declared.skip]
    prepared: nn.Module = nncf.quantize(
        model.eval(),
        nncf.Dataset(batches, arguments),
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(patterns=skipped) if skipped else None,
        model_type=nncf.ModelType.TRANSFORMER,  # else masks are quantized, whose -inf makes every output NaN
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True, smooth_quant_alpha=-1.0),
    )
    return prepared.train()


@cache
def _compile_kernels() -> None:
    """Left to the first forward, they must be ready within a time that not every machine keeps."""
    from nncf.torch import force_build_cpu_extensions

    force_build_cpu_extensions()


def _calibrated_already(model: nn.Module, batches: Iterable[Any], inputs: Inputs | None) -> None:
    """Preparing has done it."""


FLOWS = (Flow("nncf", "NNCF", {PER_CHANNEL: _prepare}, needs=("nncf",), calibrate=_calibrated_already),)
