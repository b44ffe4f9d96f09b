"""Calibration data in every form that people have it, and a calibration that is kept."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_apply import CASES, prepared, untouched
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QuantStub,
    QuantWrapper,
    default_weight_fake_quant,
    disable_observer,
    get_default_qat_qconfig,
    prepare_qat,
)
from torch.utils.data import DataLoader, TensorDataset
from zoo import ARCHS

import qat_compat as qc
from qat_compat.calibration import fingerprint
from qat_compat.frameworks import describe_model
from qat_compat.names import canonical
from qat_compat.testing import assert_same_state

ARCH = ARCHS["plain"]
Named = namedtuple("Named", ["image", "label"])


def _loaded(data: Any, **options: Any) -> nn.Module:
    model = prepared("eager-x86", "plain")
    qc.load_checkpoint(model, ARCH.state(), calibration=data, **options)
    return model


@pytest.fixture(scope="module")
def expected() -> nn.Module:
    return _loaded(ARCH.batches())


class OnlyIterable:
    """As an IterableDataset: it can be iterated, and its length raises something of its own."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(ARCH.batches())

    def __len__(self) -> int:
        raise NotImplementedError


_FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: ARCH.batches(),
    "tuple": lambda: tuple(ARCH.batches()),
    "iterator": lambda: iter(ARCH.batches()),
    "generator": lambda: (batch for batch in ARCH.batches()),
    "DataLoader": lambda: DataLoader(TensorDataset(torch.cat(ARCH.batches())), batch_size=3),
    "no length": OnlyIterable,
    "with labels": lambda: [(batch, torch.zeros(3)) for batch in ARCH.batches()],
    "lists with labels": lambda: [[batch, torch.zeros(3), "name"] for batch in ARCH.batches()],
    "named tuples": lambda: [Named(batch, torch.zeros(3)) for batch in ARCH.batches()],
    "keywords": lambda: [{"x": batch} for batch in ARCH.batches()],
    "numpy": lambda: [batch.numpy() for batch in ARCH.batches()],
    "numpy in tuples": lambda: [(batch.numpy(), np.zeros(3)) for batch in ARCH.batches()],
    "numpy keywords": lambda: [{"x": batch.numpy()} for batch in ARCH.batches()],
    "callable": lambda: lambda model: [model(batch) for batch in ARCH.batches()],
    "requires grad": lambda: [batch.requires_grad_() for batch in ARCH.batches()],
}


@pytest.mark.parametrize("form", _FORMS)
def test_every_form_of_data_gives_the_same_state(form: str, expected: nn.Module) -> None:
    assert_same_state(_loaded(_FORMS[form]()), expected)


@pytest.mark.parametrize("data", [torch.zeros(2, 3, 12, 12), np.zeros((2, 3, 12, 12)), {"x": torch.zeros(1)}, 5])
def test_a_single_batch_is_not_taken_for_many(data: Any) -> None:
    for call in (
        lambda: qc.calibrate(prepared("eager-x86", "plain"), data),
        lambda: qc.load_checkpoint(prepared("eager-x86", "plain"), ARCH.state(), calibration=data),
    ):
        with pytest.raises(qc.CalibrationError, match="no calibration data"):
            call()


def test_a_statistic_of_a_whole_tensor_is_not_for_quantizers_with_a_range_per_channel() -> None:
    activation = FakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8, ch_axis=1
    )
    model = nn.Sequential(QuantStub(), nn.Linear(4, 4)).train()
    model.qconfig = QConfig(activation=activation, weight=default_weight_fake_quant)
    model = prepare_qat(model)
    state = nn.Sequential(QuantStub(), nn.Linear(4, 4)).state_dict()
    batches = [torch.randn(3, 4)]
    with untouched(model), pytest.raises(qc.CalibrationError, match="no statistic can be chosen for 2 quantizers"):
        qc.load_checkpoint(model, state, calibration=batches, statistic="mse")
    qc.load_checkpoint(model, state, calibration=batches)
    model.eval()(batches[0])


