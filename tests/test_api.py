"""The public verbs on real files and wrapped models: what is selected, renamed, kept, and said."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import prepare_for
from test_apply import prepared, untouched
from torch import nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_same_state, native_calibration

ARCH = ARCHS["plain"]


def _expected(flow: str = "eager-x86", seed: int = 1) -> nn.Module:
    model = prepare_for(flow, "plain")(ARCH.make(seed))
    native_calibration(model, ARCH.batches())
    return model


def test_every_public_name_is_there_and_documented() -> None:
    for name in qc.__all__:
        assert inspect.getdoc(getattr(qc, name)), name
    errors = [value for value in vars(qc).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) == 8
    assert all(issubclass(error, qc.CompatError) for error in errors)


def test_the_options_are_those_of_the_design() -> None:
    parameters = inspect.signature(qc.load_checkpoint).parameters
    assert list(parameters) == [
        *("model", "source", "calibration", "inputs", "select", "float_model", "rename", "keep", "drop"),
        *("statistic", "inplace", "mmap", "device", "progress"),
    ]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("model", "source"))


def _pt(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def _trainer(state: Any, folder: Path) -> Any:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": wrapped}, folder / "last.pth")
    return str(folder / "last.pth")


def _safetensors(state: Any, folder: Path) -> Any:
    return qc.save_checkpoint(state, folder / "model.safetensors")


def _module(state: Any, folder: Path) -> Any:
    model = ARCH.make(9)
    model.load_state_dict(state)
    return model


_SOURCES: dict[str, Callable[[Any, Path], Any]] = {
    "state_dict": lambda state, folder: state,
    ".pt": _pt,
    "of a trainer": _trainer,
    ".safetensors": _safetensors,
    "module": _module,
    "wrapped module": lambda state, folder: nn.DataParallel(_module(state, folder)),
    "opened": lambda state, folder: qc.open_checkpoint(_pt(state, folder)),
}


@pytest.mark.parametrize("form", _SOURCES)
def test_every_form_of_source_gives_the_same_state(form: str, tmp_path: Path) -> None:
    model = prepared("eager-x86", "plain")
    qc.load_checkpoint(model, _SOURCES[form](ARCH.state(), tmp_path), calibration=ARCH.batches())
    assert_same_state(model, _expected())


def test_select_chooses_between_two_sets_of_weights(tmp_path: Path) -> None:
    torch.save({"model": ARCH.state(1), "ema": ARCH.state(2)}, tmp_path / "both.pt")
    for select, seed in (("model", 1), ("ema", 2)):
        model = prepared("eager-x86", "plain")
        qc.load_checkpoint(model, tmp_path / "both.pt", calibration=ARCH.batches(), select=select)
        assert_same_state(model, _expected(seed=seed))


def test_select_takes_a_dotted_path() -> None:
    source = {"trainer": {"var_wo_ddp": ARCH.state(1)}, "epoch": 3}
    model = prepared("eager-x86", "plain")
    qc.load_checkpoint(model, source, calibration=ARCH.batches(), select="trainer.var_wo_ddp")
    assert_same_state(model, _expected())


@pytest.mark.parametrize("wrapper", ["DataParallel", "module in module", "compiled"])
def test_a_wrapped_model_loads_an_unwrapped_file(wrapper: str) -> None:
    inner = prepared("eager-x86", "plain")
    if wrapper == "DataParallel":
        model: nn.Module = nn.DataParallel(inner)
    elif wrapper == "compiled":
        model = torch.compile(inner, backend="eager")  # type: ignore[assignment]
    else:
        model = nn.Sequential()
        model.add_module("module", inner)
    qc.load_checkpoint(model, ARCH.state(), calibration=ARCH.batches())
    assert_same_state(inner, _expected())


@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86"])
def test_a_head_of_another_size_in_a_prepared_file_gets_ranges_of_its_own(flow: str) -> None:
    """Its stale qparams are dropped, weights and activations, although a quantizer of that name is in the file."""
    state = {key: value.clone() for key, value in _expected(flow).state_dict().items()}
    model = _with_head(flow, 7)
    own = {key: value.clone() for key, value in model.state_dict().items() if key in ("fc.weight", "fc.bias")}
    with untouched(model), pytest.raises(qc.PlanError, match=r"fc\.weight"):
        qc.load_checkpoint(model, state, calibration=ARCH.batches())
    qc.load_checkpoint(model, state, calibration=ARCH.batches(), keep="fc.*")
    assert_same_state(model, _native_with_head(flow, 7, own))


def test_a_kept_head_says_nothing_of_the_other_quantizers() -> None:
    """Their scales are the file's own, also where they are not what their ranges would give."""
    state = {key: value.clone() for key, value in _expected("eager-x86").state_dict().items()}
    state["conv1.activation_post_process.scale"] *= 1.25
    model = _with_head("eager-x86", 7)
    report = qc.load_checkpoint(model, state, calibration=ARCH.batches(), keep="fc.*")
    assert report.derived == 0
    assert torch.equal(model.conv1.activation_post_process.scale, state["conv1.activation_post_process.scale"])


