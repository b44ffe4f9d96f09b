"""The plugin as a user meets it: a test file in an empty folder, pytest in a process of its own, with and without
xdist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ("pytester",)
ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "qat_compat.integrations.pytest_plugin"

# One model that passes, one that FX cannot trace, and one whose own flow adds a parameter that no float file has.
USER_FILE = """
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

from qat_compat.testing import QATModel, qat_model


@qat_model(lambda: torch.randn(2, 3, 8, 8), fuse=[["0", "1", "2"]], flows=["eager-x86"])
def stem():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def broken(model):
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model.train())
    model.gain = nn.Parameter(torch.ones(3))
    return model


MORE = [
    QATModel("branches", Branches, torch.ones(2, 4), flows=["fx-x86"]),
    QATModel("extended", Branches, torch.ones(2, 4), flows=[], prepare={"broken": broken}),
]


def test_of_the_usual_kind():
    pass
"""


@pytest.fixture
def user(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytester.makepyfile(test_nets=USER_FILE)
    return pytester


def run(user: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return user.runpytest_subprocess("-p", PLUGIN, "-p", "no:cacheprovider", "-W", "ignore", *arguments)


def cells(user: pytest.Pytester, name: str) -> list[dict[str, Any]]:
    found = json.loads((user.path / name).read_text(encoding="utf-8"))["cells"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def test_one_test_per_cell_and_what_became_of_it(user: pytest.Pytester) -> None:
    reports = [f"--qat-matrix-report=out/matrix.{kind}" for kind in ("md", "html", "json")]
    result = run(user, "-rs", *reports)
    rows = cells(user, "out/matrix.json")
    kinds = {
        name: {row["outcome"] for row in rows if row["model"] == name} for name in ("stem", "branches", "extended")
    }
    assert kinds["branches"] == {"not applicable"}
    assert "failed" in kinds["extended"]
    assert kinds["stem"] >= {"passed"} and "failed" not in kinds["stem"]
    counted = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("passed", "failed", "not applicable")}
    unsupported = len(rows) - sum(counted.values())
    result.assert_outcomes(
        passed=counted["passed"] + 1, failed=counted["failed"], skipped=counted["not applicable"], xfailed=unsupported
    )
    said = result.stdout.str()
    # the plan's problems, and no stack of internals
    assert "missing      gain: float32[3] is not in the source" in said
    assert re.search(r"in the cell\n  model +extended\n  flow +broken", said)
    assert "Traceback" not in said and "site-packages" not in said and "api.py" not in said
    assert "symbolically traced variables cannot be used as inputs to control flow" in said
    assert f"small: {len(rows)} cells for" in said

    table = (user.path / "out/matrix.md").read_text(encoding="utf-8")
    assert re.search(r"^\| stem \| ✓ \d", table, re.MULTILINE) and re.search(r"^\| extended .*✗", table, re.MULTILINE)
    assert "torch 2." in table and "[^1]: failed: missing gain" in table
    page = (user.path / "out/matrix.html").read_text(encoding="utf-8")
    assert page.count('<th scope="row">') == 3 and 'class="failed"' in page and "missing gain" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "the page needs nothing but itself"


def test_workers_of_xdist_report_the_same(user: pytest.Pytester) -> None:
    run(user, "--qat-matrix-report=one.json")
    said = run(user, "-n", "2", "--qat-matrix-report=two.json").stdout.str()
    assert cells(user, "one.json") == cells(user, "two.json")
    assert f"small: {len(cells(user, 'one.json'))} cells for" in said


def test_filters(user: pytest.Pytester) -> None:
    result = run(user, "-k", "stem and load", "--qat-matrix-report=k.json")
    assert {(row["model"], row["direction"]) for row in cells(user, "k.json")} == {("stem", "load")}
    assert re.search(r"small: \d of \d+ cells", result.stdout.str())
    only = ["--qat-matrix-only", "direction=back,resume", "--qat-matrix-only", "dtype=fp32"]
    run(user, *only, "--qat-matrix=full", "--qat-matrix-report=only.json")
    rows = cells(user, "only.json")
    assert {row["direction"] for row in rows} == {"back", "resume"} and {row["dtype"] for row in rows} == {"fp32"}
    assert len({row["container"] for row in rows if row["model"] == "stem"}) > 5


def test_what_is_not_supported_never_passes(user: pytest.Pytester) -> None:
    """`--runxfail` turns an expected failure into a pass; here it must become a failure."""
    arguments = ["-k", "stem", "--qat-matrix-only", "direction=converted", "--qat-matrix-report=x.json", "--runxfail"]
    result = run(user, *arguments)
    unsupported = sum(row["outcome"] == "not supported" for row in cells(user, "x.json"))
    result.assert_outcomes(failed=unsupported, passed=len(cells(user, "x.json")) - unsupported)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--qat-matrix-report=matrix.pdf", "the name must end in one of .md .html .json"),
        ("--qat-matrix-only=flow", "expected AXIS=GLOB"),
        ("--qat-matrix-only=colour=red", "no such axis: colour"),
    ],
)
def test_wrong_options_are_said(user: pytest.Pytester, argument: str, text: str) -> None:
    result = run(user, argument)
    assert result.ret != 0
    assert text in result.stdout.str() + result.stderr.str()


def test_two_models_of_one_name(user: pytest.Pytester) -> None:
    user.makepyfile(test_nets=USER_FILE.replace('"extended"', '"branches"'))
    assert "two models of this file have one name: branches" in run(user).stdout.str()


def test_a_plain_run_imports_nothing_heavy(user: pytest.Pytester) -> None:
    """With the plugin found as an installed one: by its entry point."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = user.mkdir("probe-1.0.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["pytest11"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    user.makepyfile(
        test_nets="""
        import sys

        def test_light(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("qat_compat.integrations.pytest_plugin")
            assert {"torch", "numpy", "safetensors", "torchao"}.isdisjoint(sys.modules)
        """
    )
    user.syspathinsert(user.path)
    path = f"{user.path}:{ROOT}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        result = user.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
