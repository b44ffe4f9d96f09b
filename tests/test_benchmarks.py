"""Every benchmark runs, in its smallest size, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks.harness import fresh
from benchmarks.suites import SUITES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("benchmarks") / "tiny.json"
    assert suite.main(["--tiny", "--runs", "1", "--out", str(out)]) == 0
    return json.loads(Path(out).read_text())


def test_a_figure_comes_from_a_process_of_its_own() -> None:
    figures = fresh("planning", "100")
    assert figures["seconds"] > 0
    with pytest.raises(RuntimeError, match="no-such-model"):
        fresh("load", "no-such-model", "qat_compat", "nowhere")


def test_every_suite_has_rows_and_says_where(results: dict) -> None:
    assert {row["suite"] for row in results["rows"]} == set(SUITES)
    assert results["machine"]["device"] == "cpu"
    assert all(row["min_s"] > 0 and row["runs"] == 1 for row in results["rows"])


def test_ratios_are_to_a_baseline_of_the_same_run(results: dict) -> None:
    rows = [row for row in results["rows"] if "baseline" in row]
    assert rows
    for row in rows:
        same = {name: row.get(name) for name in ("suite", "model", "dtype", "width")}
        base = [
            one
            for one in rows
            if one["how"] == row["baseline"] and all(one.get(name) == value for name, value in same.items())
        ]
        assert len(base) == 1
        assert row["speedup"] == pytest.approx(base[0]["median_s"] / row["median_s"])


def test_a_share_is_of_the_floor_of_the_same_process(results: dict) -> None:
    for row in (row for row in results["rows"] if row["suite"] == "load"):
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])


def test_the_table_holds_every_candidate(results: dict) -> None:
    table = suite.table(results)
    for row in results["rows"]:
        assert row.get("how", f"{row.get('keys'):,}" if "keys" in row else "") in table
