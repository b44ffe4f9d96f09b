"""Fresh processes, devices, floors, and the figures that a run gives."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qat_compat

__all__ = [
    "Figures",
    "device",
    "floor",
    "fresh",
    "interleaved",
    "machine",
    "pass_over",
    "peak_of",
    "summary",
    "timed",
    "touch_memory",
    "use_device",
]

Figures = dict[str, float]  # what one process measured
_ROOT = Path(__file__).parent.parent
_BLOCK = 8 << 20
_NOISY = 1.5  # largest by smallest time of one figure
_device = torch.device("cpu")


def use_device(name: str) -> None:
    """Have the models of this process on that device."""
    global _device
    _device = torch.device(name) if name == "cpu" else torch.device(name, 0)


def device() -> torch.device:
    """Where the models are."""
    return _device


def _wait() -> None:
    """Until the device has done what it was given."""
    torch.get_device_module(_device).synchronize(_device)


Cases = Sequence[tuple[str, ...]]  # the arguments of each


def interleaved(cases: Cases, runs: int, measure: Callable[..., Figures]) -> dict[tuple[str, ...], list[Figures]]:
    """Each case `runs` times, in turn, so that a slow moment of the machine hits every one."""
    taken: dict[tuple[str, ...], list[Figures]] = {case: [] for case in cases}
    for _ in range(runs):
        for case in cases:
            taken[case].append(measure(*case))
    return taken


def fresh(*arguments: str) -> Figures:
    """One case of a suite in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--device", _device.type, "--one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def timed(call: Callable[[], object]) -> Figures:
    """Wall-clock and CPU seconds of one call, until the device is done with it."""
    _wait()
    cpu, started = time.process_time(), time.perf_counter()
    call()
    _wait()
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def touch_memory(nbytes: int) -> None:
    """Use memory once and give it back, for what follows to find pages that exist, on the device as on the host.

    A virtual machine that reports its free pages gives them to its host, and takes about a second per gigabyte to get
    them back: that is a figure of the host, not of a way to load.
    """
    with mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, nbytes, mmap.PAGESIZE):
            memory[offset] = 1
    if _device.type != "cpu":
        torch.empty(nbytes, dtype=torch.uint8, device=_device)  # torch keeps it for who asks next


def floor(path: Path) -> float:
    """Seconds that the bytes of a file or folder need to where the model is, if nothing else is done.

    Nothing can be faster.

    To the CPU they are read, with two threads, into blocks that stay in the cache. To another device they cross the
    bus, from pinned memory; where reading them (with eight threads) takes longer, that is the floor.
    """
    files = [one for one in path.iterdir() if one.stat().st_size] if path.is_dir() else [path]
    if _device.type == "cpu":
        return sum(_read_seconds(file, file.stat().st_size, threads=2) for file in files)
    reading = sum(_read_seconds(file, file.stat().st_size, threads=8) for file in files)
    return max(reading, _bus_seconds(sum(file.stat().st_size for file in files)))


def _bus_seconds(size: int) -> float:
    here = torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_BLOCK, dtype=torch.uint8, device=_device)
    there.copy_(here, non_blocking=True)
    count = -(-size // _BLOCK)
    seconds = timed(lambda: [there.copy_(here, non_blocking=True) for _ in range(count)])["seconds"]
    return seconds * size / (count * _BLOCK)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that each keep to a processor of their own: a scheduler may leave two on one for longer than it takes."""
    if not hasattr(os, "sched_setaffinity"):
        return ThreadPoolExecutor(threads)
    processors = itertools.cycle(sorted(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(threads, initializer=lambda: os.sched_setaffinity(0, {next(processors)}))


def _read_seconds(path: Path, size: int, threads: int) -> float:
    descriptor = os.open(path, os.O_RDONLY)
    ring = [bytearray(_BLOCK) for _ in range(threads)]

    def read(worker: int) -> None:
        view = memoryview(ring[worker])
        for offset in range(worker * _BLOCK, size, threads * _BLOCK):
            os.preadv(descriptor, [view[: min(_BLOCK, size - offset)]], offset)

    try:
        with _pool(threads) as pool:
            list(pool.map(read, range(threads)))  # warms the page cache and the ring
            started = time.perf_counter()
            list(pool.map(read, range(threads)))
            return time.perf_counter() - started
    finally:
        os.close(descriptor)


def pass_over(tensors: Sequence[Tensor]) -> float:
    """Seconds that one look at every byte of tensors in memory takes, by two threads or by the device."""
    parts = [part for tensor in tensors for part in tensor.detach().view(-1).view(torch.int64).split(_BLOCK // 8)]
    if _device.type != "cpu":
        return timed(lambda: [part.max() for part in parts])["seconds"]
    arrays = [part.numpy() for part in parts]
    with _pool(2) as pool:
        return min(timed(lambda: list(pool.map(np.max, arrays)))["seconds"] for _ in range(2))


def peak_of(call: Callable[[], object]) -> tuple[int, int]:
    """Resident bytes before a call, and the most during it; zeros where the system does not say (not Linux)."""
    counter = Path("/proc/self/clear_refs")
    if not counter.exists():
        call()
        return 0, 0
    counter.write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    call()
    return before, _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def summary(figures: Sequence[Figures], **more: Any) -> dict[str, Any]:
    """One row: the median of the times with their range, and whether they agree."""
    seconds = [one["seconds"] for one in figures]
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "cpu_s": statistics.median(one.get("cpu", 0.0) for one in figures),
        "runs": len(seconds),
        "noisy": max(seconds) > _NOISY * min(seconds),
        **more,
    }


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    import safetensors

    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "device": _device.type,
        "processor": model,
        "accelerator": "" if _device.type == "cpu" else torch.get_device_module(_device).get_device_name(_device),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": "".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "qat_compat": qat_compat.__version__,
        "commit": _commit(),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _commit() -> str:
    if (git := shutil.which("git")) is None:
        return "unknown"
    command = [git, "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
