"""The quantizer modules that torch.ao and torchao's pt2e have in common: a fake-quantizer with an observer inside.

What is known here, and what it rests on (torch 2.13, torchao 0.18): the two packages have one set of classes each, with
the same names, the same buffers and the same arithmetic, so classes are told by name.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.errors import Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import Needs, Quantizer, Reduction
from qat_compat.frameworks.observers import together
from qat_compat.isolation import quiet
from qat_compat.ranges import magnitude, value_range
from qat_compat.schema import Role
from qat_compat.text import counted

__all__ = [
    "LEAVES",
    "OBSERVER",
    "FakeQuant",
    "has_base",
    "is_fake_quant",
    "is_observer",
    "quantizer_of",
    "quantizers_of",
]

OBSERVER = "activation_post_process"
_QUANTIZER = re.compile(r"(?:^|\.)(weight_fake_quant|activation_post_process(?:_\d+)?)(?=\.)")

# leaf of a quantizer's state -> role; the same table for models and for files
LEAVES: Mapping[str, Role] = {
    "scale":                            Role.SCALE,
    "zero_point":                       Role.ZERO_POINT,
    "fake_quant_enabled":               Role.ENABLED,
    "observer_enabled":                 Role.ENABLED,
    "static_enabled":                   Role.ENABLED,
    "learning_enabled":                 Role.ENABLED,
    "eps":                              Role.EPS,
    "min_val":                          Role.MIN,
    "max_val":                          Role.MAX,
    "histogram":                        Role.HISTOGRAM,
    f"{OBSERVER}.eps":                  Role.EPS,
    f"{OBSERVER}.min_val":              Role.MIN,
    f"{OBSERVER}.max_val":              Role.MAX,
    f"{OBSERVER}.histogram":            Role.HISTOGRAM,
    f"{OBSERVER}.scale":                Role.CONSTANT,
    f"{OBSERVER}.zero_point":           Role.CONSTANT,
}  # fmt: skip

_FLAGS = frozenset(leaf for leaf, role in LEAVES.items() if role is Role.ENABLED)
_REMEDY = "calibrate this quantizer anew, or take it from a sound file"
# names of older torch versions -> today's
_OLD_LEAVES = {"min_vals": "min_val", "max_vals": "max_val"}

# a fused kernel and the Python formula differ in the last bits; another grid differs by a factor near 2
_SCALE_TOLERANCE = 0.05

_MIN_MAX_OBSERVERS = frozenset(
    {
        "MinMaxObserver",
        "MovingAverageMinMaxObserver",
        "PerChannelMinMaxObserver",
        "MovingAveragePerChannelMinMaxObserver",
    }
)


def quantizer_of(key: str, known: Collection[str] = ()) -> tuple[str, str] | None:
    """The quantizer that a key belongs to, and the name of the tensor within it, in today's words.

    A module of the user's own may be called like a quantizer: one is told by a tensor that quantizers have.

    Example:
        >>> quantizer_of("fc.weight_fake_quant.scale"), quantizer_of("activation_post_process.0.weight")
        (('fc.weight_fake_quant', 'scale'), None)

    Args:
        key: Key of a state_dict.
        known: Quantizers of which other tensors told: all that is under their names is theirs.
    """
    for match in _QUANTIZER.finditer(key):
        name, *parts = key[: match.end()], *key[match.end() + 1 :].split(".")
        leaf = ".".join([*parts[:-1], _OLD_LEAVES.get(parts[-1], parts[-1])])
        if leaf in LEAVES or name in known:
            return name, leaf
    return None


def quantizers_of(keys: Iterable[str]) -> set[str]:
    """The quantizers that keys tell of."""
    return {found[0] for key in keys if (found := quantizer_of(key)) is not None}


def has_base(module: object, name: str) -> bool:
    """Whether a class of this name is among the bases; torch.ao and torchao.pt2e have one set of classes each."""
    return name in _names_of_bases(type(module))  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _names_of_bases(cls: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in cls.__mro__)


def is_fake_quant(module: object) -> bool:
    return has_base(module, "FakeQuantizeBase")


def is_observer(module: object) -> bool:
    return has_base(module, "ObserverBase")


def _is_on(flag: object) -> bool:
    return isinstance(flag, Tensor) and not flag.is_meta and bool(flag)


class FakeQuant(Quantizer):
    """A `FakeQuantizeBase` with its observer, or a bare observer, of torch.ao or torchao's pt2e."""

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
        self._learns = [leaf for leaf, _ in self.absent() if _is_on(getattr(module, "learning_enabled", None))]

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

    def compute_range(self) -> None:
        """`(qmin - zero_point) * scale` to `(qmax - zero_point) * scale`; about zero where the grid is symmetric."""
        scale, zero_point = self.module.scale, self.module.zero_point
        qmin, qmax = self.observer.quant_min, self.observer.quant_max
        assert isinstance(scale, Tensor) and isinstance(zero_point, Tensor)
        if self._symmetric:
            high = scale * ((qmax - qmin) / 2)
            low = -high
        else:
            low, high = (qmin - zero_point) * scale, (qmax - zero_point) * scale
        shape = low.shape if self.per_channel else ()
        for mine, value in ((self.observer.min_val, low), (self.observer.max_val, high)):
            mine.resize_(shape).copy_(value.reshape(shape))

    def _switch(self, name: str, on: bool) -> None:
        flag = getattr(self.module, name, None)
        if isinstance(flag, Tensor):
            flag.fill_(int(on))

    def disable(self) -> None:
        for name in ("fake_quant_enabled", "observer_enabled", "static_enabled", "learning_enabled"):
            self._switch(name, False)

    def start_observing(self) -> None:
        low, high = getattr(self.observer, "min_val", None), getattr(self.observer, "max_val", None)
        if isinstance(low, Tensor) and isinstance(high, Tensor):
            # not `reset_min_max_vals`: it puts new CPU tensors in place of buffers that may be elsewhere
            shape = (0,) if self.per_channel else ()
            low.resize_(shape).fill_(float("inf"))
            high.resize_(shape).fill_(float("-inf"))
        histogram = getattr(self.observer, "histogram", None)
        if isinstance(histogram, Tensor):
            histogram.resize_(self.observer.bins).zero_()
        self._switch("observer_enabled", True)
        self._switch("static_enabled", True)

    def observe(self, value: Tensor) -> None:
        if self._keeps_a_range() and value.numel():
            # what these observers hold after their first tensor is its range; they call `aminmax(dim=1)` on a float32
            # copy, which is several times slower
            self._hold_range(*value_range(value, self._axis()))
        else:
            self.module(value)

    def _hold_range(self, low: Tensor, high: Tensor) -> None:
        for mine, bound in ((self.observer.min_val, low), (self.observer.max_val, high)):
            mine.resize_(bound.shape).copy_(bound)

    def reduction(self) -> Reduction | None:
        if not self._parameter or self.source is None or not self._keeps_a_range():
            return None
        axis = self._axis()
        if self._factor is None:
            return Reduction(self._parameter, axis)
        return Reduction(self._parameter, 0) if axis in (0, None) else None  # the factor is per row

    def observe_range(self, low: Tensor, high: Tensor) -> None:
        """Where the weight is multiplied by a factor per row, so are the ends of the range of each row.

        Rounding keeps order, so that these are the ends of the product's range, to the bit: the other way round where
        the factor is negative, and NaN where one of them is.
        """
        if self._factor is not None:
            assert self.source is not None
            factor = self._factor()
            if factor.numel() != len(low) or factor.shape[0] != len(low):
                self.observe(self.source())
                return
            ends = low * factor.view(-1), high * factor.view(-1)
            low, high = torch.minimum(*ends), torch.maximum(*ends)
            if self._axis() is None:
                low, high = low.amin(), high.amax()
        self._hold_range(low, high)

    def needs_no_forward(self) -> bool:
        return self.needs is Needs.WEIGHTS and self._keeps_a_range()

    def _keeps_a_range(self) -> bool:
        return type(self.observer).__name__ in _MIN_MAX_OBSERVERS

    def _axis(self) -> int | None:
        return int(self.observer.ch_axis) if self.per_channel else None

    def compute_qparams(self) -> None:
        if not hasattr(self.module, "scale"):
            return  # a bare observer: its ranges are its state
        with quiet():
            scale, zero_point = self._calculate_qparams()
        self._write(scale, zero_point)
        for leaf in self._learns:
            getattr(self.module, leaf).requires_grad = True

    @classmethod
    def compute_all_qparams(cls, quantizers: Sequence[FakeQuant]) -> None:
        left = dict.fromkeys(quantizers)
        with quiet():
            for group, observers in together((q, q.observer) for q in quantizers if q._is_plain()):
                try:
                    found = observers.split(*observers.qparams())
                except AssertionError:  # of a range that has seen nothing; each says so itself
                    continue
                for quantizer, (scale, zero_point) in zip(group, found, strict=True):
                    quantizer._write(scale, zero_point)
                    del left[quantizer]
        for quantizer in left:
            quantizer.compute_qparams()

    def _is_plain(self) -> bool:
        """Whether scale and zero point are what its observer makes of a range, and nothing else."""
        return self._keeps_a_range() and hasattr(self.module, "scale") and not hasattr(self.module, "learning_enabled")

    def _calculate_qparams(self) -> tuple[Tensor, Tensor]:
        # a learnable fake-quantizer's own method returns what it has learnt, not what was observed
        owner: Any = self.observer if hasattr(self.module, "learning_enabled") else self.module
        scale, zero_point = owner.calculate_qparams()
        return scale, zero_point

    def _write(self, scale: Tensor, zero_point: Tensor) -> None:
        module: Any = self.module
        if module.scale is None:
            module._initialize_or_update_qparams(scale, zero_point)
            return
        for mine, value in ((module.scale, scale), (module.zero_point, zero_point)):
            if mine.shape != value.shape:
                mine.data = torch.empty(value.shape, dtype=mine.dtype, device=mine.device)
            mine.data.copy_(value)

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {self._parameter: self._quantized} if self._parameter and self.source is not None else {}

    def _quantized(self) -> Tensor:
        assert self.source is not None
        module: Any = self.module
        if self._untouched():
            raise QParamError(
                "the weight quantizer has seen nothing yet",
                key=self.name,
                remedy="load or calibrate the model first, or take the latent weights",
            )
        # a copy of the module itself: the fused kernel works out a slightly other scale than `calculate_qparams`
        quantizer = copy.deepcopy(module)
        for name, on in (("observer_enabled", 0), ("static_enabled", 0), ("fake_quant_enabled", 1)):
            flag = getattr(quantizer, name, None)
            if isinstance(flag, Tensor):
                flag.fill_(on)
        with torch.no_grad():
            value: Tensor = quantizer(self.source())
            return value if self._factor is None else value / self._factor()

    def ranges(self) -> list[Tensor]:
        found = [getattr(self.observer, name, None) for name in ("min_val", "max_val")]
        return [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.numel()]

    def absent(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Leaves of its state that it has not made yet, with their shapes: torchao's `LearnableFakeQuantize` makes its
        parameters in its first forward."""
        for leaf in ("scale", "zero_point"):
            if getattr(self.module, leaf, self) is None:
                yield leaf, (self.channels() or 1,)

    def restore(self, leaf: str, value: Tensor) -> None:
        module: Any = self.module
        value = value.to(module.eps.device)
        setattr(module, leaf, nn.Parameter(value, requires_grad=_is_on(module.learning_enabled)))
        module._initialized = True

    def takes_range(self) -> bool:
        return not self.per_channel

    def set_range(self, low: Tensor, high: Tensor) -> None:
        observer = self.observer
        for mine, value in ((observer.min_val, low), (observer.max_val, high)):
            mine.resize_(value.shape).copy_(value)
        if hasattr(self.module, "scale"):
            self._write(*observer._calculate_qparams(observer.min_val, observer.max_val))

    def _untouched(self) -> bool:
        """Whether the quantizer has yet to see its first tensor, so that its scale is the default of 1."""
        low = getattr(self.observer, "min_val", None)
        if not isinstance(low, Tensor):
            return False
        return low.numel() == 0 or bool((low == float("inf")).all())

    def misshapen(self, leaves: Collection[str]) -> Iterable[Problem]:
        taken, expected = {leaf.rpartition(".")[2] for leaf in leaves}, self.channels()
        for owner, names in ((self.observer, ("min_val", "max_val")), (self.module, ("scale", "zero_point"))):
            held = [value for name in names if isinstance(value := getattr(owner, name, None), Tensor)]
            if len(held) < 2 or taken.isdisjoint(names):
                continue
            first, second = (tuple(value.shape) for value in held)
            # of a range, nothing was seen yet; of scale and zero_point, the default that goes with that
            counts = {expected, 0 if owner is self.observer else 1} if expected is not None else {math.prod(first)}
            if first != second or math.prod(first) not in counts or (owner is self.module and len(first) != 1):
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
    def doubtful(cls, quantizers: Sequence[FakeQuant]) -> list[FakeQuant]:
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

    def observes_in_training(self) -> bool:
        return not hasattr(self.module, "observer_enabled") or _is_on(self.module.observer_enabled)

    def has_moving_average(self) -> bool:
        moving = hasattr(self.module, "observer_enabled") and hasattr(self.observer, "averaging_constant")
        return moving and self.observes_in_training()

    def drift(self) -> float | None:
        ranges = self.ranges()
        if self.source is None or len(ranges) != 2 or self._untouched():
            return None
        seen = float(torch.stack([value.abs().max() for value in ranges]).max())
        with torch.no_grad():
            now = magnitude(self.source())
        return None if now == 0 else now / seen if seen > 0 else math.inf
