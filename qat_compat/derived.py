"""Weights that a module works out anew in every forward: pruning, weight and spectral norms, parametrizations.

Between two forwards `module.weight` is what the last one left there, or reading it changes the module: after a load it
is the weight of the tensors from before, and a spectral norm in training mode takes a step whenever it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["weight_like", "weight_of"]

_MAKERS = (BasePruningMethod, SpectralNorm, WeightNorm)  # hooks that make the weight before each forward


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a forward in eval mode would use now.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=0.5)
        >>> with torch.no_grad():
        ...     _ = layer.weight_orig.fill_(3.0)
        >>> float(weight_of(layer).max()), "weight" in dict(layer.named_parameters())
        (3.0, False)
    """
    held = module._parameters.get("weight")
    if held is not None:
        return held
    with _resting(module):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _MAKERS):
                hook(module, ())
        value: Tensor = module.weight  # type: ignore[assignment]
        return value


def weight_like(module: nn.Module) -> Tensor:
    """A tensor with the shape, dtype and device of the weight; the module is only looked at.

    Example:
        >>> weight_like(nn.Linear(3, 2)).shape
        torch.Size([2, 3])
    """
    held = module._parameters.get("weight")
    if held is not None:
        return held
    with _resting(module), torch.no_grad():
        value: Tensor = module.weight  # type: ignore[assignment]
        return value


@contextmanager
def _resting(module: nn.Module) -> Iterator[None]:
    """In eval mode, in which no norm takes a step."""
    training = [one for one in module.modules() if one.training]
    try:
        for one in training:
            one.training = False
        yield
    finally:
        for one in training:
            one.training = True
