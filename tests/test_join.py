"""One step for every target entry, one reason for every source key; whatever is left is a problem with its remedy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_apply import prepared, untouched
from torch import nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.draft import Goal
from qat_compat.join import join, without
from qat_compat.match import match
from qat_compat.plan import Copy, Drop, Keep, Plan
from qat_compat.schema import Entry, Role, Schema, Stage


def schema(**shapes: tuple[int, ...]) -> Schema:
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return Schema({key: Entry(key, Role.PARAMETER, shape, torch.float32) for key, shape in names.items()})


def _join(source: Schema, target: Schema, **options: object) -> Plan:
    return join(source, target, match(source, target), **options)  # type: ignore[arg-type]


def test_the_text_of_the_main_problems() -> None:
    same = {f"layer{i}__w": (2,) for i in range(9)}
    source = schema(**same, b__w=(3,), extra__w=(1, 2))
    target = schema(**same, b__w=(4,), gone__w=(5,))
    plan = _join(source, target)
    assert [str(problem) for problem in plan.problems] == [
        "mismatched   b.w: expected float32[4], found float32[3]; keep='b.w' leaves the model's own value, or build the"
        " model with the file's size",
        "missing      gone.w: float32[5] is not in the source; rename= maps another name to it, keep='gone.w' leaves"
        " the model's own value",
        "unexpected   extra.w: float32[1, 2] is in the source and the target has no place for it; rename= maps it to"
        " another name, drop='extra.w' ignores it",
    ]


def test_coverage_nought_names_what_there_is_and_the_way_on() -> None:
    plan = _join(schema(encoder__x=(2,)), schema(a__w=(2,), b__w=(3,)))
    (first,) = [problem for problem in plan.problems if problem.key == "<coverage>"]
    assert str(first) == (
        "missing      <coverage>: the source fills 0 of 2 float entries of the target; the source holds names like"
        " encoder.x; choose the weights with select=, or map names with rename="
    )


def test_the_remedies_work() -> None:
    source, target = schema(a__w=(2,), b__w=(3,), extra__w=(1, 2)), schema(a__w=(2,), b__w=(4,), gone__w=(5,))
    kept, ignored = without(source, ["extra.w"])
    plan = join(kept, target, match(kept, target), goal=Goal(keep=("b.w", "gone.w")), ignored=ignored)
    assert plan.ok
    assert [type(step) for step in plan.steps] == [Copy, Keep, Keep, Drop, Drop]


def test_globs_that_name_nothing_are_problems() -> None:
    plan = _join(schema(a__w=(2,)), schema(a__w=(2,)), goal=Goal(keep=("heda.*",)))
    assert [str(p) for p in plan.problems] == [
        "missing      heda.*: keep= names nothing in the target; check its spelling"
    ]
    with pytest.raises(qc.PlanError, match=r"heda\.\*: drop= names nothing in the source; check its spelling"):
        without(schema(a__w=(2,)), ["heda.*"])
    with pytest.raises(qc.PlanError, match=r"aux\.\*: drop= .*; the source's own name is longer: module\.aux\.w$"):
        without(schema(module__a__w=(2,), module__aux__w=(2,)), ["aux.*"])


def test_a_name_that_means_something_else_as_a_glob_is_that_name() -> None:
    model, state = nn.ModuleDict({"[CLS]": nn.Linear(2, 2)}), {"[MASK].w?": torch.ones(2)}
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, state)
    remedies = "".join(problem.remedy for problem in caught.value.problems)
    assert all(f"{option!r}" in remedies for option in ("[MASK].w?", "[CLS].weight", "[CLS].bias"))
    report = qc.load_checkpoint(model, state, drop="[MASK].w?", keep=["[CLS].weight", "[CLS].bias"])
    assert (report.dropped, report.kept) == (1, 2)


def test_a_converted_source_is_refused_for_a_target_that_is_not() -> None:
    source = Schema(schema(a__w=(2,)).entries, stage=Stage.CONVERTED)
    plan = _join(source, schema(a__w=(2,)), names=("int8.pt", "Net"))
    assert [problem.key for problem in plan.problems] == ["int8.pt"]
    assert "converted (integer) checkpoint" in plan.problems[0].detail


_NAMES = st.sampled_from(
    ["a.w", "b.w", "c.w", "module.a.w", "_orig_mod.a.w", "q.weight_fake_quant.scale", "n_averaged"]
)
_SIDE = st.dictionaries(_NAMES, st.sampled_from([(2,), (3,)]), max_size=6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(theirs=_SIDE, mine=_SIDE)
def test_every_key_of_both_sides_has_a_step_or_a_problem(
    theirs: dict[str, tuple[int, ...]], mine: dict[str, tuple[int, ...]]
) -> None:
    source = Schema({key: Entry(key, Role.PARAMETER, shape, torch.float32) for key, shape in theirs.items()})
    target = Schema({key: Entry(key, Role.PARAMETER, shape, torch.float32) for key, shape in mine.items()})
    found = match(source, target)
    plan = join(source, target, found)
    blamed = {problem.key for problem in plan.problems} | found.contested
    filled = {step.key for step in plan.steps if not isinstance(step, Drop)}
    taken = [step.source for step in plan.steps if isinstance(step, Copy)]
    dropped = {step.key for step in plan.steps if isinstance(step, Drop)}
    assert filled <= set(mine)
    assert dropped <= set(theirs)
    assert set(mine) <= filled | blamed
    mismatched = {origin for key, (origin, _) in found.pairs.items() if key in blamed}
    assert set(theirs) <= set(taken) | dropped | blamed | mismatched
    assert len(taken) == len(set(taken))
    if not plan.ok:
        return
    assert len(plan.steps) == len(filled) + len(dropped)


# --- reasons for what is dropped or kept ------------------------------------------------------------------------------


def test_a_non_persistent_buffer_in_the_source_is_dropped_with_its_reason() -> None:
    arch, model = ARCHS["constants"], prepared("eager-x86", "constants")
    state = arch.state()
    state["mask"] = torch.full((4, 1, 1), 9.0)
    report = qc.load_checkpoint(model, state, calibration=arch.batches())
    assert report.provenance("mask") == "drop: the target has it as a non-persistent buffer"
    assert float(model.mask.max()) == 1


def test_the_counter_of_an_averaged_model_is_dropped() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(ARCHS["plain"].make(3))
    model = prepared("eager-x86", "plain")
    report = qc.load_checkpoint(model, averaged.state_dict(), calibration="defer")
    assert report.provenance("n_averaged") == "drop: the counter of an averaged model"
    assert torch.equal(model.fc.weight, averaged.module.fc.weight)


def test_a_file_older_than_the_batch_counter_loads() -> None:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    state = {key: value for key, value in arch.state().items() if not key.endswith("num_batches_tracked")}
    counter = model.conv1.bn.num_batches_tracked.clone()
    report = qc.load_checkpoint(model, state, calibration=arch.batches())
    key = "conv1.bn.num_batches_tracked"
    assert report.provenance(key) == "keep: the file is older than this counter"
    assert torch.equal(model.state_dict()[key], counter)


def test_one_missing_counter_among_others_is_missing() -> None:
    """A file of today's torch that lacks one of them is not an old file."""
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    state = arch.state()
    del state["bn1.num_batches_tracked"]
    with untouched(model), pytest.raises(qc.PlanError, match=r"conv1\.bn\.num_batches_tracked") as caught:
        qc.load_checkpoint(model, state, calibration=arch.batches())
    assert "(looked for as bn1.num_batches_tracked)" in str(caught.value)


