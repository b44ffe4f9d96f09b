"""One quantization proxy of Brevitas: its threshold, and how it is driven.

What is known of the framework, and what that rests on, is in :mod:`qat_compat.frameworks.brevitas`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.conventions import Form, Grid
from qat_compat.derived import weight_of
from qat_compat.errors import Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import Needs, Quantizer
from qat_compat.ranges import magnitude
from qat_compat.schema import Role
from qat_compat.state import join_path, split_path

__all__ = ["Proxy", "is_proxy", "role_of"]

# last two parts of a key -> role; the rest of a quantizer's state is its own business
_LEAVES: Mapping[str, Role] = {
    "scaling_impl.value":             Role.AMAX,
    "scaling_impl.learned_value":     Role.AMAX,
    "scaling_impl.buffer":            Role.AMAX,
    "runtime_stats.running_stats":    Role.AMAX,
    "zero_point_impl.value":          Role.ZERO_POINT,
    "zero_point_impl.learned_value":  Role.ZERO_POINT,
}  # fmt: skip
# The norm that a weight is given (weight normalization, accumulator-aware quantization): it is learnt, the layer
# computes with the weight times it, and Brevitas takes it from the weight when the quantizer is made.
_NORM = "pre_scaling_impl.value"
_COLLECT_ALL = sys.maxsize - 1  # what `calibration_mode` sets `collect_stats_steps` to


def role_of(leaf: str) -> Role:
    """What a tensor of a proxy's state is, by its key or by its name in the proxy."""
    if "pre_scaling_impl." in leaf:
        return Role.SMOOTHING if leaf.endswith(_NORM) else Role.CONSTANT
    return _LEAVES.get(".".join(leaf.rsplit(".", 2)[-2:]), Role.CONSTANT)


def is_proxy(module: nn.Module) -> bool:
    return any(
        base.__name__ == "QuantProxyFromInjector" and base.__module__.startswith("brevitas.")
        for base in type(module).__mro__
    )


def _collects(module: Any) -> bool:
    """Whether it learns its value from what flows through it: `ParameterFromRuntimeStats...`."""
    return "value" in module._parameters and "buffer" in module._buffers and hasattr(module, "collect_stats_steps")


def _runs(module: Any) -> bool:
    """Whether it keeps running statistics: `_RuntimeStats`."""
    return "running_stats" in module._buffers


def _starts_from_weight(module: Any) -> bool:
    """Whether it takes its value from its parameter in the first forward: `ParameterFromStatsFromParameter...`."""
    return "value" in module._parameters and hasattr(module, "init_done")


