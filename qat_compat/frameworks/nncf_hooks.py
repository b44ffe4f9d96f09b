"""One quantizer of NNCF 3.x, and what SmoothQuant leaves: what they hold, and how they are driven.

What is known of the framework, and what that rests on, is in :mod:`qat_compat.frameworks.nncf`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.conventions import Form, Grid
from qat_compat.derived import weight_of
from qat_compat.errors import Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import Needs, Quantizer, Reduction, drifts
from qat_compat.ranges import magnitude
from qat_compat.state import join_path

__all__ = ["SAVED", "Factor", "HookQuantizer", "is_quantizer"]

# attribute of a live quantizer -> name that its state_dict gives it
SAVED = {"_scale_param_storage": "scale", "_input_range_param_storage": "input_range"}
_HALF_RANGE = 2.0
_FULL_RANGE = 1.5  # times a weight that a scale reaches at most where all levels are used


def is_quantizer(module: nn.Module) -> bool:
    return any(b.__name__ == "BaseQuantizer" and b.__module__.startswith("nncf.") for b in type(module).__mro__)


class HookQuantizer(Quantizer):
    """A quantizer that NNCF 3.x hooks on an operation."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, site: str, host: nn.Module | None, path: str) -> None:
        source = (lambda: weight_of(host)) if host is not None else None
        super().__init__(names, module, site, Needs.WEIGHTS if host is not None else Needs.DATA, source)
        owner: Any = module
        self._symmetric = "_scale_param_storage" in module._parameters
        self._shape: tuple[int, ...] = tuple(owner.scale_shape)
        self._parameter = path
        self._half: bool | None = None
        self._low: list[Tensor] = []
        self._high: list[Tensor] = []
        self._hook: Any = None

    def disable(self) -> None:
        owner: Any = self.module
        owner.enabled.fill_(0)

    def start_observing(self) -> None:
        self._low, self._high = [], []
        if self.source is None and self._hook is None:
            self._hook = self.module.register_forward_pre_hook(lambda _module, args: self.observe(args[0]))

    def restore_switches(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def observe(self, value: Tensor) -> None:
        if not value.numel():
            return
        with torch._C.DisableTorchFunction():  # NNCF counts the functions that run in a forward
            value = value.detach()
            per_channel = len(self._shape) == value.dim()
            axes = [axis for axis in range(value.dim()) if not per_channel or self._shape[axis] == 1]
            self._low.append(value.amin(axes, keepdim=True))
            self._high.append((value.abs() if self._symmetric else value).amax(axes, keepdim=True))

    def reduction(self) -> Reduction | None:
        kept = [axis for axis, size in enumerate(self._shape) if size > 1]
        if self.source is None or len(kept) > 1 or (kept and len(self._shape) != self.source().dim()):
            return None
        return Reduction(self._parameter, kept[0] if kept else None)

    def observe_range(self, low: Tensor, high: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self._low.append(low.view(self._shape))
            self._high.append((torch.maximum(low.abs(), high.abs()) if self._symmetric else high).view(self._shape))

    def needs_no_forward(self) -> bool:
        return self.source is not None

    def ranges(self) -> list[Tensor]:
        return [*self._low[-1:], *self._high[-1:]]

    def compute_qparams(self) -> None:
        if self.source is not None and not self._low:
            self.observe(self.source())
        low, high = torch.stack(self._low), torch.stack(self._high)
        if self.source is not None or low[0].numel() > 1:
            self._write(low.amin(0), high.amax(0))
        else:
            self._write(low.mean(0), high.mean(0))

    def _write(self, low: Tensor, high: Tensor) -> None:
        """Make the quantizer's own parameters, with NNCF's arithmetic."""
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise QParamError("the tensor that it quantizes holds NaN or inf", key=self.name, expected="finite values")
        found = _parameters(self.module, low, high, half_range=bool(self._half))
        owner: Any = self.module
        eps: float = owner.eps  # a forward adds it again
        lowest, highest = found.input_low.data, found.input_high.data
        if self._symmetric:
            owner.signed_tensor.data = torch.full_like(owner.signed_tensor.data, int(bool((lowest < 0).any())))
            owner._scale_param_storage.data = (highest - eps).reshape(self._shape)
        else:
            owner.input_low.data = lowest.reshape(self._shape)
            owner._input_range_param_storage.data = (highest - lowest - eps).reshape(self._shape)
        owner.set_levels()

    def adopt(self, leaves: Collection[str]) -> None:
        owner: Any = self.module
        owner.set_levels()
        owner.initialized = True

    def observes_in_training(self) -> bool:
        return False

    def refusal(self) -> str:
        if len(self.names) > 1:
            return "it is shared by several operations, whose ranges NNCF unifies by rules that are no state"
        if self.source is None:
            return ""
        ratio = drifts([self]).get(self)
        if ratio is None or not self._symmetric:
            return ""
        reach = 1 / ratio
        if not (0.75 < reach < _FULL_RANGE or 0.75 < reach / _HALF_RANGE < _FULL_RANGE):
            return (
                f"its scale is {reach:.3g} times its weight, so that it does not tell whether half its levels are used"
            )
        self._half = reach > _FULL_RANGE
        return ""

    def check(self) -> Iterable[Problem]:
        remedy = "calibrate this quantizer anew, or take it from a sound file"
        for leaf in ("_scale_param_storage", "input_low", "_input_range_param_storage"):
            value = self.module._parameters.get(leaf)
            if value is None:
                continue
            key = join_path(self.name, SAVED.get(leaf, leaf))
            sound = torch.isfinite(value) if leaf == "input_low" else torch.isfinite(value) & (value > 0)
            bad = int((~sound).sum())
            if bad:
                yield Problem(ProblemKind.INVALID, key, f"{bad} of {value.numel()} are not finite and positive", remedy)
            if tuple(value.shape) != self._shape:
                detail = f"expected the shape {list(self._shape)}, found {list(value.shape)}"
                yield Problem(ProblemKind.INVALID, key, detail, remedy)

    def channels(self) -> int | None:
        return torch.Size(self._shape).numel()

    def form(self) -> Form | None:
        owner: Any = self.module
        signed = owner.level_low < 0
        grid = Grid(owner.num_bits, signed, signed and -owner.level_low == owner.level_high)
        if self._symmetric:
            return Form("nncf.symmetric", grid, {"scale": "scale"})
        return Form("nncf.asymmetric", grid, {"input_low": "input_low", "input_range": "input_range"})

    def refuses_transfer(self) -> str:
        ratio = drifts([self]).get(self)
        half = ratio is not None and self._symmetric and ratio < 1 / _FULL_RANGE
        return "it leaves half of its levels unused, against overflow" if half else ""

    def magnitudes(self) -> tuple[Tensor, Tensor] | None:
        scale = self.module._parameters.get("_scale_param_storage")
        if self.source is None or scale is None:
            return None
        with torch.no_grad():
            return magnitude(self.source()), scale.detach().abs().max().double()

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {self._parameter: self._quantized} if self.source is not None else {}

    def _quantized(self) -> Tensor:
        assert self.source is not None
        with torch.no_grad():
            value: Tensor = self.module(self.source())
        return value


class Factor(Quantizer):
    """What SmoothQuant multiplies an input by; no float model has it."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, site: str) -> None:
        super().__init__(names, module, site, Needs.DEFINITION)

    def disable(self) -> None:
        """It has no switch."""

    def start_observing(self) -> None:
        """It sees nothing."""

    def observe(self, value: Tensor) -> None:
        """It sees nothing."""

    def compute_qparams(self) -> None:
        """It is what it is."""

    def ranges(self) -> list[Tensor]:
        return []

    def check(self) -> Iterable[Problem]:
        return ()


def _parameters(module: nn.Module, low: Tensor, high: Tensor, *, half_range: bool) -> Any:
    """NNCF's `FakeQuantizeParameters` of a range."""
    from nncf.common.quantization.structs import QuantizerConfig, QuantizerGroup
    from nncf.common.tensor_statistics.statistics import MinMaxTensorStatistic
    from nncf.quantization.fake_quantize import calculate_quantizer_parameters
    from nncf.tensor import Tensor as NNCFTensor

    owner: Any = module
    config = QuantizerConfig(
        owner.num_bits,
        owner.get_quantizer_config().mode,
        owner._signedness_to_force,
        low.numel() > 1,
        owner.narrow_range,
    )
    group = QuantizerGroup.WEIGHTS if half_range else QuantizerGroup.ACTIVATIONS
    statistics = MinMaxTensorStatistic(min_values=NNCFTensor(low), max_values=NNCFTensor(high))
    return calculate_quantizer_parameters(statistics, config, group, half_range)
