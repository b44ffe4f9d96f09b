"""Two names are one site only on evidence; what is left is said with all candidates."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qat_compat as qc
from qat_compat.match import match
from qat_compat.names import WRAPPERS, canonical, renamed
from qat_compat.norms import Evidence, resolve_alone
from qat_compat.schema import Entry, Fused, Role, Schema, Stage

FLOAT_KEYS = ("conv1.weight", "bn1.weight", "layers.0.fc.weight", "layers.1.fc.weight", "my_module.w", "head.weight")


def schema(*keys: str, **about: object) -> Schema:
    return Schema({key: Entry(key, Role.PARAMETER, (2,), torch.float32) for key in keys}, **about)  # type: ignore[arg-type]


def pairs(source: Schema, target: Schema, **options: object) -> dict[str, str]:
    found = match(source, target, **options)  # type: ignore[arg-type]
    return {key: origin for key, (origin, _) in found.pairs.items()}


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.module.fc.weight", "fc.weight"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.w", "a.b.w"),
        ("my_module.w", "my_module.w"),
        ("module_list.0.w", "module_list.0.w"),
        ("submodule.w", "submodule.w"),
        ("module", "module"),
        ("fc.model", "fc.model"),
    ],
)
def test_canonical(name: str, expected: str) -> None:
    assert canonical(name) == expected


@st.composite
def _wrapped(draw: st.DrawFn) -> dict[str, str]:
    """Each module path under wrapper segments that are put in at its own places, as wrapping modules does."""
    segments = st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3)
    before: dict[tuple[str, ...], list[str]] = {}
    names: dict[str, str] = {}
    for key in FLOAT_KEYS:
        *modules, leaf = key.split(".")
        parts: list[str] = []
        for depth in range(len(modules) + 1):
            path = tuple(modules[:depth])
            if path not in before:
                before[path] = draw(segments)
            parts += [*modules[depth - 1 : depth], *before[path]] if depth else before[path]
        names[".".join([*parts, leaf])] = key
    return names


@settings(max_examples=150, deadline=None, derandomize=True)
@given(names=_wrapped(), seed=st.integers(0, 99))
def test_wrappers_in_any_nesting_are_a_bijection(names: dict[str, str], seed: int) -> None:
    keys = list(names)
    random.Random(seed).shuffle(keys)
    assert pairs(schema(*keys), schema(*FLOAT_KEYS)) == {key: name for name, key in names.items()}
    assert pairs(schema(*FLOAT_KEYS), schema(*keys)) == names


@settings(max_examples=60, deadline=None, derandomize=True)
@given(theirs=_wrapped(), mine=_wrapped())
def test_wrappers_on_both_sides(theirs: dict[str, str], mine: dict[str, str]) -> None:
    expected = {name: next(other for other, site in theirs.items() if site == key) for name, key in mine.items()}
    assert pairs(schema(*theirs), schema(*mine)) == expected


def test_an_exact_name_is_never_renamed() -> None:
    """`my_module.w` is itself, and so is `module.w` where the target has it."""
    found = match(schema("my_module.w", "module.w"), schema("module.w", "my_module.w"))
    assert found.pairs == {"module.w": ("module.w", "exact key"), "my_module.w": ("my_module.w", "exact key")}
    assert found.problems == []


def test_an_exact_name_wins_over_a_wrapped_one() -> None:
    found = match(schema("w.x", "module.w.x"), schema("w.x"))
    assert found.pairs == {"w.x": ("w.x", "exact key")}


def test_two_names_that_fall_together_are_refused_with_both() -> None:
    found = match(schema("module.fc.w", "_orig_mod.fc.w"), schema("fc.w"))
    assert found.pairs == {}
    (problem,) = found.problems
    assert str(problem) == (
        "ambiguous    fc.w: could be module.fc.w or _orig_mod.fc.w; name the right one with rename=, or drop= the other"
    )
    assert found.contested == {"fc.w", "module.fc.w", "_orig_mod.fc.w"}


def test_one_name_for_two_places_is_refused_with_both() -> None:
    found = match(schema("fc.w"), schema("module.fc.w", "_orig_mod.fc.w"))
    assert found.pairs == {}
    assert {problem.key for problem in found.problems} == {"module.fc.w", "_orig_mod.fc.w"}
    assert all("module.fc.w or _orig_mod.fc.w could all be fc.w" in problem.detail for problem in found.problems)


def test_the_order_of_keys_decides_nothing() -> None:
    keys = ("module.fc.w", "_orig_mod.fc.w", "a.w", "module.b.w")
    results = [
        match(schema(*one), schema(*two))
        for one in itertools.permutations(keys)
        for two in itertools.permutations(("fc.w", "a.w", "b.w"))
    ]
    assert {tuple(sorted(found.pairs.items())) for found in results} == {tuple(sorted(results[0].pairs.items()))}
    assert set(results[0].pairs) == {"a.w", "b.w"}


# --- rename -----------------------------------------------------------------------------------------------------------


def test_rename_pairs_apply_in_order() -> None:
    assert renamed("encoder/fc/w", [("^encoder/", ""), ("/", ".")]) == "fc.w"
    assert renamed("a1", [(r"a(\d)", r"b\1"), ("b", "c")]) == "c1"
    found = match(schema("x.w"), schema("y.w"), rename=[("^x", "y")])
    assert found.pairs == {"y.w": ("x.w", "rename=")}


def test_rename_that_makes_two_keys_one_is_refused_with_both() -> None:
    found = match(schema("a.w", "b.w"), schema("c.w"), rename=[("^[ab]", "c")])
    assert any("a.w and b.w are both renamed to c.w" in problem.detail for problem in found.problems)


@pytest.mark.parametrize("rename", [[("(", "x")], [("a", r"\7")]])
def test_a_pattern_that_is_none_is_a_plan_error(rename: list[tuple[str, str]]) -> None:
    with pytest.raises(qc.PlanError, match="rename pattern or replacement is not valid"):
        match(schema("a.w"), schema("a.w"), rename=rename)


# --- common prefix ----------------------------------------------------------------------------------------------------


def test_one_leading_path_is_taken_off_only_where_all_else_agrees() -> None:
    assert pairs(schema("bert.a.w", "bert.b.w"), schema("encoder.a.w", "encoder.b.w")) == {
        "encoder.a.w": "bert.a.w",
        "encoder.b.w": "bert.b.w",
    }
    assert pairs(schema("bert.a.w", "bert.b.w"), schema("encoder.a.w", "encoder.c.w")) == {}
    assert pairs(schema("bert.a.w"), schema("encoder.a.w", "encoder.b.w")) == {}


@pytest.mark.parametrize(
    ("keep", "found"), [(["head.*"], True), (["head.w", "head.b"], True), (["head.w"], False), ([], False)]
)
def test_what_is_kept_has_no_part_in_the_leading_path(keep: list[str], found: bool) -> None:
    """A backbone's file, and a model that has it under an attribute beside a head of its own."""
    target = schema("encoder.a.w", "encoder.b.w", "head.w", "head.b")
    expected = {"encoder.a.w": "a.w", "encoder.b.w": "b.w"} if found else {}
    assert pairs(schema("a.w", "b.w"), target, keep=keep) == expected


