"""Accelerators of whatever make: where torch has streams and events for one, all are asked for the same things."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["accelerator", "forked_rng", "has_streams"]


def accelerator() -> str | None:
    """The type of this machine's accelerator ("cuda", also under ROCm; "xpu"), if there is one and it has streams.

    Example:
        >>> accelerator() in (None, "cuda", "xpu")
        True
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and has_streams(found) else None


def has_streams(device: torch.device) -> bool:
    """Whether torch has streams and events for a device; those of the CPU do nothing, and Apple's MPS has none.

    Example:
        >>> import torch
        >>> has_streams(torch.device("cpu")), has_streams(torch.device("mps")), has_streams(torch.device("meta"))
        (True, False, False)
    """
    try:
        module = torch.get_device_module(device)
    except RuntimeError:  # of the meta device
        return False
    return hasattr(module, "Stream") and hasattr(module, "Event")


def forked_rng() -> AbstractContextManager[None]:
    """Random state of torch, on the CPU and on each device of an accelerator in use, as before in the end.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with forked_rng():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    kind = accelerator()
    if kind is None or not torch.get_device_module(kind).is_initialized():  # asking for its state would start it
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=range(torch.accelerator.device_count()), device_type=kind)