def test_an_observer_that_is_off_learns_nothing_from_training() -> None:
    model = prepared("eager-x86", "plain").apply(disable_observer)
    report = qc.load_checkpoint(model, ARCH.state(), calibration="defer")
    assert any("training does not set it" in text for text in report.warnings)
    assert report.provenance("fc.activation_post_process.scale").endswith("and training does not set it")
    fresh = qc.load_checkpoint(prepared("eager-x86", "plain"), ARCH.state(), calibration="defer")
    assert fresh.warnings == ()


def test_loads_in_several_threads_leave_the_warnings_of_the_process_as_they_are() -> None:
    models, state, batches = [prepared("eager-x86", "plain") for _ in range(8)], ARCH.state(), ARCH.batches()
    before, call = list(warnings.filters), nn.Module.__call__
    with ThreadPoolExecutor(4) as pool:
        loads = pool.map(lambda model: qc.load_checkpoint(model, state, calibration=batches), models)
        assert all(report.batches == 2 for report in loads)
    assert warnings.filters == before
    assert nn.Module.__call__ is call


def test_a_generator_is_consumed_exactly_once() -> None:
    taken = []

    def data() -> Iterator[Tensor]:
        for batch in ARCH.batches(3):
            taken.append(1)
            yield batch

    model = prepared("eager-x86", "plain")
    report = qc.load_checkpoint(model, ARCH.state(), calibration=data())
    assert (len(taken), report.batches) == (3, 3)


def test_a_generator_is_whole_also_where_its_first_batch_tells_names() -> None:
    """The names of this model need a forward; the batch that is looked at first counts for the ranges, too."""
    arch = ARCHS["dynamic"]
    models = [prepared("eager-x86", "dynamic") for _ in range(2)]
    for model, data in zip(models, (arch.batches(), iter(arch.batches())), strict=True):
        qc.load_checkpoint(model, arch.state(), calibration=data, float_model=arch.make())
    assert_same_state(models[1], models[0])


def test_inputs_takes_any_batch(expected: nn.Module) -> None:
    batches = [{"meta": i, "pixels": batch.permute(0, 2, 3, 1)} for i, batch in enumerate(ARCH.batches())]
    model = _loaded(batches, inputs=lambda batch: ((batch["pixels"].permute(0, 3, 1, 2).contiguous(),), {}))
    assert_same_state(model, expected)
    model = _loaded(batches, inputs=lambda batch: ((), {"x": batch["pixels"].permute(0, 3, 1, 2).contiguous()}))
    assert_same_state(model, expected)


def test_a_shuffled_loader_leaves_the_random_state_as_it_was() -> None:
    for name in ("plain", "dynamic"):
        arch, model = ARCHS[name], prepared("eager-x86", name)
        data = DataLoader(TensorDataset(torch.cat(arch.batches(4))), batch_size=3, shuffle=True)
        float_model = arch.make()
        before = torch.get_rng_state()
        qc.load_checkpoint(model, arch.state(), calibration=data, float_model=float_model)
        assert torch.equal(torch.get_rng_state(), before), name


def test_a_callable_is_given_the_model_in_eval_form_and_without_gradients() -> None:
    seen: list[tuple[bool, bool]] = []

    def run(model: nn.Module) -> None:
        seen.append((model.training, torch.is_grad_enabled()))
        model(ARCH.batches()[0])

    _loaded(run)
    assert seen == [(False, False)]


