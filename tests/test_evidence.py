"""What a float model, a forward and the statistics of the data tell of normalizations that fusion renamed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import qat_compat as qc
from qat_compat.testing import assert_same_state, assert_twin, scramble


class Interleaved(nn.Module):
    """Both convolutions run before either normalization, so that the order of the trace tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv1(x), self.conv2(x)
        y = self.bn2(left) + self.bn1(right)
        return self.fc(torch.relu(y).mean((2, 3)))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(2)]


def _make() -> nn.Module:
    torch.manual_seed(0)
    model = Interleaved()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
        model.train()(torch.cat(_batches()))
    return model


def _prepare(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = QConfigMapping().set_global(get_default_qat_qconfig("x86"))
        return prepare_qat_fx(model.train(), mapping, (_batches()[0],))


def test_refused_without_data_or_float_model() -> None:
    model = _prepare(scramble(_make()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(model, _make().state_dict(), calibration="defer")
    problems = caught.value.problems
    assert [(p.kind.value, p.key) for p in problems] == [("ambiguous", "conv1.bn"), ("ambiguous", "conv2.bn")]
    assert all("bn1 or bn2" in p.detail or "bn2 or bn1" in p.detail for p in problems)
    assert_same_state(model.state_dict(), before)


def test_running_statistics_decide_with_data() -> None:
    state = _make().state_dict()
    twin = assert_twin(_make, _prepare, state, _batches())
    assert torch.equal(twin.loaded.conv1.bn.running_mean, state["bn2.running_mean"])
    assert twin.report.provenance("conv1.bn.weight") == (
        "copy of bn2.weight: running statistics of the calibration data"
    )


def test_float_model_decides() -> None:
    twin = assert_twin(_make, _prepare, _make().state_dict(), _batches(), float_model=Interleaved())
    assert twin.report.provenance("conv1.bn.weight") == "copy of bn2.weight: trace of the float model"


def test_data_that_fits_both_decides_nothing() -> None:
    """With equal statistics there is nothing to tell the two apart, and nothing is guessed."""
    state = _make().state_dict()
    for leaf in ("running_mean", "running_var"):
        state[f"bn2.{leaf}"] = state[f"bn1.{leaf}"].clone()
    with pytest.raises(qc.PlanError, match="ambiguous"):
        qc.load_checkpoint(_prepare(scramble(_make())), state, calibration=_batches())


def test_a_plan_reads_no_tensor_to_decide() -> None:
    plan = qc.plan_load(_prepare(_make()), _make().state_dict(), calibration=_batches())
    assert {p.kind.value for p in plan.problems} == {"ambiguous"}


class Untraceable(Interleaved):
    """The naming convention is a complete bijection here, and wrong."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numpy().sum() == float("inf"):  # a trace stops here
            return x
        return super().forward(x)


def test_convention_that_the_data_speaks_against_is_refused() -> None:
    from torch.ao.quantization import fuse_modules_qat, prepare_qat

    def prepare(model: nn.Module) -> nn.Module:
        fused = fuse_modules_qat(model.train(), [["conv1", "bn2"], ["conv2", "bn1"]])
        for name in ("bn1", "bn2"):
            setattr(fused, name, _Silent())  # no identity is left for a forward to pass through
        fused.qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(fused)

    model = Untraceable()
    model.load_state_dict(_make().state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare(copy.deepcopy(model))
    with pytest.raises(qc.PlanError, match="its name says bn1"):
        qc.load_checkpoint(prepared, state, calibration=_batches())


def test_what_is_left_over_is_not_the_one_that_is_missing() -> None:
    """It may have the same size and be the only one: what the file has of it fits nothing that the data shows."""
    make, pairs = Lists, _PAIRS[Lists]
    fused = fuse_modules_qat(make().train(), pairs)
    fused.norms = nn.ModuleList(_Silent() for _ in pairs)
    fused.qconfig = get_default_qat_qconfig("x86")
    state = {key.replace("norms.0", "other"): value for key, value in make().state_dict().items()}
    with pytest.raises(qc.PlanError) as caught:
        qc.load_checkpoint(prepare_qat(fused), state, calibration=[torch.rand(4, 4, 5, 5)])
    assert "the normalization fused into convs.0 could be other; pass float_model=" in str(caught.value)


@pytest.mark.parametrize("wrapper", ["", "net."])
def test_lists_of_a_model_that_cannot_be_traced_go_both_ways(wrapper: str) -> None:
    model = fuse_modules_qat(Lists().train(), _PAIRS[Lists])
    model.qconfig = get_default_qat_qconfig("x86")
    model, state = prepare_qat(model), scramble(Lists()).state_dict()
    source = {wrapper + key: value for key, value in state.items()}
    qc.load_checkpoint(model, source, calibration=[torch.rand(4, 4, 5, 5)])
    for like in (None, Lists(), state, list(state)):
        assert_same_state(dict(qc.to_float(model, like=like)), dict(state))


def test_what_the_model_in_like_does_not_tell() -> None:
    model = fuse_modules_qat(Crossed().train(), _PAIRS[Crossed])
    model.qconfig = get_default_qat_qconfig("x86")
    float_model = nn.ModuleDict({name.replace("bn", "other"): part for name, part in Crossed().named_children()})
    with pytest.raises(qc.PlanError) as caught:
        qc.to_float(prepare_qat(model), like=float_model)
    assert {problem.remedy.partition(":")[0] for problem in caught.value.problems if problem.key.endswith(".bn")} == {
        "a trace of the model in like= does not tell it"
    }


class _Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


# --- names that say something else than the model does ----------------------------------------------------------------


class Crossed(nn.Module):
    """Cannot be traced, and every normalization is called after another convolution than its own."""

    order = ("bn2", "bn3", "bn1")

    def __init__(self) -> None:
        super().__init__()
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(4, 4, 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([row / 2 for row in x])
        for i, norm in enumerate(self.order, 1):
            x = torch.relu(getattr(self, norm)(getattr(self, f"conv{i}")(x)))
        return x


class Natural(Crossed):
    order = ("bn1", "bn2", "bn3")


class Parents(nn.Module):
    """In each of two parents one convolution and one normalization, which belongs to the other's convolution."""

    def __init__(self) -> None:
        super().__init__()
        for name in "ab":
            self.add_module(name, nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([row / 2 for row in x])
        return self.a["norm"](self.b["conv"](self.b["norm"](self.a["conv"](x))))


class Wrapping(nn.Module):
    """A convolution whose name is that of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(torch.relu(self.norm(self.module(x)))))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


class Namesakes(Part):
    """A part has the name of a wrapper, and in it are the names that are outside, too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(super().forward(x))


class UntraceableNamesakes(Namesakes):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([row / 2 for row in x]))


class TwoNames(nn.Module):
    """A part that cannot be traced stands under two names, and so does a convolution that nothing normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Crossed()])
        self.part, self.head = self.parts[0], nn.Conv2d(4, 4, 1)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.head(self.part(x)))


@pytest.mark.parametrize("traced", [False, True])
def test_modules_under_two_names(traced: bool) -> None:
    model = fuse_modules_qat(TwoNames().train(), [[f"part.{name}" for name in pair] for pair in _PAIRS[Crossed]])
    model.qconfig = get_default_qat_qconfig("x86")
    model, state = prepare_qat(model), scramble(TwoNames()).state_dict()
    float_model = TwoNames() if traced else None
    qc.load_checkpoint(model, state, calibration=[torch.rand(2, 4, 5, 5)], float_model=float_model)
    assert torch.equal(model.part.conv1.bn.weight, state["part.bn2.weight"])


class Lists(nn.Module):
    """Cannot be traced; each normalization is the only one of its size, and in another list than its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, n + 1, 1) for n in (4, 5, 6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n + 1) for n in (4, 5, 6))
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([row / 2 for row in x])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return self.head(x)


_PAIRS: dict[type[nn.Module], list[list[str]]] = {
    Crossed: [["conv1", "bn2"], ["conv2", "bn3"], ["conv3", "bn1"]],
    Natural: [["conv1", "bn1"], ["conv2", "bn2"], ["conv3", "bn3"]],
    Parents: [["a.conv", "b.norm"], ["b.conv", "a.norm"]],
    Wrapping: [["module", "norm"], ["conv", "bn"]],
    Namesakes: [["conv1", "bn1"], ["model.conv1", "model.bn1"]],
    UntraceableNamesakes: [["conv1", "bn1"], ["model.conv1", "model.bn1"]],
    Lists: [[f"convs.{i}", f"norms.{i}"] for i in range(3)],
}


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "net."])
@pytest.mark.parametrize("data", ["batches", "defer"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("make", [Namesakes, UntraceableNamesakes])
def test_namesakes_under_a_part_with_a_wrappers_name(
    make: type[nn.Module], traced: bool, data: str, wrapper: str
) -> None:
    model = fuse_modules_qat(make().train(), _PAIRS[make])
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    state = scramble(make()).state_dict()
    source = {wrapper + key: value for key, value in state.items()}
    batches = [torch.rand(4, 4, 5, 5)] if data == "batches" else data
    qc.load_checkpoint(model, source, calibration=batches, float_model=make() if traced else None)
    for back in (qc.to_float(model), qc.to_float(model.state_dict()), qc.to_float(model, like=make())):
        assert_same_state(dict(back), dict(state))


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("make", _PAIRS)
def test_the_order_of_calls_goes_before_names_and_shapes(make: type[nn.Module], scale: float) -> None:
    """Whatever the statistics of the data are like: nobody normalized it, say."""

    def prepare(model: nn.Module) -> nn.Module:
        model = fuse_modules_qat(model.train(), _PAIRS[make])
        model.qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(model)

    state = scramble(make()).state_dict()
    batches = [torch.rand(4, 4, 5, 5, generator=torch.Generator().manual_seed(1)) * scale]
    twin = assert_twin(make, prepare, state, batches)
    if make is Wrapping:
        assert_same_state(dict(qc.to_float(twin.loaded, like=make())), dict(state))
        assert_same_state(dict(qc.to_float(twin.loaded)), dict(state))
