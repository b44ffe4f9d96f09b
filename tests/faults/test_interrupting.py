"""Ctrl-C at any moment: the model, its hooks and the process are as before, or the load is complete."""

from __future__ import annotations

import gc
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.fx
from test_apply import untouched
from torch import Tensor, nn
from torch.ao import quantization as tq

import qat_compat as qc
from qat_compat.isolation import quiet
from qat_compat.transaction import Transaction

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers of this kind")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.relu1(self.bn1(self.conv1(self.quant(x)))))


def prepared() -> nn.Module:
    model = tq.fuse_modules_qat(Net().train(), [["conv1", "bn1", "relu1"]])
    model.qconfig = tq.get_default_qat_qconfig("x86")
    return tq.prepare_qat(model)


BATCHES = [torch.ones(2, 3, 5, 5)]


@pytest.fixture
def timer() -> Iterator[Callable[[float], None]]:
    """Raises KeyboardInterrupt after so many seconds, wherever Python is then."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)  # type: ignore[misc]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def process() -> tuple[Any, ...]:
    """What all code in the process shares."""
    methods = (nn.Module.__call__, nn.Module.__getattr__, torch.fx._symbolic_trace.CURRENT_PATCHER)
    return (*methods, torch.is_grad_enabled(), gc.isenabled(), list(warnings.filters))


def test_a_load_can_be_interrupted_anywhere(timer: Callable[[float], None]) -> None:
    state, generator = Net().state_dict(), random.Random(0)
    model = prepared()
    qc.load_checkpoint(model, state, calibration=BATCHES)
    started = time.perf_counter()
    qc.load_checkpoint(model, state, calibration=BATCHES)
    whole = time.perf_counter() - started
    before, interrupted = process(), 0
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for _ in range(150):
        try:
            timer(generator.random() * whole + 1e-6)
            qc.load_checkpoint(model, state, calibration=BATCHES)
            timer(0)
        except KeyboardInterrupt:
            interrupted += 1
        assert process() == before
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert interrupted > 20
    assert all(map(torch.equal, qc.to_float(model).values(), state.values()))  # it held them before, and holds them now


def _interrupted_after(line: str, function: Callable[..., Any], call: Callable[[], object]) -> None:
    """Call, with an interrupt where the function has just done what is on that line."""
    code = function.__code__
    source = open(code.co_filename).read().split("\n")  # noqa: SIM115, PTH123
    wanted = next(number for number, text in enumerate(source, 1) if line in text)
    pending = [True]

    def local(_frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line" and pending and _frame.f_lineno == wanted + 1:
            pending.clear()
            raise KeyboardInterrupt
        return local

    tracer = sys.gettrace()
    sys.settrace(lambda frame, _event, _argument: local if frame.f_code is code else None)
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        sys.settrace(tracer)
    assert not pending


@pytest.mark.parametrize("what", ["a refused load", "a calibration"])
def test_the_way_back_is_gone_to_its_end(what: str) -> None:
    model, state = prepared(), Net().state_dict()
    qc.load_checkpoint(model, state, calibration=BATCHES)
    spoilt = [batch * float("nan") for batch in BATCHES]
    calls: dict[str, Callable[[], object]] = {
        "a refused load": lambda: qc.load_checkpoint(model, state, calibration=spoilt),
        "a calibration": lambda: qc.calibrate(model, BATCHES),
    }
    with untouched(model):
        _interrupted_after("module.__dict__.clear()", Transaction._put_back, calls[what])


def test_hooks_that_were_half_registered_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state, count = prepared(), Net().state_dict(), [0]
    real = nn.Module.register_forward_hook

    def register(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(nn.Module, "register_forward_hook", register)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        qc.load_checkpoint(model, state, calibration=BATCHES)


def test_warnings_are_heard_again_after_an_interrupt() -> None:
    before = list(warnings.filters)
    with pytest.raises(KeyboardInterrupt), quiet():
        raise KeyboardInterrupt
    assert warnings.filters == before
