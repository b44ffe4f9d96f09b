"""Many observers of torch.ao or torchao's pt2e at once: their own arithmetic, called once for all that share a grid.

`calculate_qparams` of one observer is a dozen small operations, and waits for a device at each condition. It works on
every pair of ends apart from all others, so that the ends of many observers in one vector give the same bits.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Together", "together"]

_Owner = TypeVar("_Owner")

# what the arithmetic of an observer depends on beside the two ends and `eps` (torch 2.13, torchao 0.18,
# `UniformQuantizationObserverBase._calculate_qparams`)
_SETTINGS = ("qscheme", "dtype", "quant_min", "quant_max", "has_customized_qrange")


class Together:
    """Observers that have one grid and lie on one device.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import MinMaxObserver
        >>> observers = [MinMaxObserver(qscheme=torch.per_tensor_symmetric, dtype=torch.qint8) for _ in range(2)]
        >>> _ = observers[0](torch.tensor([-1.0, 2.0])), observers[1](torch.tensor([-8.0, 4.0]))
        >>> group = Together(observers)
        >>> group.low, group.high
        (tensor([-1., -8.]), tensor([2., 4.]))
        >>> [
        ...     scale.tolist() == observer.calculate_qparams()[0].tolist()
        ...     for (scale, _), observer in zip(group.split(*group.qparams()), observers)
        ... ]
        [True, True]

    Args:
        observers: Each with a range; see :func:`together`.

    Attributes:
        low, high: The ends of all ranges, one after the other, shape `(number of ranges,)`.
    """

    def __init__(self, observers: list[Any]) -> None:
        self.observers = observers
        self.sizes = [observer.min_val.numel() for observer in observers]
        self.low = torch.cat([observer.min_val.reshape(-1) for observer in observers])
        self.high = torch.cat([observer.max_val.reshape(-1) for observer in observers])

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points of all ranges, two of shape `(number of ranges,)`.

        Raises:
            AssertionError: Some range has its ends the wrong way round, as one has that has seen nothing.
        """
        return self._qparams(self.low, self.high)

    def _qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        stand_in = copy.copy(self.observers[0])
        eps = [observer.eps.expand(size) for observer, size in zip(self.observers, self.sizes, strict=True)]
        stand_in.__dict__["_buffers"] = {**stand_in._buffers, "eps": torch.cat(eps)}
        scale, zero_point = stand_in._calculate_qparams(low, high)
        return scale, zero_point

    def odd(self, scale: Tensor, zero_point: Tensor, tolerance: float) -> list[int]:
        """Numbers of the observers of which some range is empty or not finite, or which hold other qparams than those
        that their ranges give.

        Args:
            scale, zero_point: What is held, shape `(number of ranges,)`.
            tolerance: By how much, relatively, a scale may differ.
        """
        fine = torch.isfinite(self.low) & torch.isfinite(self.high) & (self.low < self.high)
        expected, _ = self._qparams(
            self.low.where(fine, torch.zeros_like(self.low)), self.high.where(fine, torch.ones_like(self.high))
        )
        qmin, qmax = self.observers[0].quant_min, self.observers[0].quant_max
        fine &= (scale > 0) & ((scale / expected - 1).abs() <= tolerance) & (zero_point >= qmin) & (zero_point <= qmax)
        ends = list(itertools.accumulate(self.sizes))
        return sorted({bisect.bisect(ends, place) for place in (~fine).nonzero().flatten().tolist()})

    def split(self, scale: Tensor, zero_point: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The part of each observer, shape `(its ranges,)`."""
        return list(zip(scale.split_with_sizes(self.sizes), zero_point.split_with_sizes(self.sizes), strict=True))


def together(owners: Iterable[tuple[_Owner, Any]]) -> list[tuple[list[_Owner], Together]]:
    """Owners with their observers, by grid and device; those are left out of which only the observer itself can tell.

    Example:
        >>> from torch.ao.quantization import MinMaxObserver
        >>> observers = [MinMaxObserver(), MinMaxObserver(quant_min=0, quant_max=15), MinMaxObserver()]
        >>> [names for names, _ in together(zip("abc", observers))]
        [['a', 'c'], ['b']]

    Args:
        owners: Whatever has an observer, and that: one that keeps `min_val` and `max_val` and nothing else.
    """
    groups: dict[tuple[Any, ...], list[tuple[_Owner, Any]]] = {}
    for owner, observer in owners:
        low, high = observer.min_val, observer.max_val
        # 0-dimensional values of other dtypes would take part otherwise in what the dtype of a result is
        single = low.dtype == high.dtype == observer.eps.dtype == torch.float32 and observer.eps.numel() == 1
        if single and low.numel() and low.shape == high.shape and low.device == high.device == observer.eps.device:
            settings = (getattr(observer, name, None) for name in _SETTINGS)
            groups.setdefault((type(observer), low.device, *settings), []).append((owner, observer))
    return [([owner for owner, _ in group], Together([observer for _, observer in group])) for group in groups.values()]
