"""Plans are data: stable, printable on a screen, made without reading a tensor, in linear time."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import prepare_for
from test_apply import CASES, prepared, untouched
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from zoo import ARCHS

import qat_compat as qc
from qat_compat.errors import Problem, ProblemKind
from qat_compat.join import join
from qat_compat.match import match
from qat_compat.plan import Copy, Derive, Drop, How, Keep, Plan, Synthesize
from qat_compat.schema import Entry, Role, Schema, Spec

PLAN = Plan(
    (
        Copy("fc.weight", "module.fc.weight", "wrapper prefix"),
        Derive("q.scale", ("q.min", "q.max"), "from min/max of the source"),
        Synthesize("w.scale", "w", How.WEIGHTS, "other granularity"),
        Synthesize("a.scale", "a", How.CALIBRATION),
        Keep("head.weight", "asked for by keep="),
        Drop("old.weight", "asked for by drop="),
    ),
    (Problem(ProblemKind.MISSING, "b", "not there"),),
    ("a warning",),
    "file.pt",
    "Net (torch_ao)",
)


def test_the_text_names_every_step_reason_warning_and_problem() -> None:
    assert str(PLAN).splitlines() == [
        "plan: file.pt -> Net (torch_ao)",
        "  copy          1  wrapper prefix: module.fc.weight -> fc.weight",
        "                    fc.weight",
        "  derive        1  from min/max of the source",
        "                    q.scale",
        "  synthesize    1  from weights: other granularity",
        "                    w.scale",
        "  synthesize    1  from calibration",
        "                    a.scale",
        "  keep          1  asked for by keep=",
        "                    head.weight",
        "  drop          1  asked for by drop=",
        "                    old.weight",
        "  warning: a warning",
        "  problem: missing      b: not there",
    ]


def test_json_is_plain_complete_and_stable() -> None:
    data = json.loads(PLAN.to_json())
    assert data["steps"][1] == {
        "step": "derive", "key": "q.scale", "sources": ["q.min", "q.max"], "how": "from min/max of the source",
        "value": "", "terms": [],
    }  # fmt: skip
    assert data["steps"][2]["how"] == "weights"
    assert data["problems"] == [{"kind": "missing", "key": "b", "detail": "not there", "remedy": ""}]
    assert data["warnings"] == ["a warning"]
    assert not PLAN.ok
    arch = ARCHS["plain"]
    texts = {
        qc.plan_load(prepared("eager-x86", "plain"), arch.state(), calibration=arch.batches()).to_json()
        for _ in range(2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize("calibration", ["batches", "defer", None])
def test_planning_reads_no_tensor_and_changes_nothing(flow: str, name: str, calibration: str | None) -> None:
    arch, model = ARCHS[name], prepared(flow, name)
    specs = {key: Spec(tuple(value.shape), value.dtype) for key, value in arch.state().items()}

    def read(key: str) -> Tensor:
        raise AssertionError(f"{key} was read")

    checkpoint = qc.Checkpoint(specs, read, name="<unreadable>")
    data = arch.batches() if calibration == "batches" else calibration
    with untouched(model):
        plan = qc.plan_load(model, checkpoint, calibration=data)
    assert plan.ok == (calibration is not None)
    assert plan.source == "<unreadable>"
    if calibration is None:
        assert {problem.kind.value for problem in plan.problems} == {"uncalibrated"}


def test_planning_does_not_run_the_model_or_use_up_the_data() -> None:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    data = iter(arch.batches())
    qc.plan_load(model, arch.state(), calibration=data)
    assert len(list(data)) == 2


def test_planning_where_a_batch_must_be_looked_at_does_not_use_it_up() -> None:
    """Names that only a forward tells: a dry run with a generator must leave the generator for the load."""
    arch, model = ARCHS["dynamic"], prepared("eager-x86", "dynamic")
    data = iter(arch.batches())
    with untouched(model):
        qc.plan_load(model, arch.state(), calibration=data)
    assert len(list(data)) == 2


# --- a screen ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(8, 8) for _ in range(4))
        self.intermediate, self.output = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(self.query(x) * self.key(x) + self.value(x))
        return self.norm(self.output(self.intermediate(x)))


class Bert(nn.Module):
    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(20, 8)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(layers))
        self.pooler = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.pooler(x)


def _bert() -> nn.Module:
    model = Bert().train()
    qconfig = get_default_qat_qconfig("x86")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.qconfig = qconfig
    return prepare_qat(model)


@pytest.mark.parametrize("state", ["complete", "a layer is missing", "wrapped"])
def test_twelve_layers_fit_a_screen(state: str) -> None:
    model, source = _bert(), dict(Bert().state_dict())
    if state == "wrapped":
        source = {f"module.{key}": value for key, value in source.items()}
    elif state != "complete":
        source = {key: value for key, value in source.items() if ".layer.7." not in key}
    plan = qc.plan_load(model, source, calibration=[torch.zeros(1, 2, dtype=torch.long)])
    text = str(plan)
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 240
    if state == "a layer is missing":
        assert "problem: missing      14 keys, such as encoder.layer.7.dense.bias: " in text
        assert lines[-1].strip() == "encoder.layer.7.{dense,intermediate,key,norm,output,query,value}.{bias,weight}"
    else:
        assert "encoder.layer.{0...11}" in text
        assert ".layer.3." not in text


def _words(count: int) -> list[str]:
    return ["".join(letters) for letters in itertools.islice(itertools.product("abcdefghij", repeat=3), count)]


def test_the_error_of_many_problems_is_short_and_complete() -> None:
    problems = [Problem(ProblemKind.MISSING, f"k{i:03}", f"gone {word}", "find") for i, word in enumerate(_words(100))]
    error = qc.PlanError(list(reversed(problems)), file="model.pt")
    lines = str(error).splitlines()
    assert lines[0] == "source and target cannot be joined: 100 problems"
    assert lines[1] == "  file:     model.pt"
    assert lines[2] == "  missing      k000: gone aaa; find"
    assert lines[-1] == "  ... and 60 more, all in `.problems`"
    assert len(lines) == 43
    assert error.problems == tuple(problems)


def test_like_problems_are_told_once_and_listed_whole() -> None:
    def sized(key: str, rows: int) -> Problem:
        detail = f"expected float32[{rows}], found float32[{rows}, 1] (old.{key})"
        return Problem(ProblemKind.MISMATCHED, key, detail, f"keep={key!r} leaves the model's own value")

    names = [f"model.{i}.{layer}.weight" for i in range(8) for layer in ("bn", "conv")]
    alike = [sized(key, rows) for rows, key in enumerate(names)]
    others = [
        Problem(ProblemKind.MISMATCHED, "model.0.act", "expected float32[1], found int8[1]", "convert it"),
        Problem(ProblemKind.MISSING, "model.3.bn.bias", alike[0].detail, alike[0].remedy),  # of another kind
        Problem(ProblemKind.MISSING, "model.4.bn.bias", "gone"),  # two that are alike stay two
        Problem(ProblemKind.MISSING, "model.5.bn.bias", "gone"),
    ]
    error = qc.PlanError([*others, *alike])
    text = [
        "mismatched   model.0.act: expected float32[1], found int8[1]; convert it",
        "mismatched   16 keys, such as model.0.bn.weight: expected float32[0], found float32[0, 1]"
        " (old.model.0.bn.weight); keep='model.0.bn.weight' leaves the model's own value",
        "                 model.{0...7}.{bn,conv}.weight",
        f"missing      model.3.bn.bias: {others[1].text}",
        "missing      model.4.bn.bias: gone",
        "missing      model.5.bn.bias: gone",
    ]
    assert str(error).splitlines() == ["source and target cannot be joined: 20 problems", *(f"  {t}" for t in text)]
    assert set(error.problems) == {*others, *alike}
    prefixed = [f"  {'' if line.startswith(' ') else 'problem: '}{line}" for line in text]
    assert str(Plan((), error.problems)).splitlines()[1:] == prefixed
    assert str(qc.PlanError(alike[:1])).count("such as") == 0


def test_the_count_of_what_is_not_shown_is_of_problems() -> None:
    alike = [Problem(ProblemKind.MISSING, f"layer.{i}.w", "gone") for i in range(50)]
    first = [Problem(ProblemKind.INVALID, word, f"odd: {word}{word}") for word in _words(45)]
    assert str(qc.PlanError([*alike, *first])).splitlines()[-1] == "  ... and 55 more, all in `.problems`"


# --- time -------------------------------------------------------------------------------------------------------------


def _entries(count: int, prefix: str = "", missing: int = 0) -> Schema:
    keys = [f"{prefix}layers.{i // 4}.part{i % 4}.weight" for i in range(count - missing)]
    return Schema({key: Entry(key.removeprefix(prefix), Role.PARAMETER, (2,), torch.float32) for key in keys})


def _quantized_file(count: int) -> Schema:
    entries: dict[str, Entry] = {}
    for i in range(count // 5):
        entries[f"layers.{i}.weight"] = Entry(f"layers.{i}.weight", Role.PARAMETER, (2,), torch.float32)
        for leaf, role in (
            ("scale", Role.SCALE),
            ("zero_point", Role.ZERO_POINT),
            ("min_val", Role.MIN),
            ("max_val", Role.MAX),
        ):
            name = f"layers.{i}.weight_fake_quant"
            entries[f"{name}.{leaf}"] = Entry(f"weight:layers.{i}", role, (2,), torch.float32, name, leaf)
    return Schema(entries, "torch_ao")


_SIDES: dict[str, Callable[[int], tuple[Schema, Schema]]] = {
    "equal": lambda n: (_entries(n), _entries(n)),
    "wrapped": lambda n: (_entries(n, "module."), _entries(n)),
    "half of it missing": lambda n: (_entries(n, missing=n // 2), _entries(n)),
    "half of it too much": lambda n: (_entries(n), _entries(n, missing=n // 2)),
    "nothing in common": lambda n: (_entries(n, "a.b."), _entries(n, "x.", missing=1)),
    "quantizers that nobody takes": lambda n: (_quantized_file(n), _entries(n)),
}  # fmt: skip


def _calls(work: Callable[[], object]) -> int:
    """How many functions, Python's and C's, a piece of work calls: the same on every machine and at every load."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("case", _SIDES)
