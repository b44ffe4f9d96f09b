"""The three networks of MTCNN, in the shape of the published weights (facenet-pytorch)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.arch import Arch, images


class Stage(nn.Module):
    """Convolutions, each with a PReLU and some with a pooling after it."""

    def __init__(self, widths: tuple[int, ...], kernels: tuple[int, ...], pools: tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(kernels)
        for i, (kernel, pool) in enumerate(zip(kernels, pools, strict=True)):
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], kernel))
            self.add_module(f"prelu{i + 1}", nn.PReLU(widths[i + 1]))
            self.add_module(f"pool{i + 1}", nn.MaxPool2d(pool, 2, ceil_mode=True) if pool else nn.Identity())

    def features(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"pool{i}")(getattr(self, f"prelu{i}")(getattr(self, f"conv{i}")(x)))
        return x


class PNet(Stage):
    def __init__(self) -> None:
        super().__init__((3, 10, 16, 32), (3, 3, 3), (2, 0, 0))
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.features(x)
        return self.conv4_2(x), torch.softmax(self.conv4_1(x), 1)


class RNet(Stage):
    def __init__(self) -> None:
        super().__init__((3, 28, 48, 64), (3, 3, 2), (3, 3, 0))
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.prelu4(self.dense4(self.features(x).permute(0, 3, 2, 1).flatten(1)))
        return self.dense5_2(x), torch.softmax(self.dense5_1(x), 1)


class ONet(Stage):
    def __init__(self) -> None:
        super().__init__((3, 32, 64, 64, 128), (3, 3, 3, 2), (3, 3, 2, 0))
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.prelu5(self.dense5(self.features(x).permute(0, 3, 2, 1).flatten(1)))
        return self.dense6_2(x), self.dense6_3(x), torch.softmax(self.dense6_1(x), 1)


ARCHS = (Arch("pnet", PNet, images(3, 24)), Arch("rnet", RNet, images(3, 24)), Arch("onet", ONet, images(3, 48)))
