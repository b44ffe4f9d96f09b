"""Layers whose weights are quantized in one way or another, and what their own framework makes of the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import device
from benchmarks.models import MODELS

__all__ = ["GRANULARITIES", "Granularity", "by_granularity"]

_CONVOLUTIONS = re.compile(r"\.bn(\d)\.")


@dataclass(frozen=True)
class Granularity:
    """Which weights share a scale.

    Args:
        layers: `layers(count, width)` makes the float model.
        prepare: Puts the framework's own quantizers in it.
        look: The scale that a quantizer of the framework makes of a weight that it has never seen.
        seen: What a layer hands to its quantizer.
        name: The quantized model's name for a tensor of the float model.
    """

    layers: Callable[[int, int], nn.Module]
    prepare: Callable[[nn.Module], nn.Module]
    look: Callable[[Any, Tensor], Tensor]
    seen: Callable[[Any], Tensor] = lambda layer: layer.weight
    name: Callable[[str], str] = lambda name: name

    def prepared(self, count: int, width: int, dtype: torch.dtype) -> nn.Module:
        """The quantized model, with values that are the same every time."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.prepare(self.layers(count, width).to(dtype).train()).to(device())

    def native_scales(self, model: nn.Module) -> list[Tensor]:
        """What the model's own quantizers make of its weights."""
        with torch.no_grad():
            return [self.look(quantizer, self.seen(layer)) for layer, quantizer in _quantized(model)]

    def scales(self, model: nn.Module) -> list[Tensor]:
        """What its quantizers hold."""
        return [quantizer.scale for _, quantizer in _quantized(model)]


def _quantized(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Each layer with the quantizer of its weight."""
    for module in model.modules():
        for name in ("weight_fake_quant", "weight_fake_quantizer"):
            if (found := getattr(module, name, None)) is not None:
                yield module, found


def _linear(count: int, width: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, 4 * width, bias=False) for _ in range(count)])


def _resnet(count: int, width: int) -> nn.Module:
    return MODELS["tiny" if width < 256 else "resnet50-like"]()


def _torch_ao(model: nn.Module, observer: str, scheme: torch.qscheme, **options: Any) -> nn.Module:
    """torch.ao's eager mode; activations are left alone, convolutions are fused with what follows them."""
    from torch.ao import quantization as tq

    weight = tq.FakeQuantize.with_args(
        observer=getattr(tq, observer), quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=scheme, **options
    )
    pairs = [
        [f"{i}.conv{n}", f"{i}.bn{n}"] for i, block in enumerate(model) for n in (1, 2, 3) if hasattr(block, "bn3")
    ]  # type: ignore[arg-type]
    model = tq.fuse_modules_qat(model, pairs) if pairs else model
    model.qconfig = tq.QConfig(activation=nn.Identity, weight=weight)  # type: ignore[assignment]
    return tq.prepare_qat(model)  # type: ignore[no-any-return]


def _observe(quantizer: Any, weight: Tensor) -> Tensor:
    observer = quantizer.activation_post_process
    observer.reset_min_max_vals()
    observer.to(weight.device)  # some put tensors of the CPU in their place
    observer(weight)
    scale: Tensor = observer.calculate_qparams()[0]
    return scale


def _normalized(layer: Any) -> Tensor:
    """What a fused convolution hands to its quantizer (torch.ao.nn.intrinsic.qat, `_forward_approximate`)."""
    factor = layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)
    weight: Tensor = layer.weight * factor.reshape([-1] + [1] * (layer.weight.dim() - 1))
    return weight


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True, is_dynamic=False)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"))
    return model


def _first_forward(quantizer: Any, weight: Tensor) -> Tensor:
    quantizer.scale = quantizer.zero_point = None
    quantizer(weight)
    scale: Tensor = quantizer.scale
    return scale


_per_channel = partial(_torch_ao, observer="MovingAveragePerChannelMinMaxObserver", scheme=torch.per_channel_symmetric)
GRANULARITIES: Mapping[str, Granularity] = {
    "per channel": Granularity(_linear, _per_channel, _observe),
    "per channel, axis 1": Granularity(_linear, partial(_per_channel, ch_axis=1), _observe),
    "per tensor": Granularity(
        _linear,
        partial(_torch_ao, observer="MovingAverageMinMaxObserver", scheme=torch.per_tensor_symmetric),
        _observe,
    ),
    "per group of 32": Granularity(_linear, _torchao, _first_forward),
    "per channel, Conv+BN": Granularity(
        _resnet, _per_channel, _observe, _normalized, lambda name: _CONVOLUTIONS.sub(r".conv\1.bn.", name)
    ),
}


def by_granularity(what: str, ratio: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown for rows that have a granularity each."""
    lines = [
        f"| {what} | dtype | how | ms | GB/s | share of the floor | {ratio} |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        mark = " (noisy)" if row["noisy"] else ""
        lines.append(
            f"| {row['granularity']} | {row['dtype']} | {row['how']}{mark} | {row['median_s'] * 1e3:.1f} "
            f"| {row['gb_per_s']:.3g} | {row['share_of_floor']:.2f} | {row['speedup']:.2f}x |"
        )
    return lines