# --- keep= ------------------------------------------------------------------------------------------------------------


def test_keep_of_one_of_two_tied_names_keeps_the_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    own = model.embed.weight.detach().clone()
    report = qc.load_checkpoint(model, Tied().state_dict(), keep="head.weight")
    assert torch.equal(model.embed.weight, own) and model.head.weight is model.embed.weight
    assert report.provenance("embed.weight") == "keep: tied to what keep= names"


def test_keep_takes_the_float_models_own_names_for_a_fused_norm() -> None:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    own = model.conv1.bn.weight.detach().clone()
    report = qc.load_checkpoint(model, arch.state(), calibration=arch.batches(), keep="bn1.weight")
    assert torch.equal(model.conv1.bn.weight, own)
    assert report.provenance("conv1.bn.weight") == "keep: asked for by keep="
    assert report.provenance("bn1.weight") == "drop: the target keeps its own value (keep=)"
    factor = own / torch.sqrt(arch.state()["bn1.running_var"] + 1e-5)
    seen = (arch.state()["conv1.weight"] * factor.reshape(-1, 1, 1, 1)).abs().amax((1, 2, 3))
    torch.testing.assert_close(model.conv1.weight_fake_quant.scale, seen / 127.5, rtol=1e-5, atol=0)


def test_keep_does_not_leave_quantizers_uncalibrated() -> None:
    """It speaks of float entries: a fresh head still needs ranges, and without data it asks for them."""
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    state = {key: value for key, value in arch.state().items() if not key.startswith("fc")}
    with untouched(model), pytest.raises(qc.CalibrationError, match=r"fc.*\.activation_post_process"):
        qc.load_checkpoint(model, state, keep="fc.*")


def test_several_globs_and_one_string() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    report = qc.load_checkpoint(model, {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, keep=["1.*", "2.*"])
    assert (report.copied, report.kept) == (2, 4)
    other = qc.load_checkpoint(model, {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, keep="[12].*")
    assert other.plan.steps == report.plan.steps
