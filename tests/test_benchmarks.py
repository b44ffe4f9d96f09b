"""Every benchmark runs, in its smallest size, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as suite


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("benchmarks") / "tiny.json"
    assert suite.main(["--tiny", "--runs", "1", "--out", str(out)]) == 0
    return json.loads(Path(out).read_text())


def test_every_suite_has_rows_and_says_where(results: dict) -> None:
    assert {row["suite"] for row in results["rows"]} == {"load", "ranges", "planning"}
    assert results["machine"]["device"] == "cpu"
    assert all(row["median_s"] > 0 for row in results["rows"])


def test_ratios_are_to_a_baseline_of_the_same_run(results: dict) -> None:
    rows = {row["how"]: row for row in results["rows"] if row["suite"] == "load"}
    for row in rows.values():
        if row["how"] != "floor":
            assert row["speedup"] == pytest.approx(rows[row["baseline"]]["median_s"] / row["median_s"])
            assert row["share_of_floor"] == pytest.approx(rows["floor"]["median_s"] / row["median_s"])


def test_the_table_holds_every_candidate(results: dict) -> None:
    table = suite.table(results)
    for row in results["rows"]:
        if row["suite"] != "planning" and row["how"] != "floor":
            assert row["how"] in table