def test_forward_with_several_inputs_takes_as_many_as_it_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.fc = QuantStub(), nn.Linear(2, 2)

        def forward(self, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.fc(self.quant(a + b)) * scale

    model = Two().train()
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    state = Two().state_dict()
    qc.load_checkpoint(model, state, calibration=[(torch.zeros(1, 2), torch.ones(1, 2) * 3, "label")])
    assert model.quant.activation_post_process.activation_post_process.max_val == 3


def test_a_wrapper_does_not_hide_what_forward_takes(expected: nn.Module) -> None:
    """`DataParallel.forward(*inputs)` hands on all it is given."""
    model = nn.DataParallel(prepared("eager-x86", "plain"))
    qc.load_checkpoint(model, ARCH.state(), calibration=[(batch, torch.zeros(3)) for batch in ARCH.batches()])
    assert_same_state(model.module, expected)


class _Branch(nn.Module):
    """Not a wrapper, though its part is called as DDP calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.module = QuantStub(), nn.Linear(4, 4)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return self.module(self.quant(x if gain is None else x * gain))


def test_what_forward_takes_is_asked_of_the_model_and_not_of_a_part_called_module() -> None:
    model = _Branch().train()
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    qc.load_checkpoint(model, _Branch().state_dict(), calibration=[(torch.ones(2, 4), torch.tensor(100.0))])
    assert model.quant.activation_post_process.activation_post_process.max_val == 100


def test_a_quant_wrapper_is_given_what_it_takes() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor, features: bool = False) -> Tensor:
            return super().forward(x)

    model = QuantWrapper(Net(4, 4)).train()
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    state = QuantWrapper(Net(4, 4)).state_dict()
    assert qc.load_checkpoint(model, state, calibration=[(torch.ones(2, 4), torch.zeros(2))]).batches == 1


def test_what_a_forward_says_is_not_taken_for_nan() -> None:
    """A quantizer that has been entered and has seen nothing holds +inf and -inf; the batch is of another dtype."""
    model = prepared("eager-x86", "plain")
    batches = [(batch * 9).to(torch.uint8) for batch in ARCH.batches()]
    with untouched(model), pytest.raises(qc.CalibrationError, match="the forward raised RuntimeError") as caught:
        qc.load_checkpoint(model, ARCH.state(), calibration=batches)
    assert "Byte" in str(caught.value) and isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("at", ["made", "loaded"])
def test_inference_mode_does_not_reach_the_model(at: str) -> None:
    """What is loaded in it can be trained; what was made in it can still be loaded."""
    with torch.inference_mode(at == "made"):
        model = prepared("eager-x86", "plain")
    with torch.inference_mode(at == "loaded"):
        qc.load_checkpoint(model, ARCH.state(), calibration=ARCH.batches())
    assert {value.is_inference() for value in model.state_dict().values()} == {at == "made"}
    if at == "loaded":
        model(ARCH.batches()[0]).sum().backward()


@pytest.mark.parametrize("statistic", ["native", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_default_device_is_for_the_models_that_one_makes(tmp_path: Path, suffix: str, statistic: str) -> None:
    """Not for what is read, counted and written here: on the meta device nothing of it would have a value."""
    batches, options = ARCH.batches(), {"statistic": statistic, "keep": "bn1.num_batches_tracked"}
    half = {key: value.half() if value.is_floating_point() else value for key, value in ARCH.state().items()}
    expected, model = (prepared("eager-x86", "plain") for _ in range(2))
    qc.load_checkpoint(expected, half, calibration=batches, **options)
    with torch.device("meta"):
        file = qc.save_checkpoint(half, tmp_path / f"half{suffix}")
        qc.load_checkpoint(model, file, calibration=batches, **options)
        back = {key: value.clone() for key, value in qc.to_float(qc.save_checkpoint(model, tmp_path / "q.pt")).items()}
    assert_same_state(model, expected)
    assert_same_state(back, dict(qc.to_float(expected)))


def test_an_error_of_inputs_is_told_as_such() -> None:
    model = prepared("eager-x86", "plain")
    with pytest.raises(qc.CalibrationError, match="inputs= raised ZeroDivisionError on calibration batch 0"):
        qc.load_checkpoint(model, ARCH.state(), calibration=ARCH.batches(), inputs=lambda batch: 1 / 0)


def test_defer_leaves_ranges_to_training_with_observers_on() -> None:
    model = prepared("eager-x86", "plain")
    fresh = copy.deepcopy(model.state_dict())
    report = qc.load_checkpoint(model, ARCH.state(), calibration="defer")
    for key, value in model.state_dict().items():
        if "activation_post_process." in key and "weight_fake_quant" not in key:
            assert torch.equal(value, fresh[key]), key
            assert report.provenance(key).startswith("keep:"), key
        if key.endswith("observer_enabled"):
            assert value.item() == 1
    assert report.provenance("fc.activation_post_process.scale") == (
        "keep: deferred to the first training batches (calibration='defer')"
    )
    model(ARCH.batches()[0])
    assert (model.fc.activation_post_process.scale != 1).all()


def test_defer_and_a_saved_calibration_still_compute_weight_ranges(expected: nn.Module) -> None:
    model = _loaded("defer")
    for key, value in expected.state_dict().items():
        if "weight_fake_quant" in key:
            assert torch.equal(model.state_dict()[key], value), key


def test_data_that_nothing_needs_is_said() -> None:
    report = qc.load_checkpoint(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), calibration=[torch.ones(1, 2)])
    assert "calibration data was not used: nothing needed it" in report.warnings


# --- a calibration that is kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "name", "form"), [*((*case, "object") for case in CASES), (*CASES[0], "file"), (*CASES[3], "older file")]
)
def test_a_saved_calibration_gives_what_the_data_gave(flow: str, name: str, form: str, tmp_path: Path) -> None:
    arch, source = ARCHS[name], prepared(flow, name)
    qc.load_checkpoint(source, arch.state(), calibration=arch.batches())
    calibration = qc.calibrate(source, arch.batches())
    if form == "older file":  # its names are without the segments of wrappers
        calibration = replace(calibration, tensors={canonical(key): v for key, v in calibration.tensors.items()})
    path = calibration.save(tmp_path / "ranges.safetensors")
    model = prepared(flow, name)
    report = qc.load_checkpoint(model, arch.state(), calibration=calibration if form == "object" else path)
    assert_same_state(model, source)
    assert report.batches == 0
    assert report.findings == ()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_save_and_load_are_inverse(tmp_path: Path, suffix: str) -> None:
    model = _loaded(ARCH.batches())
    calibration = qc.calibrate(model, ARCH.batches(), statistic="percentile")
    back = qc.Calibration.load(calibration.save(tmp_path / f"ranges{suffix}"))
    assert (back.statistic, back.batches, back.weights) == ("percentile", 2, calibration.weights)
    assert list(back.tensors) == list(calibration.tensors)
    assert_same_state(dict(back.tensors), dict(calibration.tensors))


def test_a_calibration_goes_under_any_wrapper() -> None:
    calibration = qc.calibrate(_loaded(ARCH.batches()), ARCH.batches())
    wrapped = nn.DataParallel(prepared("eager-x86", "plain"))
    report = qc.load_checkpoint(wrapped, ARCH.state(), calibration=calibration)
    assert_same_state(wrapped.module, _loaded(ARCH.batches()))
    assert report.findings == ()


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.fc = QuantStub(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.quant(x))


class Namesakes(_Part):
    """A part has the name of a wrapper, and in it are the names that are outside, too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(100 * super().forward(x))


def test_a_calibration_knows_namesakes_apart() -> None:
    def fresh() -> nn.Module:
        model = Namesakes().train()
        model.qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(model)

    state, batches, expected, model = Namesakes().state_dict(), [torch.randn(8, 4)], fresh(), fresh()
    qc.load_checkpoint(expected, state, calibration=batches)
    calibration = qc.calibrate(expected, batches)
    qc.load_checkpoint(model, state, calibration=calibration)
    assert_same_state(model, expected)
    older = replace(calibration, tensors={canonical(key): value for key, value in calibration.tensors.items()})
    with untouched(model), pytest.raises(qc.CalibrationError, match="no range for 4 activation quantizers"):
        qc.load_checkpoint(model, state, calibration=older)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["fc.weight"].add_(1),
        lambda state: state["fc.weight"].copy_(state["fc.weight"].flip(0)),
        lambda state: state["bn1.running_var"].mul_(4),
    ],
    ids=["values", "order", "statistics"],
)
def test_a_calibration_of_other_weights_is_reported(change: Callable[[dict[str, Tensor]], object]) -> None:
    calibration = qc.calibrate(_loaded(ARCH.batches()), ARCH.batches())
    state = ARCH.state()
    change(state)
    report = qc.load_checkpoint(prepared("eager-x86", "plain"), state, calibration=calibration)
    assert "the saved calibration was taken with other weights than the ones loaded here" in report.warnings


