"""Ultralytics' modules under their own names: what its files hold pickled, and the layers of YOLOv8."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=0.001, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c: int, add: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c, 3), Conv(c, c, 3)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1, add: bool = True) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c, add) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cv1(x).chunk(2, 1)
        y = [first, second]
        for bottleneck in self.m:
            y.append(bottleneck(y[-1]))
        return self.cv2(torch.cat(y, 1))


class DFL(nn.Module):
    def __init__(self, c1: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)


class SPPF(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(2 * c1, c2)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        for _ in range(3):
            y.append(self.m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class Concat(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


def _branch(c: int, inner: int, outer: int, depth: int) -> nn.Sequential:
    return nn.Sequential(
        Conv(c, inner, 3), *(Conv(inner, inner, 3) for _ in range(depth - 1)), nn.Conv2d(inner, outer, 1)
    )


class Detect(nn.Module):
    anchors = torch.empty(0)

    def __init__(self, nc: int, ch: tuple[int, ...], depth: int = 1) -> None:
        super().__init__()
        self.nc, self.stride = nc, torch.zeros(len(ch))  # a plain attribute, not a buffer
        self.cv2 = nn.ModuleList(_branch(c, 8, 16, depth) for c in ch)
        self.cv3 = nn.ModuleList(_branch(c, nc, nc, depth) for c in ch)
        self.dfl = DFL()

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        found = [torch.cat((a(one), b(one)), 1) for a, b, one in zip(self.cv2, self.cv3, x, strict=True)]
        if self.training:
            return found
        boxes = torch.cat([one[:, :16].flatten(2) for one in found], 2).unflatten(1, (4, 4)).transpose(2, 1)
        return [*found, self.dfl.conv(boxes.softmax(1))]


class DetectionModel(nn.Module):
    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.yaml = {"nc": nc, "backbone": [[-1, 1, "Conv", [8, 3, 2]]]}
        self.model = nn.Sequential(Conv(3, 8, 3, 2), C2f(8, 8), Conv(8, 16, 3, 2), Detect(nc, (8, 16)))
        self.names = {i: f"{i}" for i in range(nc)}
        self.criterion = None

    def forward(self, x: Tensor) -> list[Tensor]:
        small = self.model[1](self.model[0](x))
        return self.model[3]([small, self.model[2](small)])


class YOLOv8(nn.Module):
    """The 23 layers of YOLOv8, narrow; with one bottleneck in every C2f they hold 331 tensors."""

    JOINS: ClassVar = {11: (10, 6), 14: (13, 4), 17: (16, 12), 20: (19, 9)}  # the layers that each Concat is given

    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="nearest")
        backbone = [Conv(3, 4, 3, 2), Conv(4, 8, 3, 2), C2f(8, 8), Conv(8, 8, 3, 2), C2f(8, 8), Conv(8, 8, 3, 2)]
        backbone += [C2f(8, 8), Conv(8, 12, 3, 2), C2f(12, 12), SPPF(12, 12)]
        neck = [up, Concat(), C2f(20, 8, add=False), up, Concat(), C2f(16, 8, add=False)]
        neck += [Conv(8, 8, 3, 2), Concat(), C2f(16, 8, add=False)]
        neck += [Conv(8, 8, 3, 2), Concat(), C2f(20, 12, add=False)]
        self.model = nn.Sequential(*backbone, *neck, Detect(nc, (8, 8, 12), depth=2))
        self.names = {i: f"{i}" for i in range(nc)}

    def forward(self, x: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        for index, layer in enumerate(self.model):
            if index in self.JOINS:
                x = layer([seen[place] for place in self.JOINS[index]])
            elif index == 22:
                return layer([seen[15], seen[18], seen[21]])
            else:
                x = layer(x)
            seen.append(x)
        raise AssertionError("the last layer returns")
