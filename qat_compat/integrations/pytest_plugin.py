"""The compatibility matrix as a pytest plugin: a model that a test file declares becomes one test per cell.

Example, in a test file::

    import torch
    from qat_compat.testing import qat_model


    @qat_model(lambda: torch.randn(2, 3, 32, 32), fuse=[["conv", "bn", "relu"]])
    def small_net():
        return SmallNet()

`pytest` runs the small matrix of it; `pytest --qat-matrix=full --qat-matrix-report=matrix.html` all pairs. Every pytest
run on a machine that has this package imports this file, so that it imports nothing but pytest until a model is met.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qat_compat.integrations.pytest_cells import ModelNode
    from qat_compat.testing import QATModel

SIZES = ("small", "full")
REPORTS = (".md", ".html", ".json")
# Under this name the result of a cell travels in its test report, from a worker of xdist too.
PROPERTY = "qat_matrix"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qat_compat", "compatibility matrix of QAT models")
    group.addoption(
        "--qat-matrix",
        choices=SIZES,
        default="small",
        help="cells of the declared models: every flow in every direction (small, the default), or every pair of "
        "values of two axes (full)",
    )
    group.addoption(
        "--qat-matrix-only",
        action="append",
        default=[],
        metavar="AXIS=GLOB[,GLOB...]",
        help="keep these values of an axis, and make the cells for them alone: --qat-matrix-only 'flow=fx-*'",
    )
    group.addoption(
        "--qat-matrix-report",
        action="append",
        default=[],
        metavar="PATH",
        help="write the results to a .md, .html or .json file; may be given several times",
    )


def pytest_configure(config: pytest.Config) -> None:
    for path in config.getoption("qat_matrix_report"):
        if Path(path).suffix not in REPORTS:
            raise pytest.UsageError(f"--qat-matrix-report={path}: the name must end in one of {' '.join(REPORTS)}")
    for text in config.getoption("qat_matrix_only"):
        if "=" not in text:
            raise pytest.UsageError(f"--qat-matrix-only={text}: expected AXIS=GLOB[,GLOB...]")
    config.pluginmanager.register(MatrixSession(config), "qat_matrix_session")


class MatrixSession:
    """What one process knows of the matrix: of its own tests, and in xdist's controller of every worker's."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rows: list[dict[str, Any]] = []
        self.designs: dict[str, dict[str, Any]] = {}

    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str, obj: object) -> list[ModelNode] | None:
        models = _declared(obj)
        if not models or not isinstance(collector, pytest.Module):
            return None
        from qat_compat.integrations.pytest_cells import nodes_of

        everything = [model for value in vars(collector.obj).values() for model in _declared(value)]
        nodes, self.designs[collector.nodeid] = nodes_of(collector, models, everything)
        return nodes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [json.loads(str(value)) for name, value in report.user_properties if name == PROPERTY]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        self.designs.update(json.loads(getattr(node, "workeroutput", {}).get(PROPERTY, "{}")))

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput[PROPERTY] = json.dumps(self.designs)
        elif self.rows:
            from qat_compat.matrix.report import write_report

            for path in self.config.getoption("qat_matrix_report"):
                write_report(self.results(), Path(path))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.rows:
            from qat_compat.matrix.report import summary

            terminalreporter.section("QAT compatibility matrix")
            for line in summary(self.results()):
                terminalreporter.line(line)
            for path in self.config.getoption("qat_matrix_report"):
                terminalreporter.line(f"written: {path}")

    def results(self) -> dict[str, Any]:
        from qat_compat.matrix.report import results

        return results(self.rows, list(self.designs.values()), self.config.getoption("qat_matrix"))


def _declared(obj: object) -> list[QATModel]:
    """The models that an object of a test file is, or holds."""
    home = sys.modules.get("qat_compat.testing.models")
    if home is None:  # whoever declares one has imported it
        return []
    found: list[Any] = list(obj) if isinstance(obj, (list, tuple)) else [obj]
    return found if all(isinstance(one, home.QATModel) for one in found) else []