class Proxy(Quantizer):
    """A Brevitas quantization proxy."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, site: str, host: nn.Module, host_path: str) -> None:
        super().__init__(names, module, site, Needs.NOTHING)
        inside = list(module.named_modules())
        self._collectors = {path: part for path, part in inside if _collects(part)}
        self._running = {path: part for path, part in inside if _runs(part)}
        self._from_weight = {path: part for path, part in inside if _starts_from_weight(part)}
        self._host, self._host_path = host, host_path
        self._is_weight = split_path(names[0])[1] == "weight_quant"
        self.leaves = {*module.state_dict(), *(join_path(path, "value") for path in self._late())}
        self._shapes = {leaf: tuple(self._tensor(leaf).shape) for leaf in self.leaves}
        self._before: list[tuple[Any, str, bool]] = []
        if self._collectors or self._running:
            self.needs = Needs.DATA
        elif self._from_weight and self._is_weight:
            self.needs, self.source = Needs.WEIGHTS, lambda: weight_of(host)
        elif self.leaves:
            self.needs = Needs.DEFINITION

    def _late(self) -> dict[str, Any]:
        """Parts whose value comes into being later than they do."""
        return {**self._collectors, **self._from_weight}

    def _tensor(self, leaf: str) -> Tensor:
        path, name = split_path(leaf)
        value: Tensor = getattr(self.module.get_submodule(path), name)
        return value

    def has_value(self, leaf: str) -> bool:
        """Whether a tensor of its state is more than its initial value."""
        part = self._late().get(split_path(leaf)[0])
        if part is None:
            return True
        return bool(part.init_done if hasattr(part, "init_done") else part.counter > 0)

    def state(self, leaf: str, value: Tensor) -> Tensor | None:
        if not self.has_value(leaf):
            return None
        part = self._collectors.get(split_path(leaf)[0])
        if part is not None and part.counter <= part.collect_stats_steps:  # still collecting: it saves what it has
            saved: Tensor = part.state_dict()["value"]
            return saved.detach()
        return value

    def adopt(self, leaves: Collection[str]) -> None:
        for leaf in leaves:
            part = self._late().get(split_path(leaf)[0])
            if part is None:
                continue
            if hasattr(part, "init_done"):
                part.init_done = True
            else:
                part.counter = part.collect_stats_steps + 1
        for path, part in self._running.items():
            if join_path(path, "running_stats") in leaves:
                part.counter = max(part.counter, 1)  # at 0 the next batch would be multiplied into what was loaded

    # --- driving ------------------------------------------------------------------------------------------------------

    def _set(self, module: Any, name: str, on: bool) -> None:
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, on)

    def disable(self) -> None:
        self._set(self.module, "disable_quant", True)

    def start_observing(self) -> None:
        for path, part in (*self._collectors.items(), *self._from_weight.items()):
            neutral = 0.0 if split_path(path)[1] == "zero_point_impl" else 1.0
            for name in ("value", "buffer"):
                held = getattr(part, name, None)
                if held is not None:
                    held.data = torch.full_like(held.data, neutral)  # new memory: statistics are written in place
        for part in self._from_weight.values():
            part.init_done = False
        for part in self._running.values():
            part.running_stats.fill_(1.0)
            part.counter = 0
        for part in self._collectors.values():
            part.counter, part.collect_stats_steps, part.momentum = 0, _COLLECT_ALL, None
        if self.needs is Needs.DATA:
            self._set(self.module, "disable_quant", False)
            for part in self.module.modules():
                if hasattr(part, "observer_only"):
                    self._set(part, "observer_only", True)

    def observe(self, value: Tensor) -> None:
        """Nothing to see: activations are seen in the model's own forward, a weight when its value is settled."""

    def compute_qparams(self) -> None:
        if self.source is not None:
            value = self.source()
            if not bool(torch.isfinite(value).all()):
                raise QParamError("the weight holds NaN or inf", key=self.name, expected="finite values")
            owner: Any = self.module
            held, owner.disable_quant = owner.disable_quant, False  # some search for the value by quantizing with it
            try:
                owner.tensor_quant(value)  # the first forward, which sets the value
            finally:
                owner.disable_quant = held
        for part in self._collectors.values():
            (part.init_scale if hasattr(part, "init_scale") else part.init_zp)()

    def restore_switches(self) -> None:
        for module, name, before in reversed(self._before):
            setattr(module, name, before)
        self._before.clear()

    # --- what it holds ------------------------------------------------------------------------------------------------

    def channels(self) -> int | None:
        found = [shape for leaf, shape in self._shapes.items() if role_of(leaf) is Role.AMAX]
        return torch.Size(found[0]).numel() if len(found) == 1 else None

    def ranges(self) -> list[Tensor]:
        collected = [part.buffer for part in self._collectors.values()]
        return collected + [part.running_stats for part in self._running.values()]

    def hides_infinity(self) -> bool:
        return True  # a percentile does not see them

    def takes_range(self) -> bool:
        return False

    def refusal(self) -> str:
        if any(leaf.endswith("float_to_int_impl.value") for leaf in self.leaves):
            return "its rounding was learnt for other weights"
        return ""

    def check(self) -> Iterable[Problem]:
        remedy = "calibrate this quantizer anew, or take it from a sound file"
        for leaf in sorted(self.leaves):
            if role_of(leaf) is Role.CONSTANT or not self.has_value(leaf):
                continue
            value, key = self._tensor(leaf), join_path(self.name, leaf)
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                yield Problem(ProblemKind.INVALID, key, f"{bad} of {value.numel()} are not finite", remedy)
            if tuple(value.shape) != self._shapes[leaf]:
                detail = f"expected the shape {list(self._shapes[leaf])}, found {list(value.shape)}"
                yield Problem(ProblemKind.INVALID, key, detail, remedy)
            if role_of(leaf) is Role.AMAX and bool((value <= 0).any()) and not self._is_log():
                detail = f"{int((value <= 0).sum())} of {value.numel()} thresholds are not positive"
                yield Problem(ProblemKind.INVALID, key, detail, remedy)

    def _is_log(self) -> bool:
        """Whether the value is the base-2 logarithm of the threshold."""
        return self._scaling() != "brevitas.int"

    def form(self) -> Form | None:
        """Of integer quantizers that hold a threshold; the other ones compute theirs."""
        held = {role_of(leaf): leaf for leaf in self.leaves if role_of(leaf) is not Role.CONSTANT}
        threshold = held.get(Role.AMAX, "")
        integer: Any = next((part for part in self.module.modules() if type(part).__name__ == "IntQuant"), None)
        owner: Any = self.module
        if integer is None or not threshold.endswith("scaling_impl.value") or self._has_norm():
            return None
        bits = int(
            owner.get_submodule(threshold.removesuffix("scaling_impl.value").rstrip(".")).msb_clamp_bit_width_impl()
        )
        grid = Grid(bits, bool(integer.signed), bool(integer.narrow_range))
        if Role.ZERO_POINT in held:
            return Form("brevitas.shifted", grid, {"value": threshold, "zero_point": held[Role.ZERO_POINT]})
        return Form(self._scaling(), grid, {"value": threshold})

    def _has_norm(self) -> bool:
        return any(leaf.endswith(_NORM) for leaf in self.leaves)

    def _scaling(self) -> str:
        parts = {type(part).__name__ for part in self.module.modules()}
        if "PowerOfTwoRestrictValue" in parts:
            return "brevitas.log2"
        return "brevitas.log" if "LogFloatRestrictValue" in parts else "brevitas.int"

    def refuses_transfer(self) -> str:
        if not self.leaves:
            return "it works its range out anew for every tensor"
        return "its scales are powers of two" if self._scaling() == "brevitas.log2" else super().refuses_transfer()

    def magnitudes(self) -> tuple[Tensor, Tensor] | None:
        leaf = next((leaf for leaf in self.leaves if role_of(leaf) is Role.AMAX), None)
        if not self._is_weight or leaf is None or not self.has_value(leaf) or self._has_norm():
            return None
        with torch.no_grad():
            value = self._tensor(leaf)
            seen = (value.exp2() if self._is_log() else value.abs()).max()
            return magnitude(weight_of(self._host)), seen.double()

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {join_path(self._host_path, "weight"): self._quantized} if self._is_weight else {}

    def _quantized(self) -> Tensor:
        if not all(map(self.has_value, self.leaves)):
            raise QParamError(
                "the weight quantizer has seen nothing yet",
                key=self.name,
                remedy="load or calibrate the model first, or take the latent weights",
            )
        with torch.no_grad():
            out: Any = self.module(weight_of(self._host))
            value: Tensor = getattr(out, "value", out)
        return value
