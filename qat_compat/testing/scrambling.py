"""Values that no test can find right by chance."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
