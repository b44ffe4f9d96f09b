"""Ranges from histograms: pure math, no model.

Each statistic chooses the range `[low, high]` that a quantizer then turns into scale and zero_point on its own grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qat_compat.errors import QParamError

__all__ = ["STATISTICS", "RangeHistogram", "choose_range"]

STATISTICS = ("native", "percentile", "mse", "entropy")
_BINS = 2048
_LEVELS = 256  # of the 8-bit grid that the mse and entropy statistics optimize for
_PERCENTILE = 99.99


class RangeHistogram:
    """Counts of the values seen, over a range that grows by doubling so that no count is ever split.

    Example:
        >>> import torch
        >>> histogram = RangeHistogram(bins=4)
        >>> histogram.add(torch.tensor([0.1, 0.9]))
        >>> histogram.add(torch.tensor([1.5]))
        >>> int(histogram.counts.sum()), round(histogram.high, 6)
        (3, 1.8)

    Args:
        bins: Number of bins; even.
    """

    def __init__(self, bins: int = _BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.float64, device="cpu")
        self.low = self.smallest = 0.0
        self.high = self.largest = 0.0

    def add(self, values: Tensor) -> None:
        """Count the values of one tensor of any shape."""
        flat = values.reshape(-1).float().cpu()
        low, high = (float(bound) for bound in torch.aminmax(flat))
        if not (low > float("-inf") and high < float("inf")):
            return  # the range check of the caller names the batch
        if self.counts.sum() == 0:
            self.low, self.high = min(low, 0.0), max(high, 0.0)
        self.smallest, self.largest = min(self.smallest, low), max(self.largest, high)
        while low < self.low or high > self.high:
            self._double(upwards=high > self.high)
        if self.high == self.low:
            self.counts[0] += flat.numel()
            return
        self.counts += torch.histc(flat, len(self.counts), self.low, self.high).double()

    def _double(self, *, upwards: bool) -> None:
        """Twice the range at half the resolution, keeping one end where it is."""
        width = (self.high - self.low) or 1e-30
        halves = self.counts.reshape(-1, 2).sum(1)
        empty = torch.zeros_like(halves)
        self.counts = torch.cat((halves, empty) if upwards else (empty, halves))
        if upwards:
            self.high = self.low + 2 * width
        else:
            self.low = self.high - 2 * width

    def centers(self) -> Tensor:
        """Middle of each bin, float64."""
        step = (self.high - self.low) / len(self.counts)
        return self.low + step * (torch.arange(len(self.counts), dtype=torch.float64, device="cpu") + 0.5)


def choose_range(histogram: RangeHistogram, statistic: str) -> tuple[Tensor, Tensor]:
    """The range that a statistic takes from a histogram, as two float32 scalars; it always holds zero.

    Example:
        >>> import torch
        >>> histogram = RangeHistogram()
        >>> histogram.add(torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([50.0])]))
        >>> low, high = choose_range(histogram, "percentile")
        >>> bool(high < 2)
        True

    Args:
        histogram: What was seen.
        statistic: "percentile" (the central 99.99 % of the values), "mse" (least mean squared error on 256 levels;
            the search of Choukroun et al. 2019 over clipping thresholds) or "entropy" (least Kullback-Leibler
            divergence between the clipped and the quantized distribution; Migacz, "8-bit inference with TensorRT",
            2017).

    Raises:
        QParamError: An unknown statistic, or an empty histogram.
    """
    if statistic not in STATISTICS[1:]:
        raise QParamError("unknown statistic", expected=" | ".join(STATISTICS), found=statistic)
    if histogram.counts.sum() == 0:
        raise QParamError("no value was seen", remedy="calibrate with at least one non-empty batch")
    if statistic == "percentile":
        low, high = _percentile(histogram)
    else:
        low, high = _search(histogram, _squared_error if statistic == "mse" else _divergence)
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)], dtype=torch.float32, device="cpu")
    return ends[0], ends[1]


def _percentile(histogram: RangeHistogram) -> tuple[float, float]:
    total = histogram.counts.cumsum(0) / histogram.counts.sum()
    tail = (100.0 - _PERCENTILE) / 200.0
    step = (histogram.high - histogram.low) / len(total)
    first = int(torch.searchsorted(total, tail, right=True))
    last = int(torch.searchsorted(total, 1.0 - tail))
    return histogram.low + step * first, histogram.low + step * (last + 1)


def _search(histogram: RangeHistogram, loss: Callable[[RangeHistogram, float, float], Tensor]) -> tuple[float, float]:
    """The best of 100 shrunken copies of the full range."""
    best, best_loss = 1.0, float("inf")
    for step in range(100, 0, -1):
        share = step / 100
        value = float(loss(histogram, histogram.smallest * share, histogram.largest * share))
        if value < best_loss:
            best, best_loss = share, value
    return histogram.smallest * best, histogram.largest * best


def _quantized(centers: Tensor, low: float, high: float) -> Tensor:
    scale = max((high - low) / (_LEVELS - 1), 1e-30)
    return ((centers.clamp(low, high) - low) / scale).round() * scale + low


def _squared_error(histogram: RangeHistogram, low: float, high: float) -> Tensor:
    centers = histogram.centers()
    return (histogram.counts * (centers - _quantized(centers, low, high)) ** 2).sum()


def _divergence(histogram: RangeHistogram, low: float, high: float) -> Tensor:
    """KL divergence of the quantized distribution from the clipped one, outliers counted at the ends."""
    centers = histogram.centers()
    inside = (centers >= low) & (centers <= high)
    if not bool(inside.any()):
        return torch.tensor(float("inf"), device="cpu")
    reference = histogram.counts[inside].clone()
    reference[0] += histogram.counts[centers < low].sum()
    reference[-1] += histogram.counts[centers > high].sum()
    scale = max((high - low) / (_LEVELS - 1), 1e-30)
    level = ((centers[inside] - low) / scale).round().long().clamp(0, _LEVELS - 1)
    plain = histogram.counts[inside]
    mass = plain.new_zeros(_LEVELS).scatter_add_(0, level, plain)
    width = plain.new_zeros(_LEVELS).scatter_add_(0, level, (plain > 0).double())
    spread = torch.where(plain > 0, mass[level] / width[level].clamp(min=1), torch.zeros_like(plain))
    p, q = reference / reference.sum(), spread / spread.sum().clamp(min=1e-30)
    positive = p > 0
    return (p[positive] * (p[positive] / q[positive].clamp(min=1e-12)).log()).sum()
