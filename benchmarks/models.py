"""Models in the shapes that people load. What their weights are does not matter, only that it is known."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

__all__ = ["MODELS", "blank", "build", "same_values", "size_of", "write_files"]

_PATTERN = 1 << 20  # values after which those of a tensor repeat
_SHARDS = 4


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
        self.input_layernorm = nn.RMSNorm(width)
        self.post_attention_layernorm = nn.RMSNorm(width)


class _Bottleneck(nn.Module):
    """Three convolutions with their normalizations, as in a ResNet of 50 or more layers."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        shapes = ((outer, inner, 1), (inner, inner, 3), (inner, outer, 1))
        for index, (before, after, size) in enumerate(shapes, 1):
            setattr(self, f"conv{index}", nn.Conv2d(before, after, size, bias=False))
            setattr(self, f"bn{index}", nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(inner)) + x).relu()


class _BertLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("query", "key", "value", "dense"):
            setattr(self, name, nn.Linear(width, width))
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm, self.output_norm = nn.LayerNorm(width), nn.LayerNorm(width)


def _llama(layers: int, words: int) -> nn.Module:
    decoder = [_LlamaLayer(2048, 8192, 512) for _ in range(layers)]
    return nn.ModuleList([nn.Embedding(words, 2048), *decoder, nn.RMSNorm(2048)]).bfloat16()


def _resnet(blocks: Sequence[int]) -> nn.Module:
    widths = [(64 << stage, 256 << stage) for stage, count in enumerate(blocks) for _ in range(count)]
    return nn.Sequential(*[_Bottleneck(inner, outer) for inner, outer in widths])


def _yolo() -> nn.Module:
    """57 convolutions with their normalizations, in the widths of YOLOv8n."""
    widths = [16, 32, *[32] * 5, 64, *[64] * 9, 128, *[128] * 9, 256, *[256] * 5, *[128] * 8, *[64] * 17]
    convolutions = zip([3, *widths], widths, strict=False)
    return nn.ModuleList([nn.Sequential(nn.Conv2d(a, b, 3, bias=False), nn.BatchNorm2d(b)) for a, b in convolutions])


def _minilm() -> nn.Module:
    return nn.ModuleList([nn.Embedding(30522, 384), nn.Embedding(512, 384), *[_BertLayer(384) for _ in range(6)]])


def _flat(count: int) -> nn.Module:
    return nn.ModuleList([nn.PReLU(4) for _ in range(count)])


# name -> how it is made; sizes in the comments are of the file
MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: nn.Sequential(*[_Bottleneck(8, 16) for _ in range(2)]),  # for the tests
    "llama-1b-bf16": lambda: _llama(16, 128256),  # 2.47 GB
    "llama-4-layers-bf16": lambda: _llama(4, 256),  # 0.49 GB
    "resnet152-like": lambda: _resnet((3, 8, 36, 3)),  # 0.22 GB in 900 tensors
    "resnet50-like": lambda: _resnet((3, 4, 6, 3)),  # 0.09 GB in 288 tensors
    "yolov8n-like": _yolo,  # 21 MB in 342 tensors
    "minilm-like": _minilm,  # 90 MB in 98 tensors
    "flat-20k": lambda: _flat(20_000),  # 20,000 modules of one small tensor
}


def build(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """The model of that name, with values that are the same every time."""
    with torch.device("meta"):
        model = MODELS[name]()
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device="cpu")
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, (_, tensor) in enumerate(_tensors(model)):
            values = pattern.to(tensor.dtype)
            for block in tensor.view(-1).split(_PATTERN):
                block.copy_(values[: len(block)])
            if tensor.dtype.is_floating_point:
                tensor.view(-1)[0] = number  # no two tensors are alike
    return model.to(device)


def blank(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """The model with zeros, in memory that has been written to."""
    model = build(name, "meta").to_empty(device=device)
    with torch.no_grad():
        for _, tensor in _tensors(model):
            tensor.zero_()
    return model


def _write_shards(state: dict[str, Tensor], folder: Path) -> None:
    """As Hugging Face does: neighbours together, and an index that says where each is."""
    folder.mkdir()
    names = list(state)
    step = -(-len(names) // _SHARDS)
    where: dict[str, str] = {}
    for number, first in enumerate(range(0, len(names), step), 1):
        shard = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
        save_file({key: state[key] for key in names[first : first + step]}, folder / shard)
        where.update(dict.fromkeys(names[first : first + step], shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _write_distributed(state: dict[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, checkpoint_id=folder)


# suffix of a file or folder -> how it is written
_WRITE: Mapping[str, Callable[[dict[str, Tensor], Path], object]] = {
    "safetensors": save_file,
    "pt": torch.save,
    "shards": _write_shards,
    "dcp": _write_distributed,
}


def write_files(name: str, folder: Path, containers: Iterable[str] = ("safetensors", "pt")) -> None:
    """The model's weights as files and folders `name.container`."""
    state = dict(build(name).state_dict())
    for container in dict.fromkeys(containers):
        _WRITE[container](state, folder / f"{name}.{container}")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(one.stat().st_size for one in (path.iterdir() if path.is_dir() else [path]))


def same_values(model: nn.Module, expected: nn.Module) -> None:
    """Raise if any tensor of the two differs."""
    for (key, value), other in zip(_tensors(model), _tensors(expected), strict=True):
        if key != other[0] or not torch.equal(value.to(other[1].device), other[1]):
            raise RuntimeError(f"{key} is not what the file holds")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and tensors; `state_dict` itself is slow where a module has very many children."""
    return [
        (f"{path}.{name}", tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]
