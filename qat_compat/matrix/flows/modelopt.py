"""NVIDIA ModelOpt: `mtq.quantize` with one of its own configurations, and `mtq.calibrate`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from qat_compat.matrix.flows.base import PER_CHANNEL, Flow
from qat_compat.testing import QATModel
from qat_compat.testing.modes import DefaultInputs, Inputs

__all__ = ["FLOWS"]


def _prepare(model: nn.Module, declared: QATModel, *, config: str) -> nn.Module:
    """With no range yet: a ModelOpt quantizer has none until data has run."""
    import modelopt.torch.quantization as mtq

    chosen = {**copy.deepcopy(getattr(mtq, config)), "algorithm": None}
    prepared: nn.Module = mtq.quantize(model, chosen)
    for name in declared.skip:
        mtq.disable_quantizer(prepared, f"{name}.*")
    return prepared


def _calibrate(model: nn.Module, batches: Iterable[Any], inputs: Inputs | None) -> None:
    import modelopt.torch.quantization as mtq

    def forward_loop(prepared: nn.Module) -> None:
        for batch in batches:
            args, kwargs = (inputs or DefaultInputs(prepared))(batch)
            prepared(*args, **kwargs)

    mtq.calibrate(model, "max", forward_loop)


FLOWS = (
    Flow(
        "modelopt-int8",
        "NVIDIA ModelOpt",
        {PER_CHANNEL: partial(_prepare, config="INT8_DEFAULT_CFG")},
        needs=("modelopt",),
        calibrate=_calibrate,
    ),
)
