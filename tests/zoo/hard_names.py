"""What is hard for the names of its state, or for whoever traces it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub

from zoo.arch import Arch, images, vector


class Shared(nn.Module):
    """One convolution under one name, called twice; one linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.fc1 = nn.Linear(3, 3)
        self.fc2 = self.fc1

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = self.bn(self.conv(x))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class Constants(nn.Module):
    """A buffer that is not saved, one that is, and a plain tensor."""

    mask: Tensor
    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("mask", torch.linspace(0.5, 1, 4).reshape(4, 1, 1), persistent=False)
        self.register_buffer("gain", torch.rand(4, 1, 1) + 0.5)
        self.shift = torch.linspace(-1, 1, 4).reshape(4, 1, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) * self.mask * self.gain + self.shift
        return self.fc(torch.relu(x).mean((2, 3)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.right = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.right_bn = nn.BatchNorm2d(4)
        self.merge = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.left(x)), F.relu(self.right_bn(self.right(x)))
        x = self.merge(torch.cat([left, right], 1)) + left
        x = x * torch.tensor([0.5])
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Fixed(nn.Module):
    """Activations whose quantizers have fixed parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.sigmoid = nn.Sigmoid()
        self.fc2 = nn.Linear(8, 8)
        self.tanh = nn.Tanh()
        self.fc3 = nn.Linear(8, 4)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.fc3(self.tanh(self.fc2(self.sigmoid(self.fc1(x))))))


class Dynamic(nn.Module):
    """Does by the data what no tracer can follow, and its names follow no convention.

    A branch can be tried both ways. How many rows a tensor has is not known, and then only channels, if they differ, or
    data tell which BN is whose.
    """

    def __init__(self, last: int = 4, *, branch: bool = False) -> None:
        super().__init__()
        self.branch = branch
        self.entry = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.BatchNorm2d(last)
        self.exit = nn.Conv2d(4, last, 3, padding=1)
        self.a = nn.BatchNorm2d(4)
        self.fc = nn.Linear(last, 2)

    def forward(self, x: Tensor) -> Tensor:
        # First, so that not even a part of it is traced.
        if self.branch:
            if x.sum() > 1e6:
                x = x.clamp(-1, 1)
        else:
            x = torch.stack([row / max(1.0, float(row.abs().max()) / 1e6) for row in x])
        x = torch.relu(self.a(self.entry(x)))
        x = self.b(self.exit(x))
        return self.fc(x.mean((2, 3)))


class Partial(nn.Module):
    """Its backbone is quantized and its head is not, although it has BNs, too."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.backbone(x)).mean((2, 3)))


class Stubs(nn.Module):
    """Written for eager mode: stubs, and an addition that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(3, 4, 1)
        self.add = FloatFunctional()
        self.dequant = DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        return self.dequant(self.add.add_relu(self.bn(self.conv(x)), self.shortcut(x)))


def _sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(64, 2),
    )  # fmt: skip


ARCHS = (
    Arch("shared", Shared, images()),
    Arch("constants", Constants, images(), fuse=(("conv", "bn"),)),
    Arch("functional", Functional, images(), fuse=(("right", "right_bn"),)),
    Arch("fixed", Fixed, vector(6)),
    Arch("dynamic", Dynamic, images(), fuse=(("entry", "a"), ("exit", "b"))),
    Arch("branching", lambda: Dynamic(branch=True), images(), fuse=(("entry", "a"), ("exit", "b"))),
    Arch("dynamic_channels", lambda: Dynamic(6), images(), fuse=(("entry", "a"), ("exit", "b"))),
    Arch("partial", Partial, images(), fuse=(("backbone.0", "backbone.1", "backbone.2"),), skip=("head",)),
    Arch("stubs", Stubs, images(), fuse=(("conv", "bn"),)),
    Arch("sequential", _sequential, images(), fuse=(("0", "1", "2"), ("3", "4"))),
)
