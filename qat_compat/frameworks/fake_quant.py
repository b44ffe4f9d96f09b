"""The quantizer modules that torch.ao and torchao's pt2e have in common: a fake-quantizer with an observer inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from qat_compat.errors import QParamError
from qat_compat.frameworks.base import Needs, Reduction
from qat_compat.frameworks.fake_quant_state import FakeQuantState, is_on
from qat_compat.frameworks.observers import together
from qat_compat.isolation import quiet
from qat_compat.ranges import value_range

__all__ = ["FakeQuant"]


class FakeQuant(FakeQuantState):
    """A `FakeQuantizeBase` with its observer, or a bare observer, of torch.ao or torchao's pt2e."""

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

    def compute_qparams(self) -> None:
        if not hasattr(self.module, "scale"):
            return  # a bare observer: its ranges are its state
        with quiet():
            scale, zero_point = self._calculate_qparams()
        self._write(scale, zero_point)
        for leaf in self._learns:
            getattr(self.module, leaf).requires_grad = True

    @classmethod
    def compute_all_qparams(cls, quantizers: Sequence[Self]) -> None:
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

    def restore(self, leaf: str, value: Tensor) -> None:
        module: Any = self.module
        value = value.to(module.eps.device)
        setattr(module, leaf, nn.Parameter(value, requires_grad=is_on(module.learning_enabled)))
        module._initialized = True

    def takes_range(self) -> bool:
        return not self.per_channel

    def set_range(self, low: Tensor, high: Tensor) -> None:
        observer = self.observer
        for mine, value in ((observer.min_val, low), (observer.max_val, high)):
            mine.resize_(value.shape).copy_(value)
        if hasattr(self.module, "scale"):
            self._write(*observer._calculate_qparams(observer.min_val, observer.max_val))