def test_a_calibration_of_these_weights_is_not() -> None:
    calibration = qc.calibrate(_loaded(ARCH.batches()), ARCH.batches())
    assert qc.load_checkpoint(prepared("eager-x86", "plain"), ARCH.state(), calibration=calibration).findings == ()


def test_a_fingerprint_is_the_same_with_any_number_of_threads_and_on_every_dtype() -> None:
    """Its sums are those of numpy's integers; sums of floats would differ in their last bits."""
    count = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        model = nn.ParameterDict({name: nn.Parameter(torch.randn(n).to(dtype)) for name, n in _SIZES.items()})
        expected = []
        for name, value in model.items():
            bits = value.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
            with np.errstate(over="ignore"):
                ints = bits.numpy().astype(np.int64)
                sums = int(ints.sum()), int((ints * np.arange(1, 1 + len(ints))).sum())
            expected.append(f"{name}={dtype},{len(ints)},{sums[0]},{sums[1]}")
        digest = hashlib.blake2b("\n".join(sorted(expected)).encode(), digest_size=16).hexdigest()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert fingerprint(describe_model(model)) == digest, (dtype, threads)
        finally:
            torch.set_num_threads(count)


_SIZES = {"none": 0, "one": 1, "some": 7, "two blocks and one": (1 << 19) + 1}


