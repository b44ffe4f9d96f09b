"""Brevitas: `layerwise_quantize`, which puts its own layers in the place of torch's, and `calibration_mode`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qat_compat.matrix.flows.base import PER_TENSOR, Flow
from qat_compat.testing import QATModel
from qat_compat.testing.modes import DefaultInputs, Inputs, eval_form

__all__ = ["FLOWS"]


def _prepare(model: nn.Module, declared: QATModel) -> nn.Module:
    """With Brevitas' own choice of layers and quantizers; activations have no range until data has run."""
    from brevitas.graph.quantize import layerwise_quantize

    device = next(model.parameters()).device
    # It makes its quantizers on the CPU, and its LSTM takes weights from nowhere else.
    prepared: nn.Module = layerwise_quantize(model.to("cpu"), name_blacklist=list(declared.skip))
    return prepared.to(device)


def _calibrate(model: nn.Module, batches: Iterable[Any], inputs: Inputs | None) -> None:
    from brevitas.graph.calibrate import calibration_mode

    calls = [(inputs or DefaultInputs(model))(batch) for batch in batches]
    with eval_form(model) as form, torch.no_grad():
        with calibration_mode(form):
            for args, kwargs in calls:
                form(*args, **kwargs)
        args, kwargs = calls[0]
        form(*args, **kwargs)  # some thresholds are set in the first forward that quantizes


FLOWS = (Flow("brevitas", "Brevitas", {PER_TENSOR: _prepare}, needs=("brevitas",), calibrate=_calibrate),)
