"""What a load leaves as it was, whether it succeeds or not: the transaction around every write to the user's model."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows import FLOWS, prepare_for
from torch import Tensor, nn
from torch.ao.quantization import QConfig, default_per_channel_weight_fake_quant, get_default_qat_qconfig, prepare_qat
from zoo import ARCHS

import qat_compat as qc
from qat_compat.frameworks import describe_model
from qat_compat.plan import Keep, Synthesize
from qat_compat.testing import assert_same_state, native_calibration, scramble

# one architecture of each framework, and both kinds of torchao state that no state_dict holds
CASES = (
    ("eager-x86", "plain"),
    ("fx-x86", "plain"),
    ("pt2e-x86", "plain"),
    ("torchao-static", "transformer"),
    ("torchao-learned", "transformer"),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks")


class Snapshot:
    """Everything about a model, and the random state, that a failed load must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._alive: list[object] = []  # so that no id is given to another object
        self.rows = self._look()

    def changes(self) -> list[str]:
        now = self._look()
        names = dict.fromkeys([*self.rows, *now])
        return [f"{name}: {self.rows.get(name)} -> {now.get(name)}" for name in names if not self._same(name, now)]

    def _same(self, name: str, now: dict[str, Any]) -> bool:
        return name in self.rows and name in now and bool(self.rows[name] == now[name])

    def _look(self) -> dict[str, Any]:
        rows: dict[str, Any] = {
            "random state of torch": torch.get_rng_state().numpy().tobytes(),
            "random state of numpy": repr(np.random.get_state()[1:]),
            "random state of Python": random.getstate(),
        }
        for path, module in self.model.named_modules(remove_duplicate=False):
            self._alive.append(module)
            rows[f"<{path}>"] = (id(module), type(module).__name__, module.training)
            rows[f"<{path}> attributes"] = sorted(module.__dict__)
            rows[f"<{path}> children"] = [(name, id(child)) for name, child in module._modules.items()]
            rows[f"<{path}> not saved"] = sorted(module._non_persistent_buffers_set)
            rows[f"<{path}> hooks"] = [len(getattr(module, name)) for name in _HOOKS]
            for name, value in module.__dict__.items():
                if isinstance(value, (bool, int, float, str, type(None))):
                    rows[f"{path}.{name} (attribute)"] = value
                elif isinstance(value, Tensor):
                    rows[f"{path}.{name} (attribute)"] = self._tensor(value)
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                rows[f"{path}.{name}"] = None if tensor is None else self._tensor(tensor)
            if isinstance(module, torch.fx.GraphModule):
                rows[f"<{path}> graph"] = (str(module.graph), module.code)
        return rows

    def _tensor(self, tensor: Tensor) -> tuple[object, ...]:
        self._alive.append(tensor)
        bits = b"" if tensor.is_meta else tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = type(tensor).__name__
        place = (id(tensor), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))
        return (kind, tensor.requires_grad, id(tensor.grad), *place, bits)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that what happens inside leaves the model, hooks, modes and the random state as they were."""
    before = Snapshot(model)
    yield
    assert before.changes() == []


def prepared(flow: str, name: str, seed: int = 5) -> nn.Module:
    """A prepared model of that cell with weights that no test loads."""
    return prepare_for(flow, name)(scramble(ARCHS[name].make(seed), seed))


# --- the judge itself -------------------------------------------------------------------------------------------------


def test_the_snapshot_sees_every_kind_of_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def hook(module: nn.Module, args: Any) -> None:
        return None

    def swap() -> None:
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())

    changes = {
        "value": lambda: model[0].bias.data.add_(1),
        "storage": lambda: setattr(model[0].bias, "data", model[0].bias.detach().clone()),
        "object": swap,
        "mode": lambda: model[1].eval(),
        "hook": lambda: model[0].register_forward_pre_hook(hook),
        "attribute": lambda: setattr(model[1], "eps", 0.5),
        "requires_grad": lambda: model[0].bias.requires_grad_(False),
        "random state": lambda: torch.rand(1),
    }
    for name, change in changes.items():
        before = Snapshot(model)
        assert before.changes() == []
        change()
        assert before.changes(), name


# --- after success ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_a_load_keeps_objects_modes_flags_hooks_and_random_state(flow: str, name: str) -> None:
    arch, model = ARCHS[name], prepared(flow, name)
    if FLOWS[flow].kind != "pt2e":
        list(model.modules())[-1].training ^= True  # a mode that differs from the rest
    objects = dict((*model.named_parameters(), *model.named_buffers()))
    grads = {key: tensor.requires_grad for key, tensor in objects.items()}
    before = Snapshot(model)
    report = qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    now = dict((*model.named_parameters(), *model.named_buffers()))
    for key, tensor in objects.items():
        assert now[key] is tensor, key
        assert tensor.requires_grad == grads[key], key
    rows = Snapshot(model).rows
    for row, value in before.rows.items():
        if row.startswith(("random", "<")) and not (row.endswith(" attributes") and flow.startswith("torchao")):
            assert rows[row] == value, row
        if row.endswith(("_enabled", ".eps", ".enabled (attribute)")):
            assert rows[row][-1:] == value[-1:] if isinstance(value, tuple) else rows[row] == value, row
    for step in report.steps:
        if isinstance(step, Keep) and step.key in objects:
            parent, _, leaf = step.key.rpartition(".")
            assert rows[f"{parent}.{leaf}"] == before.rows[f"{parent}.{leaf}"], step.key


@pytest.mark.parametrize(("flow", "name"), CASES)
def test_an_optimizer_made_before_trains_the_loaded_parameters(flow: str, name: str) -> None:
    arch, model = ARCHS[name], prepared(flow, name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    loaded = {key: value.detach().clone() for key, value in model.named_parameters()}
    model(arch.batches()[0]).square().mean().backward()
    optimizer.step()
    weight = "fc.weight" if name == "plain" else "mlp.2.weight"
    assert not torch.equal(dict(model.named_parameters())[weight], loaded[weight])


def test_an_optimizer_keeps_training_learnt_ranges_that_are_calibrated_again() -> None:
    """The first load makes the parameters; the second one gives the same objects other values."""
    arch, model = ARCHS["transformer"], prepared("torchao-learned", "transformer")
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    objects = dict(model.named_parameters())
    assert any(key.endswith("fake_quantizer.scale") for key in objects)
    values = {key: value.detach().clone() for key, value in objects.items()}
    qc.load_checkpoint(model, arch.state(2), calibration=arch.batches(seed=7))
    now = dict(model.named_parameters())
    assert [key for key in objects if now[key] is not objects[key]] == []
    assert not torch.equal(now["mlp.2.weight_fake_quantizer.scale"], values["mlp.2.weight_fake_quantizer.scale"])


def test_a_non_persistent_buffer_keeps_its_memory() -> None:
    arch, model = ARCHS["constants"], prepared("eager-x86", "constants")
    memory, value = model.mask.data_ptr(), model.mask.clone()
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    assert model.mask.data_ptr() == memory
    assert torch.equal(model.mask, value)


@pytest.mark.parametrize("flow", ["eager-x86", "pt2e-x86"])
def test_ties_survive_as_one_object(flow: str) -> None:
    arch, model = ARCHS["tied"], prepared(flow, "tied")
    names = ("embed", "lm_head")
    weights = [model.get_submodule(name).weight for name in names if hasattr(model, name)]
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    after = [model.get_submodule(name).weight for name in names if hasattr(model, name)]
    assert all(a is b for a, b in zip(weights, after, strict=True))
    assert len({id(weight) for weight in after}) == 1
    assert torch.equal(after[0], arch.state()["embed.weight"])


def test_gradients_and_formats_stay() -> None:
    """`.grad` of a parameter, and a channels-last layout, are not the file's business."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.weight.grad = torch.ones_like(model.weight)
    grad, strides = model.weight.grad, model.weight.stride()
    state = nn.Conv2d(3, 4, 3).state_dict()
    qc.load_checkpoint(model, state)
    assert model.weight.grad is grad
    assert model.weight.stride() == strides
    assert torch.equal(model.weight, state["weight"])