@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86", "pt2e-x86"])
def test_a_fresh_head_of_the_same_size_is_calibrated_too(flow: str) -> None:
    """Nothing in the shapes tells that the file's ranges of the head are stale; `keep=` does."""
    state = {key: value.clone() for key, value in _expected(flow).state_dict().items()}
    model = _with_head(flow, 4)
    own = {key: value.clone() for key, value in model.state_dict().items() if key in ("fc.weight", "fc.bias")}
    qc.load_checkpoint(model, state, calibration=ARCH.batches(), keep="fc.*")
    assert_same_state(model, _native_with_head(flow, 4, own))


def _with_head(flow: str, classes: int) -> nn.Module:
    model = ARCH.make(5)
    with torch.random.fork_rng():
        torch.manual_seed(17)
        model.fc = nn.Linear(8, classes)
    return prepare_for(flow, "plain")(model)


def _native_with_head(flow: str, classes: int, own: dict[str, Any]) -> nn.Module:
    model = ARCH.make(1)
    model.fc = nn.Linear(8, classes)
    model.fc.load_state_dict({key.removeprefix("fc."): value for key, value in own.items()})
    model = prepare_for(flow, "plain")(model)
    native_calibration(model, ARCH.batches())
    return model


def test_dropping_a_quantizer_of_a_file_makes_it_anew() -> None:
    state = {key: value.clone() for key, value in _expected().state_dict().items()}
    for key in state:
        if key.startswith("fc.activation_post_process.") and state[key].is_floating_point():
            state[key] *= 3
    model = prepared("eager-x86", "plain")
    report = qc.load_checkpoint(model, state, drop="fc.activation_post_process.*", calibration=ARCH.batches())
    assert report.provenance("fc.activation_post_process.scale") == "synthesize: from calibration"
    assert_same_state(model.state_dict(), _expected().state_dict())


def test_progress_is_silent_where_nobody_looks() -> None:
    out, err = io.StringIO(), io.StringIO()
    for progress in (None, False):
        with redirect_stdout(out), redirect_stderr(err):
            qc.load_checkpoint(
                prepared("eager-x86", "plain"), ARCH.state(), calibration=ARCH.batches(), progress=progress
            )
    assert out.getvalue() == err.getvalue() == ""


def test_the_error_names_the_file(tmp_path: Path) -> None:
    state = ARCH.state()
    del state["fc.bias"]
    path = _pt(state, tmp_path)
    model = prepared("eager-x86", "plain")
    with untouched(model), pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, path, calibration=ARCH.batches())
    assert str(caught.value) == (
        "source and target cannot be joined: 1 problem\n"
        f"  file:     {path}\n"
        "  missing      fc.bias: float32[4] is not in the source; rename= maps another name to it, keep='fc.bias'"
        " leaves the model's own value"
    )


def test_every_problem_is_listed_at_once() -> None:
    state = ARCH.state()
    del state["fc.bias"]
    state["fc.weight"] = torch.ones(9, 8)
    state["surplus"] = torch.ones(1)
    state["conv2.bias"] = state["conv2.bias"] + 1j
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(prepared("eager-x86", "plain"), state)
    found = {(problem.kind.value, problem.key) for problem in caught.value.problems}
    assert found >= {
        ("missing", "fc.bias"),
        ("mismatched", "fc.weight"),
        ("unexpected", "surplus"),
        ("lossy", "conv2.bias"),
        ("uncalibrated", "fc.activation_post_process"),
    }
    assert all(problem.remedy for problem in caught.value.problems if problem.kind.value != "uncalibrated")


def test_a_plain_model_loads_as_strictly() -> None:
    """No quantizer anywhere: the same rules, the same report."""
    model = ARCH.make(5)
    report = qc.load_checkpoint(model, {f"module.{key}": value for key, value in ARCH.state().items()})
    assert_same_state(dict(model.state_dict()), ARCH.state())
    assert (report.copied, report.synthesized) == (len(ARCH.state()), 0)
    with untouched(model), pytest.raises(qc.PlanError, match="0 of 15"):
        qc.load_checkpoint(model, {"other.weight": torch.ones(1)})


class _Counting(nn.Module):
    """Keeps a number outside its tensors, as `get_extra_state` is for."""

    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.count = count

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("form", ["module", "state_dict", "torch file", "our file", "float file"])
def test_extra_state_of_a_module_is_carried(form: str, tmp_path: Path) -> None:
    source: Any = _Counting(7)
    if form == "state_dict":
        source = source.state_dict()
    elif form == "torch file":
        torch.save(source.state_dict(), tmp_path / "torch.pt")
        source = tmp_path / "torch.pt"
    elif form == "our file":
        source = qc.save_checkpoint(source, tmp_path / "ours.pt")
    elif form == "float file":
        source = qc.save_checkpoint(qc.to_float(source), tmp_path / "float.safetensors")
    model = _Counting()
    qc.load_checkpoint(model, source)
    assert model.count == 7


def test_names_that_transformers_keeps_on_disk_are_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its folder does not fit its own model; a folder that happens to be the current one says nothing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    trained = transformers.ViTForImageClassification(config)
    trained.save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification(config)
    with pytest.raises(qc.PlanError, match=r"ViTForImageClassification\.from_pretrained") as caught:
        qc.load_checkpoint(model, tmp_path)
    assert str(tmp_path) in str(caught.value)
    qc.load_checkpoint(model, type(model).from_pretrained(tmp_path))
    assert_same_state(model, trained)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, {"other.weight": torch.ones(2)})
    assert "from_pretrained" not in str(caught.value)
