"""Every benchmark runs, in its smallest size, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import __main__ as suite
from benchmarks import plots, ways
from benchmarks.harness import fresh
from benchmarks.suites import SUITES
from benchmarks.suites.media import resident
from benchmarks.ways import WAYS


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks") / "tiny.json"
    assert suite.main(["--tiny", "--runs", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(file: Path) -> dict:
    return json.loads(file.read_text())


def test_a_figure_comes_from_a_process_of_its_own() -> None:
    figures = fresh("planning", "100")
    assert figures["seconds"] > 0
    with pytest.raises(RuntimeError, match="no-such-model"):
        fresh("load", "no-such-model", "qat_compat", "nowhere")


def test_every_suite_has_rows_and_says_where(results: dict) -> None:
    assert {row["suite"] for row in results["rows"]} == set(SUITES)
    assert results["machine"]["device"] == "cpu"
    assert all(row["min_s"] > 0 and row["runs"] == 1 for row in results["rows"])


def test_one_suite_goes_beside_the_others_of_the_same_machine(file: Path, results: dict) -> None:
    own = file.with_name("again.json")
    own.write_text(json.dumps({**results, "rows": [{**row, "commit": "before"} for row in results["rows"]]}))
    arguments = ["--tiny", "--runs", "1", "--only", "planning", "--out", str(own)]
    assert suite.main(arguments) == 0
    again = json.loads(own.read_text())
    assert {row["commit"] for row in again["rows"] if row["suite"] != "planning"} == {"before"}
    assert "before" not in {row["commit"] for row in again["rows"] if row["suite"] == "planning"}
    assert len(again["rows"]) == len(results["rows"])
    assert f"(before, {again['machine']['commit']})" in suite.table(again)
    own.write_text(json.dumps({**again, "machine": {**again["machine"], "processor": "another"}}))
    with pytest.raises(SystemExit, match="another machine"):
        suite.main(arguments)


def test_one_model_goes_beside_the_others_of_its_suite(file: Path, results: dict) -> None:
    own = file.with_name("model.json")
    rows = [{**row, "commit": "before"} for row in results["rows"]]
    other = [{**row, "model": "flat-20k"} for row in rows if row["suite"] == "load"]
    own.write_text(json.dumps({**results, "rows": [*rows, *other]}))
    arguments = ["--tiny", "--runs", "1", "--only", "load", "--out", str(own)]
    assert suite.main([*arguments, "--model", "tiny"]) == 0
    again = json.loads(own.read_text())["rows"]
    assert [row for row in again if row["commit"] == "before"] == [
        *other,
        *(row for row in rows if row["suite"] != "load"),
    ]
    assert [row["how"] for row in again[: len(other)]] == [row["how"] for row in other]
    with pytest.raises(SystemExit):
        suite.main([*arguments, "--model", "flat-20k"])
    with pytest.raises(SystemExit):
        suite.main(["--tiny", "--model", "tiny"])


def test_ratios_are_to_a_baseline_of_the_same_run(results: dict) -> None:
    rows = [row for row in results["rows"] if "baseline" in row]
    assert rows
    for row in rows:
        same = {name: row.get(name) for name in ("suite", "model", "medium", "granularity", "dtype")}
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


def test_what_is_drawn_is_what_was_measured(file: Path, results: dict, tmp_path: Path) -> None:
    drawn = {path.name: path.read_text() for path in plots.main(file, tmp_path)}
    assert set(drawn) == {"cpu-tiny.svg", "cpu-planning.svg"}
    rows = [row for row in results["rows"] if row["suite"] == "load"]
    axes = plots.throughput(rows, "tiny").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [row["gb_per_s"] for row in rows]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row["how"] for row in rows]


def test_a_file_whose_pages_are_in_memory_is_told_from_one_that_was_never_read(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(1 << 20))
    assert resident(path) == 1
    with path.open("wb") as file:
        file.truncate(1 << 20)  # a hole: nothing that could be in memory
    assert resident(path) < 1


def _load_file(path: Path, device: str) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in load_file(path).items()}


@pytest.mark.gpu
def test_every_suite_runs_on_a_gpu(tmp_path: Path, accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if accelerator == "late":  # safetensors does not know it
        monkeypatch.setattr(ways, "load_file", _load_file)
    out = tmp_path / "tiny.json"
    try:
        assert suite.main(["--tiny", "--runs", "1", "--device", accelerator, "--out", str(out)]) == 0
    finally:
        suite.use_device("cpu")
    results = json.loads(out.read_text())
    assert results["machine"]["device"] == accelerator and results["machine"]["accelerator"]
    assert {row["suite"] for row in results["rows"]} == set(SUITES)


def test_a_peer_that_is_not_installed_is_not_listed(results: dict) -> None:
    listed = {row["how"] for row in results["rows"] if row["suite"] == "load"}
    assert listed == {name for name, way in WAYS.items() if way.is_available}
