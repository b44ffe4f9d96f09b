"""What a fake-quantizer of torch.ao or torchao's pt2e holds, and whether that is sound."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from qat_compat.errors import Problem, ProblemKind
from qat_compat.frameworks.base import Needs, Quantizer
from qat_compat.frameworks.fake_quant_names import LEAVES, OBSERVER, has_base, keeps_min_max
from qat_compat.frameworks.observers import together
from qat_compat.isolation import quiet
from qat_compat.ranges import magnitude
from qat_compat.schema import Role
from qat_compat.text import counted

__all__ = ["FakeQuantState", "is_on"]

_FLAGS = frozenset(leaf for leaf, role in LEAVES.items() if role is Role.ENABLED)
_REMEDY = "calibrate this quantizer anew, or take it from a sound file"
# a fused kernel and the Python formula differ in the last bits; another grid differs by a factor near 2
_SCALE_TOLERANCE = 0.05


def is_on(flag: object) -> bool:
    return isinstance(flag, Tensor) and not flag.is_meta and bool(flag)


class FakeQuantState(Quantizer):
    """A `FakeQuantizeBase` with its observer, or a bare observer: looked at, and left as it is.

    Args:
        names: Every name that reaches it.
        module: The module itself.
        site: What it quantizes, in the float model's words.
        source: Computes the tensor that it quantizes, of a weight.
        channels: Number of scales that it has if it has one per channel.
        parameter: Key of the parameter that `source` is made from.
        factor: What that parameter is multiplied by on the way, shaped to multiply it.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        site: str,
        source: Callable[[], Tensor] | None = None,
        channels: int | None = None,
        parameter: str = "",
        factor: Callable[[], Tensor] | None = None,
    ) -> None:
        observer = getattr(module, OBSERVER, module)
        if has_base(observer, "FixedQParamsObserver"):
            needs = Needs.DEFINITION
        elif source is not None:
            needs = Needs.WEIGHTS
        elif getattr(module, "is_dynamic", False) or not list(observer.buffers(recurse=False)):
            needs = Needs.NOTHING
        else:
            needs = Needs.DATA
        super().__init__(names, module, site, needs, source)
        self.observer: Any = observer
        self._channels = channels
        self._parameter = parameter  # key of the parameter that `source` is made from
        self._factor = factor  # what that parameter is multiplied by on the way, per channel
        # parameters that a forward makes learn if it finds this switch on; while data runs it is off
        self._learns = [leaf for leaf, _ in self.absent() if is_on(getattr(module, "learning_enabled", None))]

    @property
    def per_channel(self) -> bool:
        return has_base(self.observer, "PerChannelMinMaxObserver")

    def channels(self) -> int | None:
        return self._channels if self.per_channel else 1

    def grid(self) -> str:
        qmin, qmax = getattr(self.observer, "quant_min", None), getattr(self.observer, "quant_max", None)
        if qmin is None or qmax is None:
            return ""
        centred = "affine" if not self._symmetric else "symmetric" if qmin < 0 else "centred"
        axis = self._axis()
        return f"{qmin}..{qmax} {centred}" + (f" along axis {axis}" if axis else "")

    @property
    def _symmetric(self) -> bool:
        return "symmetric" in str(getattr(self.observer, "qscheme", ""))

    def _axis(self) -> int | None:
        return int(self.observer.ch_axis) if self.per_channel else None

    def _keeps_a_range(self) -> bool:
        return keeps_min_max(self.observer)

    def _is_plain(self) -> bool:
        """Whether scale and zero point are what its observer makes of a range, and nothing else."""
        return self._keeps_a_range() and hasattr(self.module, "scale") and not hasattr(self.module, "learning_enabled")

    def _calculate_qparams(self) -> tuple[Tensor, Tensor]:
        # a learnable fake-quantizer's own method returns what it has learnt, not what was observed
        owner: Any = self.observer if hasattr(self.module, "learning_enabled") else self.module
        scale, zero_point = owner.calculate_qparams()
        return scale, zero_point

    def ranges(self) -> list[Tensor]:
        found = [getattr(self.observer, name, None) for name in ("min_val", "max_val")]
        return [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.numel()]

    def absent(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Leaves of its state that it has not made yet, with their shapes: torchao's `LearnableFakeQuantize` makes its
        parameters in its first forward."""
        for leaf in ("scale", "zero_point"):
            if getattr(self.module, leaf, self) is None:
                yield leaf, (self.channels() or 1,)

    def _untouched(self) -> bool:
        """Whether the quantizer has yet to see its first tensor, so that its scale is the default of 1."""
        low = getattr(self.observer, "min_val", None)
        if not isinstance(low, Tensor):
            return False
        return low.numel() == 0 or bool((low == float("inf")).all())

    def misshapen(self, leaves: Collection[str]) -> Iterable[Problem]:
        taken, expected = {leaf.rpartition(".")[2] for leaf in leaves}, self.channels()
        # of a range, nothing was seen yet; of scale and zero_point, the default that goes with that
        for owner, names, unseen in (
            (self.observer, ("min_val", "max_val"), 0),
            (self.module, ("scale", "zero_point"), 1),
        ):
            held = [value for name in names if isinstance(value := getattr(owner, name, None), Tensor)]
            if len(held) < 2 or taken.isdisjoint(names):
                continue
            first, second = (tuple(value.shape) for value in held)
            fits = expected is None or math.prod(first) in (expected, unseen)
            if first != second or not fits or (names[0] == "scale" and len(first) != 1):
                what = f", for {counted(expected, 'channel')}" if expected is not None else ""
                detail = f"{names[0]} has the shape {list(first)} and {names[1]} {list(second)}{what}"
                yield Problem(ProblemKind.INVALID, self.name, detail, _REMEDY)
        for name in taken & _FLAGS:
            if (flag := getattr(self.module, name)).numel() != 1:
                detail = f"the switch has the shape {list(flag.shape)}"
                yield Problem(ProblemKind.INVALID, f"{self.name}.{name}", detail, _REMEDY)

    def check(self) -> Iterable[Problem]:
        scale, zero_point = getattr(self.module, "scale", None), getattr(self.module, "zero_point", None)
        if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor):
            return
        key, remedy = f"{self.name}.scale", _REMEDY
        untouched = self._untouched()
        if not untouched and any(not bool(torch.isfinite(value).all()) for value in self.ranges()):
            yield Problem(ProblemKind.INVALID, self.name, "its min_val or max_val is not finite", remedy)
        ends = self.ranges()
        if not untouched and len(ends) == 2 and ends[0].shape == ends[1].shape and bool((ends[0] > ends[1]).any()):
            yield Problem(ProblemKind.INVALID, self.name, "its min_val is larger than its max_val", remedy)
            return
        learns = hasattr(self.module, "learning_enabled")  # what has left its bounds is clamped in the next forward
        bad = int((~torch.isfinite(scale) | ((scale <= 0) & (not learns))).sum())
        if bad:
            yield Problem(
                ProblemKind.INVALID, key, f"{bad} of {scale.numel()} scales are not finite and positive", remedy
            )
        qmin, qmax = getattr(self.observer, "quant_min", None), getattr(self.observer, "quant_max", None)
        if learns and not bool(torch.isfinite(zero_point).all()):
            yield Problem(ProblemKind.INVALID, f"{self.name}.zero_point", "it is not finite", remedy)
        if not learns and not zero_point.is_floating_point() and qmin is not None and qmax is not None:
            outside = int(((zero_point < qmin) | (zero_point > qmax)).sum())
            if outside:
                yield Problem(
                    ProblemKind.INVALID,
                    f"{self.name}.zero_point",
                    f"{outside} of {zero_point.numel()} are outside [{qmin}, {qmax}]",
                    remedy,
                )
        expected = self.channels()
        if not untouched and expected is not None and scale.numel() != expected:
            detail = f"expected {counted(expected, 'scale')}, found {scale.numel()}"
            yield Problem(ProblemKind.INVALID, key, detail, remedy)

    @classmethod
    def doubtful(cls, quantizers: Sequence[Self]) -> list[Self]:
        left = dict.fromkeys(quantizers)
        with quiet():
            for group, observers in together((q, q.observer) for q in quantizers if q._has_all_scales()):
                modules: list[Any] = [quantizer.module for quantizer in group]
                scale, zero_point = (
                    torch.cat([getattr(module, name).reshape(-1) for module in modules])
                    for name in ("scale", "zero_point")
                )
                odd = set(observers.odd(scale, zero_point, _SCALE_TOLERANCE))
                for number, quantizer in enumerate(group):
                    if number not in odd:
                        del left[quantizer]
        return list(left)

    def _has_all_scales(self) -> bool:
        if not self._is_plain():
            return False
        scale, zero_point = self.module.scale, self.module.zero_point
        shape, count = getattr(scale, "shape", None), self.observer.min_val.numel()
        same = isinstance(zero_point, Tensor) and zero_point.shape == shape and math.prod(shape) == count
        return same and self.channels() in (None, count) and scale.device == zero_point.device

    def hides_infinity(self) -> bool:
        return has_base(self.observer, "HistogramObserver")  # it skips inf, and `histc` stops at NaN

    def findings(self) -> Iterable[str]:
        if hasattr(self.module, "learning_enabled") and isinstance(self.module.scale, Tensor):
            scale, zero_point = self.module.scale, self.module.zero_point
            observer: Any = self.observer
            low, high = observer.quant_min, observer.quant_max
            if bool((scale <= 0).any() | (zero_point < low).any() | (zero_point > high).any()):
                yield f"{self.name}: what was learnt has left its bounds; the next forward clamps it"
        ranges = self.ranges()
        if len(ranges) != 2 or self._untouched():
            return
        one_value = ranges[0] == ranges[1]
        if self.needs is Needs.WEIGHTS:
            one_value &= ranges[0] == 0  # a channel may well have one weight, from which its scale follows
        if flat := int(one_value.sum()):
            yield f"{self.name}: {flat} of {ranges[0].numel()} ranges hold one value only; their scale is a default"
        held: Any = getattr(self.module, "scale", None)
        if self.needs is not Needs.DATA or held is None or hasattr(self.observer, "histogram"):
            return
        scale, _ = self._calculate_qparams()
        if held.shape == scale.shape and bool(((held / scale - 1).abs() > _SCALE_TOLERANCE).any()):
            yield (
                f"{self.name}: scale {float(held.flatten()[0]):.6g} is not what its range gives on this grid"
                f" ({float(scale.flatten()[0]):.6g}): the source had another quantization grid, or never updated it"
            )

    def observes_in_training(self) -> bool | Tensor:
        switch = getattr(self.module, "observer_enabled", True)
        return switch if isinstance(switch, Tensor) and not switch.is_meta else switch is True

    def has_moving_average(self) -> bool:
        moving = hasattr(self.module, "observer_enabled") and hasattr(self.observer, "averaging_constant")
        return moving and bool(self.observes_in_training())

    def magnitudes(self) -> tuple[Tensor, Tensor] | None:
        ranges = self.ranges()
        if self.source is None or len(ranges) != 2:
            return None
        with torch.no_grad():
            return magnitude(self.source()), torch.stack([value.abs().max() for value in ranges]).max().double()