def test_a_source_tensor_is_never_shared_with_the_model() -> None:
    """Training the model must not change the state_dict that it was loaded from."""
    arch, model, state = ARCHS["plain"], prepared("eager-x86", "plain"), ARCHS["plain"].state()
    qc.load_checkpoint(model, state, calibration=arch.batches())
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(1)
    expected = arch.state()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_live_module_as_source_is_neither_changed_nor_shared() -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    with untouched(source):
        qc.load_checkpoint(target, source)
    assert torch.equal(source.weight, target.weight)
    assert source.weight.data_ptr() != target.weight.data_ptr()


def test_inplace_writes_into_the_memory_that_is_there() -> None:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    memory = {key: value.data_ptr() for key, value in model.named_parameters()}
    expected = prepared("eager-x86", "plain")
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches(), inplace=True)
    qc.load_checkpoint(expected, arch.state(), calibration=arch.batches())
    assert {key: value.data_ptr() for key, value in model.named_parameters()} == memory
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def test_inplace_changes_nothing_while_a_problem_can_still_be_read() -> None:
    """A tensor that overflows is met last; the ones before it must not have been written by then."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    state = {key: value.float() for key, value in nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict().items()}
    state["1.bias"][0] = 1e30
    with untouched(model), pytest.raises(qc.PlanError, match="overflow"):
        qc.load_checkpoint(model, state, inplace=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_mmap_assigns_the_file_without_making_it_writable(tmp_path: Any, suffix: str) -> None:
    source = nn.Linear(64, 64)
    path = qc.save_checkpoint(source, tmp_path / f"model{suffix}")
    content = path.read_bytes()
    model = nn.Linear(64, 64)
    weight = model.weight
    qc.load_checkpoint(model, path, mmap=True)
    assert model.weight is weight
    assert torch.equal(model.weight, source.weight)
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(model.weight, source.weight + 1)
    assert path.read_bytes() == content


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_mapped_models_share_nothing(tmp_path: Any, suffix: str) -> None:
    """Neither two that are loaded from one open checkpoint, nor one with what is read from it afterwards."""
    source = nn.Linear(64, 64)
    checkpoint = qc.open_checkpoint(qc.save_checkpoint(source, tmp_path / f"model{suffix}"))
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    for model in (first, second):
        qc.load_checkpoint(model, checkpoint, mmap=True)
    with torch.no_grad():
        first.weight.add_(1)
    for weight in (second.weight, checkpoint["weight"], qc.to_float(checkpoint)["weight"]):
        assert torch.equal(weight, source.weight)


class _Two(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_a_storage_of_the_file_does_not_become_two_parameters(tmp_path: Any) -> None:
    tied = _Two(tied=True)
    torch.save(tied.state_dict(), tmp_path / "tied.pt")
    rows = torch.arange(40.0).view(10, 4)
    torch.save({"embed.weight": rows[:8], "head.weight": rows[2:]}, tmp_path / "overlapping.pt")
    for name in ("tied.pt", "overlapping.pt"):
        model, expected = _Two(tied=False), torch.load(tmp_path / name)
        qc.load_checkpoint(model, tmp_path / name, mmap=True)
        with torch.no_grad():
            model.embed.weight.zero_()
        assert torch.equal(model.head.weight, expected["head.weight"])


def test_a_mapped_tensor_has_the_strides_that_the_model_has(tmp_path: Any) -> None:
    torch.save({"weight": torch.ones(1, 4).expand(3, 4), "bias": torch.ones(3)}, tmp_path / "expanded.pt")
    model = nn.Linear(4, 3)
    qc.load_checkpoint(model, tmp_path / "expanded.pt", mmap=True)
    assert model.weight.stride() == (4, 1)
    last = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
    torch.save(nn.Conv2d(4, 3, 2).state_dict(), tmp_path / "conv.pt")
    qc.load_checkpoint(last, tmp_path / "conv.pt", mmap=True)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)


# --- casts ------------------------------------------------------------------------------------------------------------


def test_a_cast_that_loses_nothing_is_not_mentioned() -> None:
    model = nn.Linear(2, 2)
    state = {"weight": torch.tensor([[1.5, 2], [3, 4]]).bfloat16(), "bias": torch.ones(2, dtype=torch.float16)}
    report = qc.load_checkpoint(model, state)
    assert report.losses == {}
    assert model.weight.dtype == torch.float32
    assert model.weight.tolist() == [[1.5, 2], [3, 4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounding_cast_is_counted_and_the_model_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 1).to(dtype)
    state = {"weight": torch.tensor([[1.0, 1 / 3, 1e-3]]), "bias": torch.zeros(1)}
    report = qc.load_checkpoint(model, state)
    assert model.weight.dtype == dtype
    name = str(dtype).removeprefix("torch.")
    assert report.losses == {"weight": f"2 of 3 values rounded from float32 to {name}"}
    assert f"weight: 2 of 3 values rounded from float32 to {name}" in report.warnings


class Holder(nn.Module):
    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(2))
        for name, value in buffers.items():
            self.register_buffer(name, value)


@pytest.mark.parametrize(
    ("mine", "theirs", "text"),
    [
        (torch.zeros(2, dtype=torch.float16), torch.tensor([1.0, 1e30]), "1 of 2 values overflow"),
        (
            torch.zeros(2, dtype=torch.float16),
            torch.tensor([1.0, 1e30], dtype=torch.bfloat16),
            "1 of 2 values overflow",
        ),
        (torch.zeros(2, dtype=torch.uint8), torch.tensor([1, 300]), "1 of 2 values cannot be held"),
        (torch.zeros(2, dtype=torch.uint8), torch.tensor([1, -1]), "1 of 2 values cannot be held"),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([1, float("nan")]), "1 of 2 values cannot be held"),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([1, 0.5]), "1 of 2 values cannot be held"),
        (torch.zeros(2, dtype=torch.bool), torch.tensor([1, 2]), "1 of 2 values cannot be held"),
        (torch.zeros(2), torch.tensor([1, 1j]), "imaginary"),
        (torch.zeros(2, dtype=torch.float16), torch.tensor([1, 100_000]), "overflow"),
    ],
    ids=["1e30-fp16", "bf16-fp16", "300-uint8", "-1-uint8", "nan-int", "half-int", "2-bool", "complex", "int-fp16"],
)
def test_a_cast_that_destroys_a_value_is_refused(mine: Tensor, theirs: Tensor, text: str) -> None:
    model = Holder(value=mine)
    with untouched(model), pytest.raises(qc.PlanError, match=text) as caught:
        qc.load_checkpoint(model, {"first": torch.ones(2), "value": theirs})
    assert [problem.kind.value for problem in caught.value.problems] == ["lossy"]
    assert caught.value.problems[0].key == "value"


def test_infinities_that_the_file_holds_are_no_overflow() -> None:
    model = Holder(value=torch.zeros(2, dtype=torch.float16))
    qc.load_checkpoint(model, {"first": torch.ones(2), "value": torch.tensor([float("inf"), float("nan")])})
    assert model.value[0] == float("inf")
    assert model.value[1].isnan()


# --- meta devices -----------------------------------------------------------------------------------------------------


def test_a_meta_model_is_made_whole_with_its_ties() -> None:
    arch = ARCHS["tied"]
    with torch.device("meta"):
        model = ARCHS["tied"].build()
    report = qc.load_checkpoint(model, arch.state())
    assert report.kept == 0
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(model.embed.weight, nn.Parameter)
    assert torch.equal(model.embed.weight, arch.state()["embed.weight"])


def test_what_the_file_does_not_hold_cannot_stay_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        model[0].register_buffer("mask", torch.zeros(2), persistent=False)
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    with untouched(model), pytest.raises(qc.PlanError, match=r"0\.mask: still on the meta device"):
        qc.load_checkpoint(model, state)


def test_quantizers_whose_settings_are_on_meta_are_refused_before_data_runs() -> None:
    """But for a file that has them all."""
    arch = ARCHS["plain"]
    model = prepared("eager-x86", "plain").to("meta")
    with untouched(model), pytest.raises(qc.PlanError, match=r"42 keys, such as .*: still on the meta device"):
        qc.load_checkpoint(model, arch.state(), calibration=arch.batches(), device="cpu")
    loaded = prepared("eager-x86", "plain")
    qc.load_checkpoint(loaded, arch.state(), calibration=arch.batches())
    qc.load_checkpoint(model, loaded.state_dict(), device="cpu")
    assert_same_state(model, loaded)


def test_a_layer_without_inputs_has_no_range(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(0, 4)).train()
    layers.qconfig = QConfig(activation=nn.Identity, weight=default_per_channel_weight_fake_quant)
    model = prepare_qat(layers)
    file = qc.save_checkpoint(nn.Sequential(nn.Linear(0, 4)), tmp_path / "empty.safetensors")
    assert qc.load_checkpoint(model, file).copied == 2
    assert torch.equal(model[0].weight_fake_quant.scale, torch.ones(1))


_LIMITED = """
import resource, sys
import torch
from torch import nn
import qat_compat as qc
model, state = nn.Linear(4096, 4096), {"weight": torch.ones(4096, 4096), "bias": torch.ones(4096)}
if sys.argv[1] == "many":
    model = nn.ModuleList([nn.Linear(512, 512) for _ in range(64)])
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
before = [value.detach().clone() for value in list(model.parameters())[:2]]
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (16 << 20), held + (16 << 20)))
try:
    qc.load_checkpoint(model, state, progress=False)
