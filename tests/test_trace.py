"""Traces: what they find, and that the model does not notice."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from test_apply import Snapshot, untouched
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import ARCHS

import qat_compat as qc
from qat_compat.trace import followers, watch_followers


def _norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)


def _hosts(model: nn.Module) -> list[str]:
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


def _follow(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return followers(model, _hosts(model), [], _norm)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"conv1": ("bn1",), "conv2": ("bn2",)}),
        ("unordered", {"first": ("norm_first",), "second": ("norm_last",)}),
        ("crossed", {"conv1": ("bn2",), "conv2": ("bn1",)}),
        ("sequential", {"0": ("1",), "3": ("4",)}),
        ("linear_bn", {"fc1": ("bn1",), "fc3": ("bn3",)}),
        ("transformer", {}),
        ("dynamic", {}),
    ],
)
def test_followers_of_the_zoo(name: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert _follow(ARCHS[name].make()) == expected


class TwoNames(nn.Module):
    """A part, a convolution and a normalization stand under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))])
        self.part = self.parts[0]
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.again, self.norm = self.conv, self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.again(self.part(x)))


def test_a_module_under_two_names_is_one_host_and_one_follower() -> None:
    model = TwoNames()
    expected = {"parts.0.0": ("parts.0.1",), "part.0": ("part.1",), "conv": ("bn",), "again": ("bn",)}
    assert followers(model, expected, [], _norm) == expected
    assert watch_followers(lambda: model(torch.ones(2, 3, 4, 4)), model, expected, _norm) == expected


class Branching(nn.Module):
    """A branch on the data decides between two ways; each calls another pair."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.a(self.left(x))
        return self.b(self.right(x))


def test_both_answers_to_a_condition_are_followed() -> None:
    assert _follow(Branching()) == {"left": ("a",), "right": ("b",)}


class Contradicting(Branching):
    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_host_with_another_follower_on_each_way_tells_both_or_nothing() -> None:
    """It must not name one of them as if it were certain."""
    assert len(_follow(Contradicting()).get("left", ())) != 1


class Sized(Branching):
    """Pads to a number that it takes from the data, as TensorFlow does ("SAME")."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, max(4 - int(x.shape[-1]), 0)))
        x = x / math.sqrt(x.abs().max())
        return self.b(self.right(self.a(self.left(x))))


def test_a_number_of_the_data_is_taken_for_some_number() -> None:
    assert _follow(Sized()) == {"left": ("a",), "right": ("b",)}


class Counting(Branching):
    """Which pair is called depends on a number."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        return self.a(x) if int(x.shape[0]) > 32 else self.b(x)


def test_a_host_with_another_follower_for_each_number_tells_both_or_nothing() -> None:
    assert len(_follow(Counting()).get("left", ())) != 1


def test_loops_over_numbers_of_the_data_end() -> None:
    class Nested(Branching):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x.shape[0])):
                for _ in range(int(x.shape[1])):
                    x = self.a(self.left(x))
            return x

    assert _follow(Nested()) == {"left": ("a",)}


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 0:
            x = self.bn(self.fc(x))
        return x


def test_a_loop_on_the_data_ends() -> None:
    assert _follow(Looping()) in ({}, {"fc": ("bn",)})


def test_a_sequential_is_followed_inside_a_model_that_cannot_be_traced() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x[: int(x.sum())])

    assert _follow(Untraceable()) == {"body.0": ("body.1",), "body.3": ("body.4",)}


def test_a_function_between_host_and_norm_is_no_passing() -> None:
    class Between(Looping):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.relu(self.fc(x)))

    assert _follow(Between()) == {}


# --- the model does not notice ----------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Its forward changes a buffer, an attribute and a list, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps.add_(1)
        self.last = x
        return self.bn(self.conv(x + torch.rand(1)))


def test_attributes_that_a_forward_sets_are_as_before() -> None:
    model = Noisy()
    keys = sorted(model.__dict__)
    assert _follow(model) == {"conv": ("bn",)}
    assert model.calls == 0
    assert model.last is None
    assert sorted(model.__dict__) == keys


def test_a_buffer_that_a_forward_changes_is_as_before_the_trace() -> None:
    model = Noisy()
    _follow(model)
    assert model.steps.item() == 0


def test_random_numbers_that_a_forward_draws_are_given_back() -> None:
    model = Noisy()
    with untouched(model):
        _follow(model)


def test_a_dry_run_does_not_run_the_users_code_on_the_users_tensors() -> None:
    """The public edge of the same: planning a load of a prepared model, with and without the float model."""
    model = fuse_modules_qat(Noisy().train(), [["conv", "bn"]])
    model.qconfig = get_default_qat_qconfig("x86")
    model, float_model = prepare_qat(model), Noisy()
    state = Noisy().state_dict()
    with untouched(model), untouched(float_model):
        assert qc.plan_load(model, state, calibration="defer").ok
        assert qc.plan_load(model, state, calibration="defer", float_model=float_model).ok
        assert list(qc.to_float(model, like=float_model)) == list(state)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_during_the_trace_passes_and_leaves_no_trace(error: type[BaseException]) -> None:
    class Interrupted(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            raise error

    model = Interrupted()
    with untouched(model), pytest.raises(error):
        _follow(model)


@pytest.mark.parametrize("name", ["plain", "residual", "dynamic", "unet", "shared"])
def test_tracing_leaves_every_model_of_the_zoo_untouched(name: str) -> None:
    model = ARCHS[name].make()
    with untouched(model):
        _follow(model)


def test_torch_itself_is_as_before() -> None:
    """A tracer patches `Module.__call__` while it works."""
    before = (nn.Module.__call__, nn.Module.__getattr__)
    _follow(ARCHS["dynamic"].make())
    assert (nn.Module.__call__, nn.Module.__getattr__) == before


# --- watching a forward -----------------------------------------------------------------------------------------------


def test_watching_a_forward_tells_what_no_trace_can() -> None:
    arch = ARCHS["dynamic"]
    model, batch = arch.make().eval(), arch.batches()[0]
    before = Snapshot(model)
    with torch.no_grad():
        found = watch_followers(lambda: model(batch), model, _hosts(model), _norm)
    assert found == {"entry": ("a",), "exit": ("b",)}
    assert before.changes() == []


def test_watching_gives_no_id_of_a_freed_tensor_to_another() -> None:
    """A norm that is called on a new tensor, which may stand where the output of a host stood."""

    class Freed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = self.fc(x) * 1
                x = self.bn(x + 0)
            return x

    model = Freed().eval()
    assert watch_followers(lambda: model(torch.ones(2, 4)), model, ["fc"], _norm) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_watching_leaves_no_hook_when_the_forward_raises(error: type[BaseException]) -> None:
    model = ARCHS["plain"].make()

    def run() -> None:
        raise error

    with untouched(model), pytest.raises(error):
        watch_followers(run, model, _hosts(model), _norm)


def test_a_trace_is_no_matter_of_other_threads() -> None:
    """torch.fx changes `nn.Module` itself while it traces: a training that goes on beside it must not be traced."""
    other = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    expected = other(torch.ones(1, 2))
    seen: list[object] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=lambda: seen.append(other(torch.ones(1, 2))))
            thread.start()
            thread.join()
            return self.bn(self.conv(x))

    found = followers(Net(), ["conv"], [], lambda module: isinstance(module, nn.BatchNorm2d))
    assert found == {"conv": ("bn",)}
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor) and torch.equal(seen[0], expected)