# --- fused normalizations ---------------------------------------------------------------------------------------------

_LEAVES = ("weight", "bias", "running_mean", "running_var")


def _norm(path: str, channels: int = 4) -> dict[str, Entry]:
    return {
        f"{path}.{leaf}": Entry(
            f"{path}.{leaf}", Role.BUFFER if leaf.startswith("r") else Role.PARAMETER, (channels,), torch.float32
        )
        for leaf in _LEAVES
    }


def _float_side(**norms: int) -> Schema:
    entries: dict[str, Entry] = {}
    for path, channels in norms.items():
        entries.update(_norm(path.replace("__", "."), channels))
    return Schema(entries)


def _fused_side(*hosts: tuple[str, int, tuple[str, ...]], **about: object) -> Schema:
    entries: dict[str, Entry] = {}
    for host, channels, _ in hosts:
        entries.update(_norm(f"{host}.bn", channels))
    fused = tuple(
        Fused(f"{host}.bn", host, n, _LEAVES, lambda seen=seen: seen, "trace" if seen else "")
        for host, n, seen in hosts
    )
    return Schema(entries, "torch_ao", Stage.PREPARED, fused, **about)  # type: ignore[arg-type]


def _norms(source: Schema, target: Schema, **options: object) -> dict[str, tuple[str, str]]:
    return match(source, target, **options).norms  # type: ignore[arg-type]


def test_the_flows_own_record_decides_against_the_convention() -> None:
    found = _norms(_float_side(bn1=4, bn2=4), _fused_side(("conv1", 4, ("bn2",)), ("conv2", 4, ("bn1",))))
    assert found == {"conv1.bn": ("bn2", "trace"), "conv2.bn": ("bn1", "trace")}


