"""The native ways to a QAT model: each flow is `prepare(float model, arch) -> prepared model`.

How a model is prepared is what the flows of the package's own matrix say; here they get more kinds of observers.

`CELLS` lists which flow is tried on which architecture; `REFUSED` which of the other combinations torch itself cannot
make, and why. A flow that differs from another only in its observers runs on a few architectures (`SAMPLE`), not on
all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    default_embedding_qat_qconfig,
    get_default_qat_qconfig,
    prepare_qat,
)
from torch.ao.quantization.quantization_mappings import (
    get_default_qat_module_mappings,
    get_embedding_qat_module_mappings,
)
from zoo import ARCHS, Arch

from qat_compat.matrix.flows import pt2e as shared_pt2e
from qat_compat.matrix.flows import torch_ao
from qat_compat.matrix.flows.base import PER_GROUP
from qat_compat.matrix.flows.torchao import LEARNED, STATIC, base_8da4w
from qat_compat.matrix.flows.torchao import intx as intx_config

Prepare = Callable[[nn.Module, Arch], nn.Module]

# --- eager -----------------------------------------------------------------------------------------------------------


def eager(model: nn.Module, arch: Arch, *, qconfig: QConfig) -> nn.Module:
    """What embeddings give is quantized, too."""
    return torch_ao.eager(model, arch.declared(), qconfig=qconfig, bare=())


def eager_embedding(model: nn.Module, arch: Arch) -> nn.Module:
    model.train()
    model.qconfig = get_default_qat_qconfig("x86")
    for name in arch.embeddings:
        model.get_submodule(name).qconfig = default_embedding_qat_qconfig
    mapping = {**get_default_qat_module_mappings(), **get_embedding_qat_module_mappings()}
    return prepare_qat(model, mapping=mapping, inplace=True)


PER_TENSOR = QConfig(
    activation=FakeQuantize.with_args(observer=MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8),
    weight=FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    ),
)
PER_CHANNEL = QConfig(
    activation=FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, averaging_constant=0.3
    ),
    weight=FakeQuantize.with_args(
        observer=PerChannelMinMaxObserver,
        quant_min=-127,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    ),
)
# Few bins: its search for a range takes time with the square of them.
HISTOGRAM = QConfig(
    activation=FakeQuantize.with_args(
        observer=HistogramObserver, quant_min=0, quant_max=255, dtype=torch.quint8, bins=128
    ),
    weight=FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    ),
)

# --- FX --------------------------------------------------------------------------------------------------------------


def fx(model: nn.Module, arch: Arch, *, backend: str, skip: bool = False) -> nn.Module:
    """With `skip`, one more layer has no qconfig, between others that have one."""
    if skip:
        arch = replace(arch, skip=(*arch.skip, arch.fuse[-1][0]))
    return torch_ao.fx(model, arch.declared(), mapping=torch_ao.fx_mapping(backend))


# --- PT2E ------------------------------------------------------------------------------------------------------------


def pt2e(model: nn.Module, arch: Arch, **options: Any) -> nn.Module:
    return shared_pt2e.pt2e(model, arch.declared(), **options)


def embedding_quantizer() -> Any:
    from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

    return EmbeddingQuantizer()


# --- torchao QATConfig -----------------------------------------------------------------------------------------------


def torchao(model: nn.Module, arch: Arch, *, linear: Callable[[], Any], embedding: Any = None) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(model, linear())
    if embedding is not None:
        quantize_(model, embedding(), filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    return model


def int8_int4() -> Any:
    from torchao.quantization.qat import QATConfig

    return QATConfig(base_8da4w(PER_GROUP, 8), step="prepare")


intx = partial(intx_config, PER_GROUP, group=8)

# --- the matrix ------------------------------------------------------------------------------------------------------

ALL = tuple(ARCHS)
# Exported programs keep every name, so that architectures which are hard for their names alone add nothing here.
EXPORTED = (
    *("plain", "crossed", "residual", "depthwise", "transposed", "conv1d", "linear_bn", "transformer", "embedding"),
    *("tied", "constants", "functional", "unet", "fixed", "bert", "hf_resnet", "llama"),
)
SAMPLE = ("plain", "crossed", "residual", "linear_bn", "transformer")
# What torchao's default group of 8 divides.
LINEAR = ("transformer", "embedding", "tied", "bf16", "bert", "llama")


@dataclass(frozen=True)
class Flow:
    """One way to prepare.

    Args:
        name: Its name in test ids.
        prepare: Float model and its architecture -> prepared model.
        archs: The architectures that it is tried on.
        kind: `eager`, `fx`, `pt2e` or `torchao`.
        hidden: Whether it keeps quantizer state that its state dict does not hold.
    """

    name: str
    prepare: Prepare
    archs: tuple[str, ...]
    kind: str
    hidden: bool = False


def _eager(name: str, qconfig: QConfig, archs: Iterable[str]) -> Flow:
    return Flow(f"eager-{name}", partial(eager, qconfig=qconfig), tuple(archs), "eager")


def _fx(name: str, archs: Iterable[str], **options: Any) -> Flow:
    return Flow(f"fx-{name}", partial(fx, **options), tuple(archs), "fx")


def _pt2e(name: str, archs: Iterable[str], **options: Any) -> Flow:
    return Flow(f"pt2e-{name}", partial(pt2e, **options), tuple(archs), "pt2e")


def _torchao(name: str, archs: Iterable[str], *, hidden: bool = False, **options: Any) -> Flow:
    return Flow(f"torchao-{name}", partial(torchao, **options), tuple(archs), "torchao", hidden)


FLOWS: Mapping[str, Flow] = {
    flow.name: flow
    for flow in [
        _eager("x86", get_default_qat_qconfig("x86"), ALL),
        _eager("fbgemm", get_default_qat_qconfig("fbgemm"), SAMPLE),
        _eager("qnnpack", get_default_qat_qconfig("qnnpack"), (*SAMPLE, "unet", "fixed")),
        _eager("x86-v0", get_default_qat_qconfig("x86", version=0), SAMPLE),
        _eager("minmax-per-tensor", PER_TENSOR, (*SAMPLE, "shared", "stubs", "bf16")),
        _eager("average-per-channel", PER_CHANNEL, (*SAMPLE, "transposed", "conv3d")),
        _eager("histogram", HISTOGRAM, ("plain", "fixed", "transformer")),
        Flow("eager-embedding", eager_embedding, ("embedding", "tied"), "eager"),
        _fx("x86", ALL, backend="x86"),
        _fx("fbgemm", ("plain", "residual"), backend="fbgemm"),
        _fx("qnnpack", SAMPLE, backend="qnnpack"),
        _fx("skip", ("plain", "crossed", "residual", "unet", "linear_bn"), backend="x86", skip=True),
        _pt2e("x86", EXPORTED, quantizer=shared_pt2e.x86_inductor),
        _pt2e("x86-eval", ("plain", "crossed", "constants"), quantizer=shared_pt2e.x86_inductor, training=False),
        _pt2e("sharing", ("plain", "functional", "transformer"), quantizer=shared_pt2e.sharing_quantizer),
        _pt2e("embedding", ("tied",), quantizer=embedding_quantizer),
        _torchao("int8-int4", ALL, linear=int8_int4),
        _torchao("intx", LINEAR, linear=partial(intx, activation={}, weight={})),
        _torchao("weight-only", LINEAR, linear=partial(intx, weight={}), embedding=partial(intx, weight={}, group=4)),
        _torchao("static", LINEAR, hidden=True, linear=partial(intx, activation=STATIC, weight=STATIC)),
        _torchao("learned", LINEAR, hidden=True, linear=partial(intx, activation=LEARNED, weight=LEARNED)),
    ]
}

_NOT_TRACEABLE = "symbolic tracing cannot follow its forward"
_NO_BF16 = "fused_moving_avg_obs_fake_quant takes float32 only"
_GROUP = "its linear layers are narrower than a group"
# (flow, architecture) -> why torch cannot make it, and the text of torch's own error, to which a test holds it.
REFUSED: Mapping[tuple[str, str], tuple[str, str]] = {
    ("eager-x86", "bf16"): (_NO_BF16, "expected scalar type Float but found BFloat16"),
    ("fx-x86", "bf16"): (_NO_BF16, "expected scalar type Float but found BFloat16"),
    ("fx-x86", "transposed"): ("FX fuses every BN that it can see", "Fusing ConvTranspose.BatchNorm not yet supported"),
    ("fx-x86", "branching"): (_NOT_TRACEABLE, "cannot be used as inputs to control flow"),
    ("fx-x86", "dynamic"): (_NOT_TRACEABLE, "Proxy object cannot be iterated"),
    ("fx-x86", "dynamic_channels"): (_NOT_TRACEABLE, "Proxy object cannot be iterated"),
    ("fx-x86", "bert"): (_NOT_TRACEABLE, "does not support item assignment"),
    ("fx-x86", "hf_resnet"): (_NOT_TRACEABLE, "cannot be used as inputs to control flow"),
    ("fx-x86", "hf_mobilenet"): (_NOT_TRACEABLE, "int.. argument must be"),
    ("fx-x86", "llama"): (_NOT_TRACEABLE, "co_varnames is too small"),
    ("pt2e-x86", "bf16"): (_NO_BF16, "expected scalar type Float but found BFloat16"),
    ("pt2e-x86", "branching"): ("torch.export cannot choose a branch", "Could not guard on data-dependent expression"),
    ("pt2e-x86", "dynamic"): ("torch.export cannot choose a maximum", "Could not guard on data-dependent expression"),
    ("pt2e-x86", "shared"): (
        "X86InductorQuantizer cannot partition a module that is called twice",
        "more than one output node",
    ),
    **{
        ("torchao-int8-int4", name): (_GROUP, r"in_features .* must be == 0")
        for name in (
            *("unordered", "crossed", "linear_bn", "shared", "constants", "functional", "fixed", "partial"),
            *("dynamic", "dynamic_channels", "branching"),
        )
    },
}
CELLS: tuple[tuple[str, str], ...] = tuple(
    (flow.name, name) for flow in FLOWS.values() for name in flow.archs if (flow.name, name) not in REFUSED
)


def cells(*rows: str) -> list[tuple[str, str]]:
    """Cells given as `flow/architecture architecture ...`, each of which must be one of `CELLS`."""
    chosen = [(row.split("/")[0], arch) for row in rows for arch in row.split("/")[1].split()]
    assert set(chosen) <= set(CELLS), sorted(set(chosen) - set(CELLS))
    return chosen


def prepare_for(flow: str, arch: str) -> Callable[[nn.Module], nn.Module]:
    """`prepare(float model)` of one cell."""

    def prepare(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FLOWS[flow].prepare(model, ARCHS[arch])

    return prepare
