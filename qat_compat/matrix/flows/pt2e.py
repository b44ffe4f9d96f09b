"""torchao PT2E: `torch.export` and `prepare_qat_pt2e`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from qat_compat.matrix.flows.base import PER_CHANNEL, PER_TENSOR, Flow
from qat_compat.testing import QATModel

__all__ = ["FLOWS", "pt2e", "sharing_quantizer", "x86_inductor"]


def pt2e(model: nn.Module, declared: QATModel, *, quantizer: Callable[[], Any], training: bool = True) -> nn.Module:
    """Export in train or eval form, and `prepare_qat_pt2e`."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    model.train(training)
    args, kwargs = declared.arguments(model, declared.batches(1)[0])
    exported = torch.export.export(model, args, kwargs).module()
    prepared: nn.Module = prepare_qat_pt2e(exported, quantizer())
    return prepared


def x86_inductor() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))


def sharing_quantizer() -> Any:
    """A backend of another kind: per-tensor weights, unfused quantizers, one quantizer for all inputs of `cat`."""
    from torchao.quantization.pt2e import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )

    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=0.2),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MinMaxObserver),
    )
    aten = torch.ops.aten
    weighted = {aten.conv2d.default, aten.conv1d.default, aten.linear.default}

    class Sharing(Quantizer):  # type: ignore[misc]
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if node.target in weighted:
                    inputs = {node.args[0]: activation, node.args[1]: weight}
                    annotation = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
                elif node.target is aten.cat.default:
                    first, *others = node.args[0]
                    shared = SharedQuantizationSpec((first, node))
                    inputs = {first: activation, **dict.fromkeys(others, shared)}
                    annotation = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=shared, _annotated=True)
                else:
                    continue
                node.meta["quantization_annotation"] = annotation
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    return Sharing()


def _convert(model: nn.Module, declared: QATModel, granularity: str) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    converted: nn.Module = convert_pt2e(move_exported_model_to_eval(model))
    return converted


_TITLE = "torchao PT2E"
FLOWS = (
    Flow("pt2e-x86", _TITLE, {PER_CHANNEL: partial(pt2e, quantizer=x86_inductor)}, _convert, ("torchao",)),
    Flow("pt2e-sharing", _TITLE, {PER_TENSOR: partial(pt2e, quantizer=sharing_quantizer)}, _convert, ("torchao",)),
)
