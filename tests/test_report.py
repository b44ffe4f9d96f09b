"""The report: text, JSON and a page, all of the same facts."""

from __future__ import annotations

import copy
import html
import json
import pickle
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_apply import prepared
from torch import nn
from zoo import ARCHS

import qat_compat as qc


def _report() -> qc.Report:
    arch = ARCHS["plain"]
    source = {f"module.{key}": value for key, value in arch.state().items()}
    source["ema.decay"] = torch.ones(1)
    model = prepared("eager-x86", "plain")
    return qc.load_checkpoint(model, {"state_dict": source}, calibration=arch.batches(), drop="*ema.decay")


def test_counts_are_those_of_the_steps() -> None:
    report = _report()
    counts = {"copied": "copy", "derived": "derive", "synthesized": "synthesize", "kept": "keep", "dropped": "drop"}
    kinds = [type(step).__name__.lower() for step in report.steps]
    assert {name: getattr(report, name) for name in counts} == {n: kinds.count(kind) for n, kind in counts.items()}
    assert report.copied == len(ARCHS["plain"].state())
    assert report.dropped == 1
    assert report.batches == 2
    assert report.problems == ()


def test_every_key_has_a_provenance() -> None:
    report = _report()
    assert report.provenance("fc.weight") == "copy of module.fc.weight: wrapper prefix"
    assert report.provenance("fc.weight_fake_quant.scale") == "synthesize: from weights"
    assert report.provenance("fc.activation_post_process.scale") == "synthesize: from calibration"
    assert report.provenance("fc.activation_post_process.observer_enabled").startswith("keep: a setting")
    assert report.provenance("ema.decay") == "drop: asked for by drop="
    with pytest.raises(KeyError):
        report.provenance("no.such.key")


def test_json_holds_everything_and_reads_back() -> None:
    report = _report()
    data = json.loads(report.to_json())
    assert data["counts"]["copied"] == report.copied
    assert [step["key"] for step in data["steps"]] == [step.key for step in report.steps]
    assert data["batches"] == 2
    assert data["seconds"] > 0
    assert json.loads(report.to_json(indent=None)) == data


class _Page(HTMLParser):
    _VOID = frozenset({"meta", "br", "wbr", "hr", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self._VOID:
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    report = _report()
    path = report.to_html(tmp_path / "report.html")
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open in ([], ["html"])
    assert page.loaded == []
    text = "".join(page.text)
    assert "wrapper prefix" in text
    assert str(report.copied) in text


def test_names_from_a_file_cannot_put_markup_into_the_page(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.zeros(1)))
    report = qc.load_checkpoint(model, {name: torch.ones(1)})
    text = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert html.escape(name) in text


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(qc.SaveError, match="cannot be written") as caught:
        _report().to_html(tmp_path / "missing" / "report.html")
    assert caught.value.file is not None


def test_the_text_says_what_was_done_and_what_was_lost() -> None:
    model = nn.Linear(2, 1).half()
    report = qc.load_checkpoint(model, {"weight": torch.tensor([[1 / 3, 1]]), "bias": torch.zeros(1)})
    text = str(report)
    assert "weight: 1 of 2 values rounded from float32 to float16" in text
    assert "exact key" in text


def test_equal_loads_give_equal_reports_but_for_the_time() -> None:
    first, second = (json.loads(_report().to_json()) for _ in range(2))
    for data in (first, second):
        del data["seconds"]
    assert first == second


def test_control_characters_in_a_key_do_not_reach_the_terminal_or_forge_a_line(tmp_path: Path) -> None:
    odd = "\x1b[31mred\n  remedy:   none\udc80.weight"
    model, state = nn.Linear(1, 1), {"weight": torch.ones(1, 1), "bias": torch.ones(1), odd: torch.ones(1)}
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, state)
    report = qc.load_checkpoint(model, state, drop="*red*")
    error = qc.CompatError("no such key", key=odd, found="two\nlines")
    for text in (str(caught.value), str(caught.value.problems[0]), str(report.plan), str(report), str(error)):
        assert "\\x1b[31mred\\n  remedy:   none\\udc80.weight" in text
        assert "\x1b" not in text and "\n  remedy:   none" not in text
    assert str(error).endswith("two\nlines")
    assert caught.value.problems[0].key == odd
    page = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8").replace("<wbr>", "")
    assert "\\x1b[31mred" in page


def test_an_error_with_problems_goes_from_process_to_process() -> None:
    problem = qc.Problem(qc.ProblemKind.MISSING, "fc.bias", "not in the file", "pass keep=")
    error = qc.PlanError([problem], file="a.pt", summary="of my own words")
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(same) is qc.PlanError
        assert (str(same), same.problems, same.file) == (str(error), (problem,), "a.pt")


def test_a_pattern_that_matches_nothing_is_said() -> None:
    state = {f"enc.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()}
    report = qc.load_checkpoint(nn.Linear(2, 2), state, rename=[(r"^enc\.", ""), (r"^haed", "")])
    assert report.warnings == ("rename= '^haed' matches no key of the source",)
    with pytest.raises(qc.PlanError, match=r"\^haed: rename= matches no key of the source; check its spelling"):
        qc.load_checkpoint(nn.Linear(2, 3), state, rename=[(r"^enc\.", ""), (r"^haed", "")])
