"""Values that no test can find right by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def scramble(model: nn.Module, seed: int = 1234) -> nn.Module:
    """Change every parameter and every persistent floating-point buffer of a model, in place.

    A test that loads into a model which holds the right values already proves nothing.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> bool((scramble(model).running_var > 0).all()), model.num_batches_tracked.item() != 0
        (True, True)

    Args:
        model: The model. Tensors on the meta device are left alone.
        seed: Two seeds give two different models.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                # Buffers may be variances: positive, away from zero.
                tensor.copy_(noise - 0.5 if id(tensor) in parameters else noise + 0.5)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7 + seed % 7)
    return model


def settle(model: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """Give every batch normalization a random affine part, and the statistics of the data that reach it.

    A fresh one multiplies by one and subtracts nothing, so that a tensor in the wrong place would not be seen.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> settle(norm, [((torch.randn(8, 2) + 3,), {})])
        >>> bool((norm.running_mean > 1).all()), norm.weight[0].item() < 0
        (True, True)

    Args:
        model: The model, in train mode.
        calls: Arguments and keyword arguments of the forwards.
    """
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS) and module.affine]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[0] *= -1  # ranges of a scaled weight must not assume a positive scale
            norm.bias.normal_(0, 0.2)
            norm.momentum = 0.7
        for args, kwargs in calls:
            model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
