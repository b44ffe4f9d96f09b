"""The late device as `torch.device("late")`; `late.cpp` says what it is.

With `QAT_COMPAT_TESTS_DEVICE=late` the tests marked `gpu` run on it, and the matrix has it on its axis of devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["is_wanted", "register"]


def is_wanted() -> bool:
    """Whether tests are to run on it, and it can be made: it needs Linux and a compiler."""
    if os.environ.get("QAT_COMPAT_TESTS_DEVICE") != "late" or sys.platform != "linux":
        return False
    try:
        compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, check=False)
    except OSError:
        return False
    return compiler.returncode == 0


@cache
def register() -> None:
    """Make torch know it, for the rest of the process; the first time it is compiled, which takes half a minute."""
    from torch.utils.cpp_extension import load

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    torch.utils.rename_privateuse1_backend("late")
    source = Path(__file__).with_name("late.cpp")
    built = load("qat_compat_late_device", [str(source)], extra_cflags=["-std=c++20", "-O0"])
    torch._register_device_module("late", _module(built))
    torch.utils.generate_methods_for_privateuse1_backend()


def _module(built: Any) -> types.ModuleType:
    """What torch.cuda has, as far as anything here asks for it, and `waits`: name of a wait -> how often the host has
    waited so."""
    module: Any = types.ModuleType("torch.late")

    @contextmanager
    def stream(stream: torch.Stream) -> Iterator[None]:
        with stream:
            yield

    @contextmanager
    def device(device: Any) -> Iterator[None]:
        before = built.current_device()
        module.set_device(device)
        try:
            yield
        finally:
            module.set_device(before)

    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.current_device, module.device_count = built.current_device, built.device_count
    module.set_device = lambda device: built.set_device(_index(device))
    module.synchronize = lambda device=None: built.synchronize()
    module.manual_seed_all = lambda seed: None  # its kernels take random numbers of the CPU
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_device_name = lambda device=None: "the late device"
    module.Stream = lambda device="late": torch.Stream(device)
    module.Event = lambda: torch.Event("late")
    module.current_stream = torch.accelerator.current_stream
    module.stream, module.device = stream, device
    module.waits = built.waits
    return module


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0