def test_the_way_back_uses_the_same_evidence() -> None:
    found = match(_fused_side(("conv1", 4, ("bn2",)), ("conv2", 4, ("bn1",))), _float_side(bn1=4, bn2=4))
    assert found.pairs["bn2.weight"] == ("conv1.bn.weight", "trace")
    assert len(found.pairs) == 8


def test_convention_speaks_where_nothing_else_does_and_it_is_complete() -> None:
    found = _norms(_float_side(bn1=4, bn2=4), _fused_side(("conv1", 4, ()), ("conv2", 4, ())))
    assert found == {"conv1.bn": ("bn1", "naming convention"), "conv2.bn": ("bn2", "naming convention")}


@pytest.mark.parametrize(
    "norms", [{"bn1": 4, "other": 4}, {"bn1": 4, "norm1": 4}, {"bn1": 4, "bn3": 4}], ids=lambda norms: "-".join(norms)
)
def test_convention_is_silent_where_it_is_no_complete_bijection(norms: dict[str, int]) -> None:
    """`conv1`/`bn1` alone would be guessed; `conv2` has no partner, so nothing is."""
    found = match(_float_side(**norms), _fused_side(("conv1", 4, ()), ("conv2", 4, ())))
    assert found.norms == {}
    text = " ".join(map(str, found.problems))
    assert all(name in text for name in norms)
    assert {problem.key for problem in found.problems} == {"conv1.bn", "conv2.bn"}


@pytest.mark.parametrize(
    ("hosts", "norms", "found"),
    [
        (("convs.0", "convs.1"), ("bns.0", "bns.1"), True),
        (("a.layers.0", "a.layers.1"), ("a.norms.0", "a.norms.1"), True),
        (("convs1.0", "convs2.0"), ("bns1.0", "bns2.0"), True),
        (("layers.0", "layers.2"), ("layers.1", "layers.3"), True),
        (("layers.0", "layers.2"), ("layers.1", "norms.0"), False),  # a Sequential, or two lists
        (("convs.0", "convs.1"), ("bns.1", "bns.2"), False),
        (("convs.0", "convs.1"), ("bns1.0", "bns2.1"), False),
    ],
)
def test_lists_of_convolutions_and_normalizations_go_by_their_index(
    hosts: tuple[str, str], norms: tuple[str, str], found: bool
) -> None:
    target = _fused_side(*((host, 4, ()) for host in hosts))
    paths = {prefix: path for prefix, (path, _) in _norms(_float_side(**dict.fromkeys(norms, 4)), target).items()}
    assert paths == ({f"{host}.bn": norm for host, norm in zip(hosts, norms, strict=True)} if found else {})


def test_the_only_shape_that_fits_decides_before_the_convention() -> None:
    found = _norms(_float_side(bn1=6, bn2=4), _fused_side(("conv1", 4, ()), ("conv2", 6, ())))
    assert {prefix: path for prefix, (path, _) in found.items()} == {"conv1.bn": "bn2", "conv2.bn": "bn1"}


def test_evidence_of_a_float_model_speaks_where_the_record_is_silent() -> None:
    evidence = [Evidence({"conv1": ("y",), "conv2": ("x",)}, "trace of the float model")]
    found = _norms(_float_side(x=4, y=4), _fused_side(("conv1", 4, ()), ("conv2", 4, ())), evidence=evidence)
    assert found == {"conv1.bn": ("y", "trace of the float model"), "conv2.bn": ("x", "trace of the float model")}


def test_the_stronger_of_two_witnesses_wins_and_the_report_says_so() -> None:
    evidence = [Evidence({"conv1": ("y",)}, "trace of the float model")]
    found = match(_float_side(x=4, y=4), _fused_side(("conv1", 4, ("x",)), ("conv2", 4, ("y",))), evidence=evidence)
    assert found.norms["conv1.bn"] == ("x", "trace")
    assert found.notes == ["conv1.bn: trace says x, but trace of the float model says y; taken: x"]


def test_two_candidates_that_nothing_tells_apart_are_both_named_with_the_remedy() -> None:
    found = match(_float_side(a=4, b=4), _fused_side(("entry", 4, ()), ("exit", 4, ())))
    assert found.pairs == {}
    assert [str(problem) for problem in found.problems] == [
        f"ambiguous    {host}.bn: the normalization fused into {host} could be a or b; pass float_model= (like= the"
        f" float model, for to_float), whose trace tells which, or rename= one of them to {host}.bn"
        for host in ("entry", "exit")
    ]


