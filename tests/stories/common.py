"""What the stories share: the folder of real files, small models under the names of the real ones, and how each is
prepared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat

_VARIABLE = "QAT_COMPAT_REAL_CHECKPOINTS"
FOLDER = Path(os.environ.get(_VARIABLE, ""))


def real(test: Any) -> Any:
    """Mark a test that reads a file which the real system wrote."""
    skip = pytest.mark.skipif(_VARIABLE not in os.environ, reason=f"{_VARIABLE} is not set")
    return pytest.mark.real(skip(test))


def read(name: str, *path: str) -> dict[str, Tensor]:
    """A state dict of a real file, by torch itself."""
    node = torch.load(FOLDER / name, map_location="cpu", weights_only=True)
    for part in path:
        node = node[part]
    return dict(node)


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same keys, dtypes and bits."""
    assert sorted(actual) == sorted(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def images(count: int = 2, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 3, size, size, generator=generator) for _ in range(count)]


def eager(*fuse: tuple[str, ...], only: type[nn.Module] | None = None) -> Callable[[nn.Module], nn.Module]:
    """Eager QAT: fused pairs; of the whole model, or of one class of layer."""

    def prepare(model: nn.Module) -> nn.Module:
        model.train()
        if fuse:
            model = fuse_modules_qat(model, [list(names) for names in fuse])
        for module in model.modules() if only else [model]:
            if only is None or isinstance(module, only):
                module.qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(model, inplace=True)

    return prepare


class Cnn(nn.Module):
    """The network of the Lightning and SparseML files."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.head(self.pool(x).flatten(1))


FUSE_CNN = (("conv1", "bn1", "relu1"), ("conv2", "bn2", "relu2"))
PAIRS_CNN = (("conv1", "bn1"), ("conv2", "bn2"))


def stateful(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """A state dict in which every value is its own: norms with statistics, counters that have counted."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        made = torch.rand(value.shape, generator=generator) + 0.5
        state[key] = made.to(value.dtype) if value.is_floating_point() else torch.full_like(value, 40 + seed)
    return state
