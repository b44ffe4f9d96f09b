"""The flows of the matrix: one file per framework, one row per flow."""

from __future__ import annotations

from qat_compat.matrix.flows import brevitas, modelopt, nncf, pt2e, torch_ao, torchao
from qat_compat.matrix.flows.base import PER_CHANNEL, PER_GROUP, PER_TENSOR, Flow, NotApplicable

__all__ = ["FLOWS", "PER_CHANNEL", "PER_GROUP", "PER_TENSOR", "Flow", "NotApplicable"]

_FRAMEWORKS = (torch_ao, pt2e, torchao, modelopt, brevitas, nncf)
FLOWS: dict[str, Flow] = {flow.name: flow for framework in _FRAMEWORKS for flow in framework.FLOWS}