def test_calibrate_takes_every_form_of_data() -> None:
    model = _loaded(ARCH.batches())
    first = qc.calibrate(model, ARCH.batches())
    with untouched(model):
        for form in ("generator", "with labels", "numpy", "keywords"):
            other = qc.calibrate(model, _FORMS[form]())
            assert_same_state(dict(other.tensors), dict(first.tensors))
            assert (other.statistic, other.batches, other.weights) == ("native", 2, first.weights)
        by_callable = qc.calibrate(model, lambda m: [m(batch) for batch in ARCH.batches()])
    assert_same_state(dict(by_callable.tensors), dict(first.tensors))
    assert by_callable.batches == 0


def test_scales_that_are_learnt_are_not_set_by_training() -> None:
    """torchao's range-learning quantizers refuse to run before they have one."""
    arch, model = ARCHS["transformer"], prepared("torchao-learned", "transformer")
    report = qc.load_checkpoint(model, arch.state(), calibration="defer")
    assert any("training does not set it" in text for text in report.warnings)
    assert any("make the optimizer after it" in text for text in report.warnings)
    with pytest.raises(ValueError, match="must be initialized"):
        model(arch.batches()[0])
    report = qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    assert not any("training does not set it" in text for text in report.warnings)
    model(arch.batches()[0])


class _Pair(NamedTuple):
    image: Any
    words: Any


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.fc = QuantStub(), nn.Linear(4, 2)

    def forward(self, batch: Any) -> Tensor:
        assert isinstance(batch["pair"], _Pair)
        assert isinstance(batch["pair"].image[0], Tensor)
        assert isinstance(batch["pair"].words, np.ndarray)
        return self.fc(self.quant(batch["pair"].image[0]))


def test_arrays_inside_of_a_batch_become_tensors() -> None:
    model = _Nested().train()
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    image = np.ones((3, 4), np.float32)
    batch = ({"pair": _Pair([image], np.array(["a", "b", "c"]))},)
    report = qc.load_checkpoint(model, _Nested().state_dict(), calibration=[batch])
    assert report.batches == 1
    assert float(model.quant.activation_post_process.activation_post_process.max_val) == 1
