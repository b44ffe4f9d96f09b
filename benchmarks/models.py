"""Models in the shapes that people load, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

__all__ = ["MODELS", "blank", "build", "same_values", "write_files"]


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
    "resnet152-like": _resnet,  # 0.22 GB in 900 tensors
    "flat-20k": lambda: _flat(20_000),  # 20,000 modules of one small tensor
}


def build(name: str, device: str = "cpu") -> nn.Module:
    """The model of that name, with weights that are the same every time."""
    torch.manual_seed(0)
    with torch.device(device):
        return MODELS[name]()


def blank(name: str) -> nn.Module:
    """The model with zeros, in memory that has been written to."""
    model = build(name)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def write_files(name: str, folder: Path) -> None:
    """The model's weights as `.safetensors` and `.pt`."""
    state = dict(build(name).state_dict())
    save_file(state, folder / f"{name}.safetensors")
    torch.save(state, folder / f"{name}.pt")


def same_values(model: nn.Module, expected: nn.Module) -> None:
    """Raise if any tensor of the two differs."""
    for (key, value), other in zip(_tensors(model), _tensors(expected), strict=True):
        if key != other[0] or not torch.equal(value, other[1]):
            raise RuntimeError(f"{key} is not what the file holds")


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors; `state_dict` itself is slow where a module has very many children."""
    return [
        (f"{path}.{name}", tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]
