"""Networks in the manner of those that people quantize, made small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.arch import BATCH, Arch, images
from zoo.sequences import Block

_VOCABULARY = 12


class RepVGGBlock(nn.Module):
    """Three branches that are summed: 3x3, 1x1 and, where shapes allow, the input itself, each with its BN."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.rbr_dense = self._branch(inner, outer, 3, stride)
        self.rbr_1x1 = self._branch(inner, outer, 1, stride)
        self.rbr_identity = nn.BatchNorm2d(inner) if inner == outer and stride == 1 else None

    @staticmethod
    def _branch(inner: int, outer: int, kernel: int, stride: int) -> nn.Sequential:
        branch = nn.Sequential()
        branch.add_module("conv", nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False))
        branch.add_module("bn", nn.BatchNorm2d(outer))
        return branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return torch.relu(y if self.rbr_identity is None else y + self.rbr_identity(x))


class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage0 = RepVGGBlock(3, 4, 2)
        self.stage1 = nn.Sequential(RepVGGBlock(4, 4), RepVGGBlock(4, 8, 2))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stage1(self.stage0(x)).mean((2, 3)))


class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Decoder(nn.Module):
    """A causal language model whose output layer is its embedding."""

    causal: Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(1, 6, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.up, self.gate, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)
        self.lm_head = nn.Linear(width, _VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("causal", torch.full((6, 6), -1e4).triu(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).transpose(-2, -1) / 4 + self.causal
        x = x + torch.softmax(scores, -1) @ self.value(y)
        return self.lm_head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class MoE(nn.Module):
    """Each token goes to two of three experts."""

    def __init__(self, width: int = 16, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = torch.softmax(self.gate(flat), -1).topk(2, -1)
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            result = result.index_add(0, token, expert(flat[token]) * weights[token, place].unsqueeze(-1))
        return x + result.view_as(x)


class ViT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width) * 0.1)
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.stages = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class ConvUnit(nn.Module):
    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outer)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C2f(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.half = outer // 2
        self.cv1 = ConvUnit(inner, outer)
        self.cv2 = ConvUnit(self.half * 3, outer)
        self.m = nn.ModuleList([ConvUnit(self.half, self.half, 3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for unit in self.m:
            parts.append(parts[-1] + unit(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class YOLO(nn.Module):
    """Backbone, a path back up, and a head per scale, in the manner of YOLOv8: a list of modules with numbers."""

    def __init__(self) -> None:
        super().__init__()
        layers = [ConvUnit(3, 4, 3, 2), ConvUnit(4, 8, 3, 2), C2f(8, 8), ConvUnit(8, 8, 3, 2), C2f(8, 8), C2f(16, 8)]
        self.model = nn.ModuleList(layers)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.box, self.cls = (
            nn.ModuleList(nn.Sequential(ConvUnit(8, 8, 3), nn.Conv2d(8, outer, 1)) for _ in range(2))
            for outer in (4, 2)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.model[2](self.model[1](self.model[0](x)))
        coarse = self.pool(self.model[4](self.model[3](fine)))
        fine = self.model[5](torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1))
        return [torch.cat([self.box[i](y), self.cls[i](y)], 1) for i, y in enumerate((fine, coarse))]


def _tokens() -> Tensor:
    return torch.randint(0, _VOCABULARY, (BATCH, 6))


_UNIT = (("conv", "bn"),)
ARCHS = (
    Arch("repvgg", RepVGG, images(), pairs=_UNIT),
    Arch("lstm", LSTMTagger, _tokens),
    Arch("decoder", Decoder, _tokens),
    Arch("moe", MoE, lambda: torch.randn(BATCH, 6, 16)),
    Arch("vit", ViT, images()),
    Arch("convnext", ConvNeXt, images()),
    Arch("yolo", YOLO, images(3, 32), pairs=_UNIT),
)
