"""torchao's `quantize_(model, QATConfig(...))`: linear layers, with int4 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from qat_compat.matrix.flows.base import PER_CHANNEL, PER_GROUP, Flow, NotApplicable
from qat_compat.testing import QATModel, native_calibration
from qat_compat.testing.modes import DefaultInputs, Inputs, eval_form

__all__ = ["FLOWS", "LEARNED", "STATIC", "base_8da4w", "intx"]

_INT4: Any = getattr(torch, "int4")  # noqa: B009  (torch makes it at run time)
_LARGEST_GROUP = 32
_SMALLEST_GROUP = 4


def group_size(model: nn.Module) -> int:
    """The largest group that divides every linear layer of the model."""
    widths = [module.in_features for module in model.modules() if type(module) is nn.Linear]
    if not widths:
        raise NotApplicable("it has no linear layer, and torchao's QATConfig quantizes nothing else")
    group = _LARGEST_GROUP
    while any(width % group for width in widths):
        group //= 2
    if group < _SMALLEST_GROUP:
        raise NotApplicable(f"no group of {_SMALLEST_GROUP} or more divides all of its linear layers")
    return group


def intx(
    granularity: str,
    group: int,
    *,
    activation: Mapping[str, Any] | None = None,
    weight: Mapping[str, Any] | None = None,
) -> Any:
    """Per-token int8 activations and int4 weights, each only if options for it are given."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    grain = {"group_size": group} if granularity == PER_GROUP else {"granularity": granularity}
    return QATConfig(
        activation_config=None
        if activation is None
        else IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, **activation),
        weight_config=None if weight is None else IntxFakeQuantizeConfig(_INT4, is_symmetric=True, **grain, **weight),
        step="prepare",
    )


def _grain(granularity: str, group: int) -> Any:
    from torchao.quantization.granularity import PerAxis, PerGroup

    return PerGroup(group) if granularity == PER_GROUP else PerAxis(0)


def base_8da4w(granularity: str, group: int) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=_INT4, weight_granularity=_grain(granularity, group))


def _base_4w(granularity: str, group: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig

    return IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=_grain(granularity, group))


def _from_base(model: nn.Module, declared: QATModel, *, base: Callable[..., Any], granularity: str) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(base(granularity, group_size(model)), step="prepare"))
    return model


def _from_intx(model: nn.Module, declared: QATModel, *, granularity: str, **options: Any) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(model, intx(granularity, group_size(model), **options))
    return model


def _convert(model: nn.Module, declared: QATModel, granularity: str, *, base: Callable[..., Any]) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(base(granularity, group_size(declared.make())), step="convert"))
    return model


def _calibrate_static(model: nn.Module, batches: Iterable[Any], inputs: Inputs | None) -> None:
    """A static quantizer takes its range from the first batch; that it takes the others, too, is seen by trying."""
    batches = list(batches)
    native_calibration(model, batches, inputs)
    with eval_form(model) as form, torch.no_grad():
        for batch in batches[1:]:
            args, kwargs = (inputs or DefaultInputs(model))(batch)
            form(*args, **kwargs)


def _of_base(name: str, base: Callable[..., Any]) -> Flow:
    prepare = {name: partial(_from_base, base=base, granularity=name) for name in (PER_GROUP, PER_CHANNEL)}
    return Flow(f"torchao-{name}", _TITLE, prepare, partial(_convert, base=base), _NEEDS)


def _of_options(name: str, granularities: tuple[str, ...], options: Mapping[str, Any]) -> Flow:
    prepare = {
        grain: partial(_from_intx, granularity=grain, activation=options, weight=options) for grain in granularities
    }
    hidden = not options.get("range_learning")
    return Flow(f"torchao-{name}", _TITLE, prepare, needs=_NEEDS, calibrate=_calibrate_static, hidden=hidden)


_TITLE, _NEEDS = "torchao QATConfig", ("torchao",)
STATIC: Mapping[str, Any] = {"is_dynamic": False}
# An integer zero_point cannot be a parameter.
LEARNED: Mapping[str, Any] = {"is_dynamic": False, "range_learning": True, "zero_point_precision": torch.float32}

FLOWS = (
    _of_base("8da4w", base_8da4w),
    _of_base("4w", _base_4w),
    _of_options("static", (PER_GROUP,), STATIC),
    _of_options("learned", (PER_GROUP, PER_CHANNEL), LEARNED),
)
