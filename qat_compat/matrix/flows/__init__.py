"""The flows of the matrix: one file per framework, one row per flow."""

from __future__ import annotations

from qat_compat.matrix.flows import pt2e, torch_ao, torchao
from qat_compat.matrix.flows.base import PER_CHANNEL, PER_GROUP, PER_TENSOR, Flow, NotApplicable

__all__ = ["FLOWS", "PER_CHANNEL", "PER_GROUP", "PER_TENSOR", "Flow", "NotApplicable"]

FLOWS: dict[str, Flow] = {flow.name: flow for flow in (*torch_ao.FLOWS, *pt2e.FLOWS, *torchao.FLOWS)}
