"""What is measured: each function runs in a fresh process, verifies the values, and returns seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qat_compat as qc
from benchmarks.models import build
from qat_compat.driving import observe_weights
from qat_compat.frameworks import Needs, describe_model

__all__ = ["LOADS", "PLANS", "RANGES", "floor", "write_files"]

_BLOCK = 8 << 20


def write_files(name: str, folder: Path) -> dict[str, Path]:
    """The model's weights as `.safetensors` and `.pt`; written once per run."""
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in ("safetensors", "pt")}
    state = dict(build(name).state_dict())
    save_file(state, paths["safetensors"])
    torch.save(state, paths["pt"])
    return paths


def floor(path: Path, threads: int = 2) -> float:
    """Seconds to `pread` the whole file with two threads into blocks that are warm already: nothing can be faster."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    ring = [bytearray(_BLOCK) for _ in range(threads)]

    def read(worker: int) -> None:
        view = memoryview(ring[worker])
        for offset in range(worker * _BLOCK, size, threads * _BLOCK):
            os.preadv(descriptor, [view[: min(_BLOCK, size - offset)]], offset)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))  # warms the page cache and the ring
            started = time.perf_counter()
            list(pool.map(read, range(threads)))
            return time.perf_counter() - started
    finally:
        os.close(descriptor)


def _zeroed(name: str) -> nn.Module:
    model = build(name)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def _timed_load(name: str, load: Callable[[nn.Module], object]) -> float:
    """Seconds of the second load (the first warms the page cache), into a model with other values; then verified."""
    load(_zeroed(name))
    model = _zeroed(name)
    started = time.perf_counter()
    load(model)
    seconds = time.perf_counter() - started
    for key, value in build(name).state_dict().items():
        if not torch.equal(_get(model, key), value):
            raise RuntimeError(f"{key} is not what the file holds")
    return seconds


def _get(model: nn.Module, key: str) -> torch.Tensor:
    value: object = model
    for part in key.split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor)
    return value


# name -> (container, how); the first of each container is the baseline of its ratios
LOADS: dict[str, tuple[str, Callable[[nn.Module, Path], object]]] = {
    "load_file + load_state_dict": ("safetensors", lambda m, p: m.load_state_dict(load_file(p))),
    "qat_compat": ("safetensors", lambda m, p: qc.load_checkpoint(m, p, progress=False)),
    "qat_compat inplace": ("safetensors", lambda m, p: qc.load_checkpoint(m, p, inplace=True, progress=False)),
    "torch.load + load_state_dict": ("pt", lambda m, p: m.load_state_dict(torch.load(p, weights_only=True))),
    "qat_compat from .pt": ("pt", lambda m, p: qc.load_checkpoint(m, p, progress=False)),
}


def load(name: str, how: str, paths: dict[str, Path]) -> float:
    container, call = LOADS[how]
    return _timed_load(name, lambda model: call(model, paths[container]))


# --- ranges of weights ------------------------------------------------------------------------------------------------


def _prepared(width: int, dtype: torch.dtype) -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver, QConfig, prepare_qat

    weight = FakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    model = nn.Sequential(*(nn.Linear(width, 4 * width, bias=False) for _ in range(4))).to(dtype)
    model.qconfig = QConfig(activation=nn.Identity, weight=weight)
    return prepare_qat(model.train())


def _ranges(width: int, dtype: torch.dtype, ours: bool) -> float:
    torch.manual_seed(0)
    model = _prepared(width, dtype)
    chosen = [q for q in describe_model(model).quantizers if q.needs is Needs.WEIGHTS]
    native = [(q.module, q.source) for q in chosen]
    expected = _native_ranges(native)
    for quantizer in chosen:
        quantizer.listen()
    started = time.perf_counter()
    found = _our_ranges(chosen) if ours else _native_ranges(native)
    seconds = time.perf_counter() - started
    if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise RuntimeError("scales differ from the native observer's")
    return seconds


def _our_ranges(quantizers: list) -> list[torch.Tensor]:  # type: ignore[type-arg]
    observe_weights(quantizers)
    return [quantizer.module.scale for quantizer in quantizers]


def _native_ranges(native: list) -> list[torch.Tensor]:  # type: ignore[type-arg]
    scales = []
    with torch.no_grad():
        for module, source in native:
            module.activation_post_process.reset_min_max_vals()
            module.activation_post_process(source())
            scales.append(module.activation_post_process.calculate_qparams()[0])
    return scales


RANGES = {
    f"{label} {str(dtype).removeprefix('torch.')}": (dtype, ours)
    for dtype in (torch.float32, torch.bfloat16)
    for label, ours in (("native observer", False), ("qat_compat", True))
}


def ranges(name: str, width: int) -> float:
    dtype, ours = RANGES[name]
    return _ranges(width, dtype, ours)


# --- planning ---------------------------------------------------------------------------------------------------------

PLANS = (1_000, 4_000, 16_000, 32_000)


def plan(count: int) -> float:
    """Seconds to plan a load of `count` one-tensor modules under a wrapper prefix."""
    model = nn.ModuleList([nn.PReLU(4) for _ in range(count)])
    source = {f"module.{key}": value for key, value in model.state_dict().items()}
    qc.plan_load(model, source)
    started = time.perf_counter()
    made = qc.plan_load(model, source)
    seconds = time.perf_counter() - started
    if not made.ok or made.copied != count:
        raise RuntimeError("the plan is not complete")
    return seconds