def test_planning_is_linear(case: str) -> None:
    """Four times the keys take four times the calls."""

    def calls(size: int) -> int:
        source, target = _SIDES[case](size)
        return _calls(lambda: join(source, target, match(source, target)))

    small, large = calls(500), calls(2_000)
    assert large <= 4.2 * small, (small, large)


class _Noting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.note = nn.Parameter(torch.zeros(1)), 0

    def get_extra_state(self) -> int:
        return self.note

    def set_extra_state(self, state: int) -> None:
        self.note = state


def test_extra_state_is_linear() -> None:
    def calls(count: int) -> int:
        model, state = (nn.ModuleList(_Noting() for _ in range(count)) for _ in range(2))
        return _calls(lambda: qc.load_checkpoint(model, state.state_dict()))

    small, large = calls(100), calls(400)
    assert large <= 4.3 * small, (small, large)


def test_keeping_what_is_fused_is_linear() -> None:
    """Four times the blocks, of which all are kept."""

    def calls(count: int) -> int:
        blocks = [nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(count)]
        model = fuse_modules_qat(nn.Sequential(*blocks).train(), [[f"{i}.0", f"{i}.1"] for i in range(count)])
        model.qconfig = get_default_qat_qconfig("x86")
        model = prepare_qat(model)
        return _calls(lambda: qc.plan_load(model, {"x": torch.zeros(1)}, keep="*", drop="x", calibration="defer"))

    small, large = calls(20), calls(80)
    assert large <= 4.5 * small, (small, large)


def test_planning_a_live_model_end_to_end_is_linear() -> None:
    def calls(count: int) -> int:
        model = nn.Module()
        model.layers = nn.ModuleList(nn.ParameterDict({n: torch.zeros(1) for n in "abcdefgh"}) for _ in range(count))
        state: dict[str, Any] = {f"module.{key}": value for key, value in model.state_dict().items()}
        plans: list[Plan] = []
        found = _calls(lambda: plans.append(qc.plan_load(model, state)))
        assert plans[0].copied == 8 * count
        return found + _calls(lambda: str(plans[0]))

    small, large = calls(100), calls(400)
    assert large <= 4.3 * small, (small, large)


def test_a_plan_of_a_prepared_model_is_the_same_for_a_copy_of_it() -> None:
    arch = ARCHS["residual"]
    plans = [
        qc.plan_load(prepare_for("eager-x86", "residual")(arch.make()), arch.state(), calibration="defer") for _ in "ab"
    ]
    assert plans[0] == plans[1]
    assert hash(plans[0].steps[0]) == hash(plans[1].steps[0])