def test_no_norm_is_taken_twice() -> None:
    """Two hosts of which the record says the same norm: it belongs to one of them at most."""
    found = match(_float_side(a=4, b=4), _fused_side(("entry", 4, ("a",)), ("exit", 4, ("a",))))
    taken = [path for path, _ in found.norms.values()]
    assert len(taken) == len(set(taken))
    origins = [origin for origin, _ in found.pairs.values()]
    assert len(origins) == len(set(origins))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    order=st.permutations(["a", "b", "c", "d"]),
    known=st.sets(st.integers(0, 3)),
    channels=st.lists(st.sampled_from([4, 6]), min_size=4, max_size=4),
)
def test_what_is_matched_is_right_and_the_rest_is_said(order: list[str], known: set[int], channels: list[int]) -> None:
    """Host i is followed by order[i]; names say nothing. No guess is ever made, with whatever part of it known."""
    hosts = [(f"h{i}", channels[i], (order[i],) if i in known else ()) for i in range(4)]
    source = _float_side(**{name: channels[i] for i, name in enumerate(order)})
    found = match(source, _fused_side(*hosts))
    assert {prefix: path for prefix, (path, _) in found.norms.items()}.items() <= {
        f"h{i}.bn": order[i] for i in range(4)
    }.items()
    said = {problem.key for problem in found.problems}
    assert set(found.norms) | said == {f"h{i}.bn" for i in range(4)}
    for i in known:
        assert f"h{i}.bn" in found.norms


def test_alone_a_fused_file_tells_its_names_by_convention_among_known_places_or_asks() -> None:
    fused = _fused_side(("conv1", 4, ()), ("conv2", 4, ()), places=frozenset({"bn1", "bn2", "relu"}))
    assert {p: name for p, (name, _) in resolve_alone(fused).norms.items()} == {"conv1.bn": "bn1", "conv2.bn": "bn2"}
    silent = resolve_alone(_fused_side(("conv1", 4, ()), ("conv2", 4, ())))
    assert silent.norms == {}
    assert [str(problem) for problem in silent.problems] == [
        f"ambiguous    {host}.bn: fusion took the name of the normalization after {host}, and nothing here tells it;"
        " pass like= (the float model, its state_dict, a path or its keys)"
        for host in ("conv1", "conv2")
    ]


# --- parts that have a wrapper's name, and leftovers ------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["source", "target"])
def test_a_wrapped_file_of_a_model_with_a_part_called_model(wrapped: str) -> None:
    """`model.stem` of the one is `stem` of the other, and not its `model.stem`."""
    bare, under = schema("stem.weight", "model.stem.weight"), schema("model.stem.weight", "model.model.stem.weight")
    if wrapped == "source":
        assert pairs(under, bare) == {
            "stem.weight": "model.stem.weight",
            "model.stem.weight": "model.model.stem.weight",
        }
    else:
        assert pairs(bare, under) == {
            "model.stem.weight": "stem.weight",
            "model.model.stem.weight": "model.stem.weight",
        }


def test_a_file_that_holds_the_part_alone_is_not_taken_for_a_wrapped_one() -> None:
    assert pairs(schema("model.stem.weight"), schema("stem.weight", "model.stem.weight")) == {
        "model.stem.weight": "model.stem.weight"
    }


def test_what_is_left_on_both_sides_is_not_one_thing() -> None:
    """An auxiliary head of the file is no classifier of the model, though its tensors are of the same sizes."""
    source = schema("body.weight", "aux_head.weight", "aux_head.bias")
    target = schema("body.weight", "classifier.weight", "classifier.bias")
    assert pairs(source, target) == {"body.weight": "body.weight"}


def test_what_is_left_is_not_the_normalization_that_is_missing() -> None:
    norm = Fused("conv1.bn", "conv1", 2, ("weight", "bias"), lambda: ("bn1",), "trace of the prepared model")
    target = schema("conv1.weight", "conv1.bn.weight", "conv1.bn.bias", fused=(norm,))
    source = schema("conv1.weight", "aux_norm.weight", "aux_norm.bias")
    found = match(source, target)
    assert found.pairs == {"conv1.weight": ("conv1.weight", "exact key")}
    assert found.norms == {"conv1.bn": ("bn1", "trace of the prepared model")}
