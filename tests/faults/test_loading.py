"""Every way in which loading can fail: one error of the family that says what to do, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch
from flows import FLOWS, prepare_for
from hypothesis import given, settings
from hypothesis import strategies as st
from test_apply import CASES, Snapshot, prepared, untouched
from torch import Tensor, nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.schema import Spec
from qat_compat.testing import native_calibration

State = dict[str, Any]


@cache
def target(flow: str, name: str) -> nn.Module:
    """One model for all faults of a flow: each of them must leave it as it was for the next one."""
    return prepared(flow, name)


@cache
def _trained(flow: str, name: str) -> nn.Module:
    arch = ARCHS[name]
    model = prepare_for(flow, name)(arch.make(1))
    native_calibration(model, arch.batches())
    return model


def trained_state(flow: str, name: str) -> State:
    return {key: value.clone() for key, value in _trained(flow, name).state_dict().items()}


def _last(state: State) -> str:
    return next(key for key in reversed(state) if key.endswith("weight"))


def _missing(state: State) -> None:
    del state[_last(state)]


def _unexpected(state: State) -> None:
    state["surplus.weight"] = torch.ones(2)


def _mismatched(state: State) -> None:
    state[_last(state)] = torch.ones(7, 5)


def _ambiguous(state: State) -> None:
    key = _last(state)
    value = state.pop(key)
    state[f"module.{key}"], state[f"_orig_mod.{key}"] = value, value + 1


def _complex(state: State) -> None:
    state[_last(state)] = state[_last(state)] + 1j


def _not_dense(state: State) -> None:
    state[_last(state)] = state[_last(state)].to_sparse()


def _without_data(state: State) -> None:
    state[_last(state)] = state[_last(state)].to("meta")


_BROKEN: Mapping[str, tuple[Callable[[State], None], str]] = {
    "missing": (_missing, "is not in the source"),
    "unexpected": (_unexpected, "the target has no place for it"),
    "mismatched": (_mismatched, "expected float32"),
    "ambiguous": (_ambiguous, r"could be module\.\S+ or _orig_mod\.\S+"),
    "complex": (_complex, "imaginary"),
    "sparse": (_not_dense, ""),
    "meta": (_without_data, ""),
}


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize("fault", _BROKEN)
def test_a_broken_entry_is_refused_and_nothing_changes(flow: str, name: str, fault: str) -> None:
    arch, model = ARCHS[name], target(flow, name)
    state: State = arch.state()
    change, text = _BROKEN[fault]
    change(state)
    with untouched(model), pytest.raises(qc.CompatError, match=text) as caught:
        qc.load_checkpoint(model, state, calibration=arch.batches())
    if text:
        assert isinstance(caught.value, qc.PlanError)


@pytest.mark.parametrize(("flow", "name"), CASES)
@pytest.mark.parametrize("error", [OSError("gone"), ValueError("odd"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_the_third_tensor_cannot_be_read(flow: str, name: str, error: BaseException) -> None:
    arch, model = ARCHS[name], target(flow, name)
    state, reads = arch.state(), []

    def read(key: str) -> Tensor:
        reads.append(key)
        if len(reads) == 3:
            raise error
        return state[key]

    specs = {key: Spec(tuple(value.shape), value.dtype) for key, value in state.items()}
    checkpoint = qc.Checkpoint(specs, read, name="<third>")
    expected = qc.CompatError if isinstance(error, Exception) else type(error)
    with untouched(model), pytest.raises(expected):
        qc.load_checkpoint(model, checkpoint, calibration=arch.batches())
    assert len(reads) == 3


# --- tied parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["eager-x86", "torchao-static"])
def test_tied_parameters_with_conflicting_values_are_refused(flow: str) -> None:
    arch, model = ARCHS["tied"], target(flow, "tied")
    state = arch.state()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with untouched(model), pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, state, calibration=arch.batches())
    (problem,) = caught.value.problems
    assert problem.kind.value == "mismatched"
    assert "embed.weight and lm_head.weight differ, and the model ties embed.weight and lm_head.weight" in str(problem)
    assert "drop='lm_head.weight'" in problem.remedy


def test_the_remedy_for_conflicting_ties_works() -> None:
    arch, model = ARCHS["tied"], prepared("eager-x86", "tied")
    state = arch.state()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    qc.load_checkpoint(model, state, calibration=arch.batches(), drop="lm_head.weight")
    assert torch.equal(model.lm_head.weight, state["embed.weight"])
    assert model.lm_head.weight is model.embed.weight


def test_equal_copies_and_a_single_copy_are_one_tie() -> None:
    arch = ARCHS["tied"]
    for gone in ("", "lm_head.weight", "embed.weight"):
        model, state = prepared("eager-x86", "tied"), arch.state()
        value = state["embed.weight"].clone()
        state.pop(gone, None)
        qc.load_checkpoint(model, state, calibration=arch.batches())
        assert model.lm_head.weight is model.embed.weight
        assert torch.equal(model.embed.weight, value)


# --- qparams that no quantizer can use --------------------------------------------------------------------------------

_GRAPHS = CASES[:3]
_BAD: Mapping[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "negative": lambda scale: -scale,
    "nan": lambda scale: torch.full_like(scale, float("nan")),
    "inf": lambda scale: torch.full_like(scale, float("inf")),
}


def _scales(state: State) -> dict[str, str]:
    """The first quantizer with one scale and the first with several."""
    scales = [key for key in state if key.endswith(".scale")]
    return {
        "activation": next(key for key in scales if state[key].numel() == 1),
        "weight": next(key for key in scales if state[key].numel() > 1),
    }


@pytest.mark.parametrize(("flow", "name"), _GRAPHS)
@pytest.mark.parametrize("kind", ["activation", "weight"])
@pytest.mark.parametrize("fault", _BAD)
def test_a_bad_scale_in_a_file(flow: str, name: str, kind: str, fault: str) -> None:
    model, state = target(flow, name), trained_state(flow, name)
    key = _scales(state)[kind]
    state[key] = _BAD[fault](state[key])
    with untouched(model), pytest.raises(qc.QParamError) as caught:
        qc.load_checkpoint(model, state)
    assert caught.value.key is not None
    assert key in caught.value.key
    assert "finite" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(("flow", "name"), _GRAPHS)
@pytest.mark.parametrize("value", [-1000, 1000])
def test_a_zero_point_out_of_range(flow: str, name: str, value: int) -> None:
    model, state = target(flow, name), trained_state(flow, name)
    key = _scales(state)["activation"].replace(".scale", ".zero_point")
    state[key] = torch.full_like(state[key], value)
    with untouched(model), pytest.raises(qc.QParamError, match=r"outside \[0, (127|255)\]") as caught:
        qc.load_checkpoint(model, state)
    assert caught.value.key == key


# leaf -> another shape than it has; some of these kill the process in the next forward, where they are taken
_MISSHAPEN: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a scale too few": ("weight.scale", lambda value: value[:-1]),
    "a zero point too few": ("weight.zero_point", lambda value: value[:-1]),
    "one zero point": ("weight.zero_point", lambda value: value[:1]),
    "no zero point": ("activation.zero_point", lambda value: value[:0]),
    "a scale without a dimension": ("activation.scale", lambda value: value.reshape(())),
    "no smallest value": ("activation.activation_post_process.min_val", lambda value: value.reshape(-1)[:0]),
    "no largest value": ("weight.activation_post_process.max_val", lambda value: value[:0]),
    "one largest value": ("weight.activation_post_process.max_val", lambda value: value[:1]),
    "no switch": ("activation.fake_quant_enabled", lambda value: value[:0]),
    "two switches": ("weight.observer_enabled", lambda value: value.repeat(2)),
}


@pytest.mark.parametrize(("flow", "name"), _GRAPHS)
@pytest.mark.parametrize("fault", _MISSHAPEN)
def test_a_quantizer_value_of_another_shape(flow: str, name: str, fault: str) -> None:
    model, state = target(flow, name), trained_state(flow, name)
    place, change = _MISSHAPEN[fault]
    kind, _, leaf = place.partition(".")
    quantizer = _scales(state)[kind].removesuffix(".scale")
    key = f"{quantizer}.{leaf}"
    state[key] = change(state[key])
    with untouched(model), pytest.raises(qc.QParamError, match="has the shape") as caught:
        qc.load_checkpoint(model, state)
    assert quantizer in str(caught.value.key)


@pytest.mark.parametrize(("flow", "name"), _GRAPHS)
@pytest.mark.parametrize("fault", _BAD)
def test_a_bad_scale_of_a_quantizer_that_has_seen_nothing(flow: str, name: str, fault: str) -> None:
    """Its range is empty and its scale a default; that is no leave to hold NaN."""
    model = target(flow, name)
    state = {key: value.clone() for key, value in prepared(flow, name, seed=6).state_dict().items()}
    key = next(key for key in state if key.endswith(".scale"))
    state[key] = _BAD[fault](state[key])
    with untouched(model), pytest.raises(qc.QParamError):
        qc.load_checkpoint(model, state, calibration="defer")


@pytest.mark.parametrize(("flow", "name"), _GRAPHS)
def test_a_range_that_is_not_finite(flow: str, name: str) -> None:
    """The scale is sound, but the first training step would compute a new one from this."""
    model, state = target(flow, name), trained_state(flow, name)
    key = _scales(state)["activation"].replace(".scale", ".activation_post_process.max_val")
    state[key] = torch.full_like(state[key], float("nan"))
    with untouched(model), pytest.raises(qc.QParamError):
        qc.load_checkpoint(model, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_learnt_scale_that_is_not_finite(value: float) -> None:
    flow, name = CASES[4]
    model, state = target(flow, name), trained_state(flow, name)
    key = next(key for key in state if key.endswith(".scale"))
    state[key] = torch.full_like(state[key], value)
    with untouched(model), pytest.raises(qc.QParamError) as caught:
        qc.load_checkpoint(model, state)
    assert key in str(caught.value)


# --- options that mean nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"device": "bogus"},
        {"device": "cuda:99"},
        {"rename": "abc"},
        {"rename": [("(", "x")]},
        {"rename": [("a", r"\9")]},
        {"keep": None},
        {"drop": 3},
        {"keep": "nothing.*"},
        {"drop": "nothing.*"},
        {"statistic": "median"},
        {"select": "no.such.part"},
        {"float_model": "model.pt"},
        {"calibration": 3},
        {"calibration": torch.ones(2)},
        {"calibration": "no-such-file.pt"},
    ],
    ids=str,
)
def test_an_option_that_means_nothing(options: dict[str, Any]) -> None:
    model = nn.Linear(2, 3, device="meta") if "device" in options else nn.Linear(2, 3)
    state = nn.Linear(2, 3).state_dict()
    with untouched(model), pytest.raises(qc.CompatError):
        qc.load_checkpoint(model, state, **options)


@pytest.mark.parametrize(
    "source", [None, 3, b"model.pt", [1, 2], object(), torch.ones(2)], ids=lambda source: type(source).__name__
)
def test_a_source_that_is_none(source: Any) -> None:
    model = nn.Linear(2, 3)
    with untouched(model), pytest.raises(qc.CompatError):
        qc.load_checkpoint(model, source)


def test_model_and_source_in_the_wrong_order() -> None:
    with pytest.raises(qc.CompatError):
        qc.load_checkpoint(nn.Linear(2, 3).state_dict(), nn.Linear(2, 3))  # type: ignore[arg-type]


def test_a_model_that_is_not_built_yet() -> None:
    """Lazy modules have no shapes before their first forward."""
    model = nn.LazyLinear(3)
    with pytest.raises(qc.CompatError):
        qc.load_checkpoint(model, nn.Linear(2, 3).state_dict())
    with pytest.raises(qc.CompatError):
        qc.load_checkpoint(nn.Linear(2, 3), model)


def test_extra_state_that_a_module_refuses() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"note": 1}

        def set_extra_state(self, state: Any) -> None:
            raise ValueError("not mine")

    model, source = Odd(2, 3), Odd(2, 3)
    with untouched(model), pytest.raises(qc.CompatError):
        qc.load_checkpoint(model, source)


class _Listing(nn.Linear):
    """Keeps what it is given in a list of its own, which no copy of its attributes holds apart."""

    def __init__(self, *words: str) -> None:
        super().__init__(2, 2)
        self.words = list(words)

    def get_extra_state(self) -> Any:
        return {"words": list(self.words)}

    def set_extra_state(self, state: Any) -> None:
        self.words[:] = state["words"]
        if "refused" in self.words:
            raise ValueError("not mine")


def test_extra_state_that_one_module_took_before_another_refused() -> None:
    model, source = (
        nn.Sequential(_Listing(word), _Listing(last)) for word, last in (("mine", "mine"), ("a", "refused"))
    )
    with untouched(model), pytest.raises(qc.CompatError):
        qc.load_checkpoint(model, source)
    assert model[0].words == ["mine"]


def test_a_post_hook_that_raises() -> None:
    def refuses(module: nn.Module, _keys: Any) -> None:
        module.cache.zero_()
        raise RuntimeError("not like this")

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].register_buffer("cache", torch.ones(2), persistent=False)
    model[1].register_load_state_dict_post_hook(refuses)
    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    with untouched(model), pytest.raises(qc.CompatError, match=r"post-hook of Linear raised RuntimeError: not like"):
        qc.load_checkpoint(model, state)


# --- anything at all as a source --------------------------------------------------------------------------------------

_LEAVES = st.one_of(
    st.none(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.builds(lambda n, dtype: torch.ones(n).to(dtype), st.lists(st.integers(0, 3), max_size=3), st.sampled_from(
        [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float64, torch.uint8]
    )),
    st.just(torch.ones(3, 2).to_sparse()),
    st.just(torch.ones(3, 2, device="meta")),
    st.just(torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8)),
    st.just(nn.Linear(1, 1)),
    st.just(object()),
)  # fmt: skip
_KEYS = st.one_of(
    st.sampled_from(["weight", "bias", "state_dict", "model", "module.weight", "weight.scale", "", ".", "a..b"]),
    st.text(max_size=4),
    st.integers(0, 3),
)
_SOURCES = st.recursive(
    st.dictionaries(_KEYS, _LEAVES, max_size=4),
    lambda inner: st.dictionaries(_KEYS, st.one_of(_LEAVES, inner, st.lists(_LEAVES, max_size=3)), max_size=3),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(source=_SOURCES, good=st.booleans())
def test_no_source_makes_another_error_escape_or_changes_the_model(source: dict[Any, Any], good: bool) -> None:
    model = nn.Linear(2, 3)
    if good:
        source = {**nn.Linear(2, 3).state_dict(), **source}
    before = Snapshot(model)
    try:
        qc.load_checkpoint(model, source)
    except qc.CompatError as error:
        assert str(error)
        assert before.changes() == []
    with suppress(qc.CompatError):
        list(qc.to_float(source).items())


@pytest.fixture(autouse=True)
def _flows_are_known() -> Iterator[None]:
    assert {FLOWS[flow].kind for flow, _ in CASES} == {"eager", "fx", "pt2e", "torchao"}
    yield
