"""What the tests of live third-party frameworks share: one float model, and the twin that each framework makes itself.

`prepare(float model, batches)` is a framework's own way to a prepared and calibrated model.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.conventions import CONVENTIONS, Grid
from qat_compat.frameworks import Quantizer
from qat_compat.frameworks.modelopt_quantizer import AmaxQuantizer
from qat_compat.testing import assert_same_output, assert_same_state, scramble
from qat_compat.testing.scrambling import settle


class Encoding(NamedTuple):
    """What a quantizer holds: the name of a convention, its tensors, and the grid."""

    convention: str
    tensors: dict[str, Tensor]
    grid: Grid

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, in the dtype of the tensors."""
        return CONVENTIONS[self.convention].qparams(self.tensors, self.grid)


def encoding_of(quantizer: Quantizer) -> Encoding | None:
    """None where it holds no range, or none that another framework could be told."""
    if isinstance(quantizer, AmaxQuantizer):
        amax, settings = quantizer.module._buffers.get("_amax"), quantizer.settings
        if amax is None:
            return None
        if settings.bits == (4, 3) and (settings.block_sizes or {}).get("type") != "dynamic":  # goes nowhere else
            return Encoding("modelopt.e4m3", {"_amax": amax}, Grid(8))
    form = quantizer.form()
    if form is None:
        return None
    held = {name: attrgetter(leaf)(quantizer.module) for name, leaf in form.leaves.items()}
    tensors = {name: quantizer.state(form.leaves[name], value) for name, value in held.items() if value is not None}
    known = {name: value.detach() for name, value in tensors.items() if value is not None}
    return Encoding(form.convention, known, form.grid) if set(known) == set(form.leaves) else None


NativePrepare = Callable[[nn.Module, Sequence[Tensor]], nn.Module]


class Net(nn.Module):
    """Convolutions with and without bias and BN, linear layers, a function between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


def make_float(seed: int = 0) -> nn.Module:
    """The float model in train mode; equal for equal seeds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net().train()
        settle(model, [((batch,), {}) for batch in batches(seed=seed)])
    return model


def float_state(seed: int = 1) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in make_float(seed).state_dict().items()}


def batches(count: int = 2, seed: int = 100) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 3, 8, 8, generator=generator) for _ in range(count)]


def native(prepare: NativePrepare, state: dict[str, Tensor], data: Sequence[Tensor]) -> nn.Module:
    """The framework's own way: load the float weights, prepare, calibrate."""
    model = make_float()
    model.load_state_dict(state)
    return prepare(model, data)


def other(prepare: NativePrepare) -> nn.Module:
    """A prepared model of other weights, calibrated with other data."""
    return prepare(scramble(make_float(7)), [3 * batch for batch in batches(seed=8)])


class NativeTwin(NamedTuple):
    native: nn.Module
    loaded: nn.Module
    report: Any


def assert_native_twin(prepare: NativePrepare, *, outputs: bool = True, **options: Any) -> NativeTwin:
    """Assert that a float state goes into a prepared model as if that had been prepared from it, bit for bit."""
    state, data = float_state(), batches()
    twin = native(prepare, state, data)
    loaded = other(prepare)
    modes = {name: module.training for name, module in loaded.named_modules()}
    report = qc.load_checkpoint(loaded, state, calibration=data, **options)
    assert_same_state(loaded, twin)
    assert {name: module.training for name, module in loaded.named_modules()} == modes
    if outputs:
        assert_same_output(loaded, twin, data)
    with tempfile.TemporaryDirectory() as folder:  # of what streams from a file, ranges are worked out meanwhile
        streamed = other(prepare)
        path = qc.save_checkpoint(state, f"{folder}/float.safetensors")
        qc.load_checkpoint(streamed, path, calibration=data, **options)
        assert_same_state(streamed, twin)
    return NativeTwin(twin, loaded, report)


def assert_native_resume(prepare: NativePrepare, trained: nn.Module, *, outputs: bool = True) -> None:
    """Assert that a framework's own state goes into an equal model as it is, with and without data at hand."""
    saved = copy.deepcopy(trained.state_dict())
    for source, data in ((saved, None), (dict(saved), None), (saved, batches(seed=9))):
        fresh = other(prepare)
        report = qc.load_checkpoint(fresh, source, calibration=data)
        assert (report.synthesized, report.derived) == (0, 0)
        assert_same_state(fresh.state_dict(), saved)
        if outputs:
            assert_same_output(fresh, trained, batches())


def assert_native_float(trained: nn.Module, state: dict[str, Tensor], sources: Sequence[Any] = ()) -> None:
    """Assert that a prepared model, its state_dict and its files give the float state again, and load strictly."""
    for source in (trained, trained.state_dict(), *sources):
        for options in ({}, {"like": make_float()}):
            back = qc.to_float(source, **options)
            assert_same_state(dict(back), state)
            assert list(back) == list(state)
            make_float().load_state_dict(dict(back), strict=True)


def train(model: nn.Module, steps: int = 2) -> nn.Module:
    """A few steps of training, so that weights and ranges are no longer those of calibration."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for batch in batches(steps, seed=11):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return model
