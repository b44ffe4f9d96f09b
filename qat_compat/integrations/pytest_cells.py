"""The tests of the matrix: a declared model is a collector, a cell of it is a test."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qat_compat.integrations.pytest_plugin import PROPERTY
from qat_compat.matrix.cases import AXES, Cell
from qat_compat.matrix.directions import DIRECTIONS
from qat_compat.matrix.planning import SIZES, Matrix, plan_matrix
from qat_compat.matrix.report import brief
from qat_compat.matrix.running import FAILED, INAPPLICABLE, UNSUPPORTED, run_cell
from qat_compat.testing import QATModel

__all__ = ["CellTest", "ModelNode", "nodes_of"]

_MATRIX = pytest.StashKey[Matrix]()


class CellFailure(Exception):
    """A cell that did not pass; its text is what the user is shown."""


def nodes_of(
    module: pytest.Module, models: Sequence[QATModel], everything: Sequence[QATModel]
) -> tuple[list[ModelNode], dict[str, Any]]:
    """The collectors of some models of a test file, and the design over all of them."""
    matrix = module.stash.get(_MATRIX, None)
    if matrix is None:
        matrix = module.stash[_MATRIX] = _planned(module, list(dict.fromkeys(everything)))
    nodes = [ModelNode.from_parent(module, name=model.name, declared=model, matrix=matrix) for model in models]
    return nodes, {"covers": SIZES[module.config.getoption("qat_matrix")], **_described(matrix)}


def _planned(module: pytest.Module, models: Sequence[QATModel]) -> Matrix:
    twice = [name for name, count in Counter(model.name for model in models).items() if count > 1]
    if twice:
        raise module.CollectError(f"two models of this file have one name: {', '.join(twice)}")
    only = dict(text.split("=", 1) for text in module.config.getoption("qat_matrix_only"))
    if unknown := set(only) - set(AXES):
        raise pytest.UsageError(f"--qat-matrix-only: no such axis: {', '.join(unknown)}; there are {', '.join(AXES)}")
    globs = {axis: text.split(",") for axis, text in only.items()}
    return plan_matrix(models, module.config.getoption("qat_matrix"), globs)


def _described(matrix: Matrix) -> dict[str, Any]:
    """What a report says of a design."""
    return {
        "axes": {axis: list(values) for axis, values in matrix.design.axes.items()},
        "frameworks": {name: flow.framework for name, flow in matrix.flows.items()},
        "directions": {name: (direction.title, direction.means) for name, direction in DIRECTIONS.items()},
        "absent": dict(matrix.absent),
        "cells": [asdict(cell) for cell in matrix.cells],
        "combinations": matrix.design.product,
        "targets": len(matrix.design.covered),
        "impossible": len(matrix.design.impossible),
    }


class ModelNode(pytest.Collector):
    """A declared model."""

    def __init__(self, *, declared: QATModel, matrix: Matrix, **options: Any) -> None:
        super().__init__(**options)
        self.declared, self.matrix = declared, matrix

    def collect(self) -> Iterator[CellTest]:
        for cell in self.matrix.cells:
            if cell.model == self.declared.name:
                yield CellTest.from_parent(self, name=cell.id, cell=cell)


class CellTest(pytest.Item):
    """A cell of a declared model."""

    parent: ModelNode

    def __init__(self, *, cell: Cell, **options: Any) -> None:
        super().__init__(**options)
        self.cell = cell

    def runtest(self) -> None:
        flow = self.parent.matrix.flows[self.cell.flow]
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_cell(self.cell, self.parent.declared, flow, Path(folder))
        self.user_properties.append((PROPERTY, json.dumps(outcome.as_row(self.cell))))
        # with --runxfail, pytest.xfail() returns, and the cell would count as passed
        if outcome.kind == FAILED or (outcome.kind == UNSUPPORTED and self.config.getoption("runxfail")):
            raise CellFailure(outcome.reason)
        if outcome.kind == UNSUPPORTED:
            pytest.xfail(f"not supported: {brief(outcome.reason)}")
        if outcome.kind == INAPPLICABLE:
            pytest.skip(f"not applicable: {brief(outcome.reason)}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CellFailure):
            rows = [f"  {axis:<12}{value}" for axis, value in asdict(self.cell).items()]
            return "\n".join([str(excinfo.value), "", "in the cell", *rows])
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.parent.name}: {self.name}"
