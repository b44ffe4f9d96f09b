"""Models in the shapes that people load, with random weights."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MODELS", "build"]


class _LlamaLayer(nn.Module):
    """Projections of one decoder layer with the shapes of a 1B-parameter Llama."""

    def __init__(self, width: int, hidden: int, keys: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)


class _Bottleneck(nn.Module):
    """Three convolutions with their normalizations, as in a ResNet of 50 or more layers."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        shapes = ((outer, inner, 1), (inner, inner, 3), (inner, outer, 1))
        for index, (before, after, size) in enumerate(shapes, 1):
            setattr(self, f"conv{index}", nn.Conv2d(before, after, size, bias=False))
            setattr(self, f"bn{index}", nn.BatchNorm2d(after))


def _llama(layers: int, dtype: torch.dtype) -> nn.Module:
    return nn.ModuleList([_LlamaLayer(2048, 8192, 512) for _ in range(layers)]).to(dtype)


def _resnet() -> nn.Module:
    widths = [(64, 256)] * 3 + [(128, 512)] * 8 + [(256, 1024)] * 36 + [(512, 2048)] * 3
    return nn.ModuleList([_Bottleneck(inner, outer) for inner, outer in widths])


def _flat(count: int) -> nn.Module:
    return nn.ModuleList([nn.PReLU(4) for _ in range(count)])


# name -> how it is made; sizes in the comments are of the file
MODELS = {
    "tiny": lambda: nn.ModuleList([_Bottleneck(8, 16) for _ in range(2)]),  # for the tests
    "llama-4-layers-bf16": lambda: _llama(4, torch.bfloat16),  # 0.49 GB
    "llama-4-layers-fp32": lambda: _llama(4, torch.float32),  # 0.97 GB
    "resnet152-like": _resnet,  # 0.22 GB in 900 tensors
    "flat-5k": lambda: _flat(5_000),  # 5,000 modules of one small tensor
}


def build(name: str) -> nn.Module:
    """The model of that name, with weights that are the same every time."""
    torch.manual_seed(0)
    return MODELS[name]()