except qc.CompatError as error:
    print(error)
assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce the limit")
@pytest.mark.parametrize("tensors", ["one", "many"])
def test_a_lack_of_memory_is_said_with_the_way_out(tensors: str) -> None:
    """As the system has it: memory for one large tensor is asked of the system, for another of torch's allocator."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LIMITED, tensors], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "there is not enough memory" in done.stdout
    assert "inplace=True" in done.stdout


@pytest.mark.parametrize("keep", ["1.*", "0.weight"])
def test_keep_cannot_keep_what_a_meta_model_does_not_have(keep: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    with untouched(model), pytest.raises(qc.PlanError, match="still on the meta device"):
        qc.load_checkpoint(model, state, keep=keep)


@pytest.mark.parametrize("flow", ["torchao-static", "torchao-learned", "torchao-int8-int4"])
def test_a_prepared_meta_model_becomes_the_same_as_one_that_was_never_there(flow: str) -> None:
    arch = ARCHS["transformer"]
    with torch.device("meta"):
        model = prepare_for(flow, "transformer")(arch.build().train())
    report = qc.load_checkpoint(model, arch.state(), calibration=arch.batches(), device="cpu")
    expected = prepared(flow, "transformer")
    qc.load_checkpoint(expected, arch.state(), calibration=arch.batches())
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())
    assert (report.synthesized > 0) == (flow != "torchao-int8-int4")


# --- the plan is what is carried out ----------------------------------------------------------------------------------


def test_every_synthesized_key_was_planned_and_every_planned_key_has_a_place() -> None:
    arch, model = ARCHS["plain"], prepared("eager-x86", "plain")
    plan = qc.plan_load(model, arch.state(), calibration=arch.batches())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    assert report.plan == plan
    synthesized = {step.key for step in plan.steps if isinstance(step, Synthesize)}
    kept = {step.key for step in plan.steps if isinstance(step, Keep)}
    assert synthesized
    after = model.state_dict()
    assert [key for key in kept if not torch.equal(before[key], after[key])] == []
    assert set(after) == {step.key for step in plan.steps if step.key in describe_model(model).schema}


class _Cached(nn.Module):
    """Works something out of its weights when they have been loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))
        self.register_buffer("norm", self.table.detach().norm(dim=1), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _keys: module.refresh())

    def refresh(self) -> None:
        self.norm.copy_(self.table.detach().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.table.T / self.norm


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("qat", [False, True])
def test_post_hooks_run_before_the_data_does(qat: bool, inplace: bool) -> None:
    def made(model: nn.Module) -> nn.Module:
        model.qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(model.train()) if qat else model

    state = _Cached().state_dict()
    state["table"] = state["table"] * 3
    native, data = _Cached(), [torch.randn(4, 8)]
    native.load_state_dict(state)
    native = made(native)
    if qat:
        native_calibration(native, data)
    model = made(_Cached())
    qc.load_checkpoint(model, state, calibration=data if qat else None, inplace=inplace)
    assert torch.equal(model.norm, native.norm)
    assert_same_state(model, native)
    assert torch.equal(model.eval()(data[0]), native.eval()(data[0]))
