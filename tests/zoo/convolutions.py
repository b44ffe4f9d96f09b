"""Convolutional networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.arch import Arch, images, vector


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.fc(self.dropout(x.mean((2, 3))))


class Unordered(nn.Module):
    """BNs are declared before, and in another order than, the convolutions that they follow; all shapes are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_last = nn.BatchNorm2d(4)
        self.norm_first = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_first(self.first(x)))
        x = torch.relu(self.norm_last(self.second(x)))
        return self.fc(x.mean((2, 3)))


class Crossed(nn.Module):
    """bn1 follows conv2 and bn2 follows conv1: the naming convention is wrong, and every shape fits it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.conv1(x)))
        x = torch.relu(self.bn1(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)  # declared before bn1
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + identity)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def _residual_fuse() -> tuple[tuple[str, ...], ...]:
    blocks = ("layer1.0", "layer1.1", "layer2.0")
    pairs = [tuple(f"{block}.{name}{i}" for name in ("conv", "bn")) for block in blocks for i in (1, 2)]
    return (("stem.0", "stem.1", "stem.2"), *pairs, ("layer2.0.downsample.0", "layer2.0.downsample.1"))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.grouped_bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.expand_bn(self.expand(x)))
        x = F.relu6(self.depthwise_bn(self.depthwise(x)))
        return self.grouped_bn(self.grouped(x))


class Transposed(nn.Module):
    """Has a transposed convolution, which QAT cannot fuse with its BN: both stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.down_bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.up_bn = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down_bn(self.down(x)))
        return self.out(torch.relu(self.up_bn(self.up(x))))


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_a = nn.Conv1d(3, 4, 3)
        self.norm_a = nn.BatchNorm1d(4)
        self.relu_a = nn.ReLU()
        self.conv_b = nn.Conv1d(4, 4, 3, bias=False)
        self.norm_b = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_b(self.conv_b(self.relu_a(self.norm_a(self.conv_a(x)))))


class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 2)
        self.bn = nn.BatchNorm3d(3)
        self.relu = nn.ReLU()
        self.last = nn.Conv3d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.bn(self.conv(x))))


class LinearBn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.bn1 = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 8, bias=False)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(8, 8, bias=False)
        self.bn3 = nn.BatchNorm1d(8)
        self.fc4 = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.fc2(self.bn1(self.fc1(x))))
        return self.fc4(self.bn3(self.fc3(x)))


class DoubleConv(nn.Sequential):
    def __init__(self, inner: int, outer: int) -> None:
        layers = [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 4)
        self.pool = nn.MaxPool2d(2)
        self.down = DoubleConv(4, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.conv = DoubleConv(8, 4)
        self.outc = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        x = self.up(self.down(self.pool(skip)))
        return self.outc(self.conv(torch.cat([skip, x], 1)))


_DOUBLE = tuple(
    (f"{block}.{i}", f"{block}.{i + 1}", f"{block}.{i + 2}") for block in ("inc", "down", "conv") for i in (0, 3)
)


ARCHS = (
    Arch("plain", Plain, images(), fuse=(("conv1", "bn1", "relu1"), ("conv2", "bn2"))),
    Arch("unordered", Unordered, images(4), fuse=(("first", "norm_first"), ("second", "norm_last"))),
    Arch("crossed", Crossed, images(4), fuse=(("conv1", "bn2"), ("conv2", "bn1"))),
    Arch("residual", Residual, images(), fuse=_residual_fuse()),
    Arch(
        "depthwise",
        Depthwise,
        images(4),
        fuse=tuple((name, f"{name}_bn") for name in ("expand", "depthwise", "grouped")),
    ),
    Arch("transposed", Transposed, images(), fuse=(("down", "down_bn"),)),
    Arch("conv1d", Conv1d, vector(3, 12), fuse=(("conv_a", "norm_a", "relu_a"), ("conv_b", "norm_b"))),
    Arch("conv3d", Conv3d, vector(2, 4, 4, 4), fuse=(("conv", "bn", "relu"),)),
    Arch("linear_bn", LinearBn, vector(6), fuse=(("fc1", "bn1"), ("fc2", "relu2"), ("fc3", "bn3"))),
    Arch("unet", UNet, images(), fuse=_DOUBLE),
)
