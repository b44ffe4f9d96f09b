"""torch.ao's own two flows: eager mode and FX graph mode, by backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.ao.quantization
import torch.ao.quantization.quantize_fx
from torch import nn

from qat_compat.matrix.flows.base import PER_CHANNEL, PER_TENSOR, Flow
from qat_compat.testing import QATModel

__all__ = ["FLOWS", "eager", "fx", "fx_mapping"]

ao: Any = torch.ao.quantization  # it has no types

_WEIGHTS = {PER_TENSOR: ao.default_fused_wt_fake_quant, PER_CHANNEL: ao.default_fused_per_channel_wt_fake_quant}
# The granularity that each backend has by default.
_DEFAULT = {"x86": PER_CHANNEL, "fbgemm": PER_CHANNEL, "qnnpack": PER_TENSOR}


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)  # `convert` takes no qconfig but one of their own


def eager(
    model: nn.Module, declared: QATModel, *, qconfig: Any, bare: tuple[type[nn.Module], ...] = _EMBEDDINGS
) -> nn.Module:
    """`fuse_modules_qat` and `prepare_qat`; skipped modules and those of the classes in `bare` have no qconfig."""
    model.train()
    if fusions := declared.fusions(model):
        model = ao.fuse_modules_qat(model, fusions)
    model.qconfig = qconfig
    without = [module for module in model.modules() if isinstance(module, bare)]
    for module in (*without, *map(model.get_submodule, declared.skip)):
        module.qconfig = None  # type: ignore[assignment]
    prepared: nn.Module = ao.prepare_qat(model, inplace=True)
    return prepared


def fx(model: nn.Module, declared: QATModel, *, mapping: Any) -> nn.Module:
    """`prepare_qat_fx`, with the first batch as example."""
    args, kwargs = declared.arguments(model, declared.batches(1)[0])
    for name in declared.skip:
        mapping.set_module_name(name, None)
    prepared: nn.Module = ao.quantize_fx.prepare_qat_fx(model.train(), mapping, (*args, *kwargs.values()))
    return prepared


def fx_mapping(backend: str, granularity: str | None = None) -> Any:
    """The backend's own mapping, with embeddings; another granularity of weights than its own where it is asked for."""
    mapping = ao.get_default_qat_qconfig_mapping(backend)
    if granularity is not None and granularity != _DEFAULT[backend]:
        mapping.set_global(_qconfig(backend, granularity))
    for kind in _EMBEDDINGS:
        mapping.set_object_type(kind, ao.default_embedding_qat_qconfig)
    return mapping


def _qconfig(backend: str, granularity: str) -> Any:
    default = ao.get_default_qat_qconfig(backend)
    if granularity == _DEFAULT[backend]:
        return default
    return ao.QConfig(activation=default.activation, weight=_WEIGHTS[granularity])


def _prepare_eager(model: nn.Module, declared: QATModel, *, backend: str, granularity: str) -> nn.Module:
    return eager(model, declared, qconfig=_qconfig(backend, granularity))


def _prepare_fx(model: nn.Module, declared: QATModel, *, backend: str, granularity: str) -> nn.Module:
    return fx(model, declared, mapping=fx_mapping(backend, granularity))


def _convert_eager(model: nn.Module, declared: QATModel, granularity: str) -> nn.Module:
    _choose_engine()
    converted: nn.Module = ao.convert(model.eval())
    return converted


def _convert_fx(model: nn.Module, declared: QATModel, granularity: str) -> nn.Module:
    _choose_engine()
    converted: nn.Module = ao.quantize_fx.convert_fx(model.eval())
    return converted


def _choose_engine() -> None:
    """Packed weights need a backend; which one does not matter to their values."""
    if torch.backends.quantized.engine in ("none", "NoQEngine"):
        torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]


def _flow(mode: str, backend: str) -> Flow:
    prepare, change = {"eager": (_prepare_eager, _convert_eager), "fx": (_prepare_fx, _convert_fx)}[mode]
    granularities = (PER_CHANNEL, PER_TENSOR)
    return Flow(
        f"{mode}-{backend}",
        {"eager": "torch.ao eager", "fx": "torch.ao FX"}[mode],
        {name: partial(prepare, backend=backend, granularity=name) for name in granularities},
        change,
    )


FLOWS = tuple(_flow(mode, backend) for mode in ("eager", "fx") for backend in _DEFAULT)
