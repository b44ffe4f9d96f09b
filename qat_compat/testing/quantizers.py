"""Which modules of a model are quantizers and observers, by the classes of torch and torchao themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase as TorchFakeQuantize


def _classes(*names: tuple[str, str]) -> tuple[type, ...]:
    """Classes of modules that are imported already; a model cannot hold an instance of any other."""
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _of_class(model: nn.Module, classes: tuple[type, ...]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, classes)] if classes else []


def fake_quantizers(model: nn.Module) -> list[Any]:
    torchao = _classes(("torchao.quantization.pt2e.fake_quantize", "FakeQuantizeBase"))
    return _of_class(model, (TorchFakeQuantize, *torchao))


def intx_quantizers(model: nn.Module) -> list[Any]:
    return _of_class(model, _classes(("torchao.quantization.qat.fake_quantizer", "IntxFakeQuantizer")))


def observers(model: nn.Module) -> list[Any]:
    names = ("torch.ao.quantization.observer", "torchao.quantization.pt2e.observer")
    return _of_class(model, _classes(*((name, "ObserverBase") for name in names)))


def plain_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Buffers that belong to no quantizer or observer."""
    owned = {
        id(buffer)
        for quantizer in [*fake_quantizers(model), *observers(model), *intx_quantizers(model)]
        for buffer in quantizer.buffers()
    }
    return (buffer for buffer in model.buffers() if id(buffer) not in owned)
