"""What an architecture of the zoo is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.testing import QATModel
from qat_compat.testing.modes import DefaultInputs
from qat_compat.testing.scrambling import settle

BATCH = 3


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Args:
        name: Its name in test ids.
        build: Makes it, from torch's global RNG.
        example: One batch, from that RNG.
        fuse: Lists of module names for `fuse_modules_qat`.
        pairs: Child names (convolution, BN) to fuse wherever a module has both, in place of `fuse`.
        skip: Modules that are prepared with qconfig None, where a flow can do that by name.
        embeddings: Modules that eager flows quantize with `default_embedding_qat_qconfig`.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    fuse: tuple[tuple[str, ...], ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()

    def fusions(self, model: nn.Module) -> list[list[str]]:
        """What `fuse_modules_qat` is told."""
        return [list(names) for names in self.fuse or conv_norm_pairs(model, self.pairs)]

    def make(self, seed: int = 0) -> nn.Module:
        """The float model in train mode; equal for equal seeds."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build().train()
            settle(model, [DefaultInputs(model)(self.example()) for _ in range(2)])
        return model

    def state(self, seed: int = 1) -> dict[str, Tensor]:
        """A float state dict that `make()` does not have by itself."""
        return {key: value.clone() for key, value in self.make(seed).state_dict().items()}

    def batches(self, count: int = 2, seed: int = 100) -> list[Any]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [self.example() for _ in range(count)]

    def declared(self, **options: Any) -> QATModel:
        """The same for the compatibility matrix."""
        return QATModel(self.name, self.build, self.example, fuse=self.fusions, skip=self.skip, **options)


def conv_norm_pairs(model: nn.Module, names: tuple[tuple[str, str], ...]) -> tuple[tuple[str, ...], ...]:
    """Fuse lists for modules that hold a convolution and its BN under fixed names."""
    pairs = []
    for prefix, module in model.named_modules():
        for conv, norm in names:
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                pairs.append((f"{prefix}.{conv}".lstrip("."), f"{prefix}.{norm}".lstrip(".")))
    return tuple(pairs)


def images(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, channels, size, size)


def vector(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape).to(dtype)
