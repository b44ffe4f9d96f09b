"""Ranges from histograms, held to references in float64 that share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flows import prepare_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import QuantStub, get_default_qat_qconfig, prepare_qat
from zoo import ARCHS

import qat_compat as qc
from qat_compat.qparams import STATISTICS, RangeHistogram, choose_range
from qat_compat.testing import native_calibration


def _samples(kind: str, count: int = 20_000) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "outlier": torch.cat([normal, torch.tensor([80.0])]),
        "shifted": normal * 0.01 - 5,
        "uniform": torch.rand(count, generator=generator),
        "heavy": normal.pow(3),
    }[kind]


KINDS = ("normal", "relu", "outlier", "shifted", "uniform", "heavy")


def _histogram(values: Tensor, parts: int = 3) -> RangeHistogram:
    histogram = RangeHistogram()
    for part in values.chunk(parts):
        histogram.add(part)
    return histogram


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batches=st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_no_value_is_lost_however_the_range_grows(batches: list[list[float]]) -> None:
    histogram = RangeHistogram()
    for batch in batches:
        histogram.add(torch.tensor(batch))
    values = [value for batch in batches for value in batch]
    assert int(histogram.counts.sum()) == len(values)
    assert histogram.low <= min(*values, 0.0)
    assert histogram.high >= max(*values, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_count_is_of_the_values_in_its_bin(kind: str) -> None:
    """A bin is of the final width, so that counts moved by doubling are those of a histogram made at once."""
    values = _samples(kind).double().numpy()
    histogram = _histogram(_samples(kind))
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    expected = np.histogram(values, edges)[0]
    # at an edge, float32 and float64 may disagree on the side
    assert np.abs(np.cumsum(histogram.counts.numpy()) - np.cumsum(expected)).max() <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_that_of_the_values(kind: str) -> None:
    values = _samples(kind)
    histogram = _histogram(values)
    low, high = choose_range(histogram, "percentile")
    step = (histogram.high - histogram.low) / len(histogram.counts)
    ordered = np.sort(values.double().numpy())
    tail = 0.00005 * len(ordered)
    lowest, highest = ordered[int(np.floor(tail))], ordered[int(np.ceil(len(ordered) - tail)) - 1]
    assert abs(float(low) - min(lowest, 0.0)) <= 1.01 * step
    assert abs(float(high) - max(highest, 0.0)) <= 1.01 * step


def _error(values: np.ndarray, low: float, high: float) -> float:
    """Mean squared error of 256 levels on [low, high], in float64, over the values themselves."""
    scale = max((high - low) / 255, 1e-30)
    return float(np.mean((values - (np.round((np.clip(values, low, high) - low) / scale) * scale + low)) ** 2))


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_the_best_of_a_search_over_the_values(kind: str) -> None:
    values = _samples(kind).double().numpy()
    low, high = (float(bound) for bound in choose_range(_histogram(_samples(kind)), "mse"))
    bounds = min(values.min(), 0.0), max(values.max(), 0.0)
    best = min(_error(values, bounds[0] * share, bounds[1] * share) for share in np.linspace(0.01, 1, 200))
    assert _error(values, low, high) <= 1.1 * best


def _divergence(counts: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """The entropy criterion, bin by bin: KL divergence of the 256-level distribution from the clipped one."""
    inside = [i for i, center in enumerate(centers) if low <= center <= high]
    if not inside:
        return float("inf")
    clipped = {i: counts[i] for i in inside}
    clipped[inside[0]] += sum(counts[i] for i, center in enumerate(centers) if center < low)
    clipped[inside[-1]] += sum(counts[i] for i, center in enumerate(centers) if center > high)
    scale = max((high - low) / 255, 1e-30)
    groups: dict[int, list[int]] = {}
    for i in inside:
        groups.setdefault(min(max(int(np.round((centers[i] - low) / scale)), 0), 255), []).append(i)
    spread = dict.fromkeys(inside, 0.0)
    for members in groups.values():
        filled = [i for i in members if counts[i] > 0]
        for i in filled:
            spread[i] = sum(counts[j] for j in members) / len(filled)
    p_total, q_total = sum(clipped.values()), sum(spread.values())
    total = 0.0
    for i in inside:
        if clipped[i] > 0:
            p = clipped[i] / p_total
            total += p * np.log(p / max(spread[i] / max(q_total, 1e-30), 1e-12))
    return float(total)


@pytest.mark.parametrize("kind", ["normal", "outlier", "relu"])
def test_entropy_takes_the_least_divergence(kind: str) -> None:
    histogram = _histogram(_samples(kind, 4000))
    counts, centers = histogram.counts.numpy(), histogram.centers().numpy()
    low, high = (float(bound) for bound in choose_range(histogram, "entropy"))
    shares = np.arange(100, 0, -5) / 100
    losses = [_divergence(counts, centers, histogram.low * s, histogram.high * s) for s in shares]
    assert _divergence(counts, centers, low, high) <= min(losses) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("statistic", STATISTICS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_a_range_holds_zero_and_lies_within_what_was_seen(statistic: str, kind: str) -> None:
    histogram = _histogram(_samples(kind))
    low, high = choose_range(histogram, statistic)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == ()
    assert histogram.low - 1e-5 <= float(low) <= 0 <= float(high) <= histogram.high + 1e-5
    assert low < high


@pytest.mark.parametrize("statistic", ["percentile", "entropy"])
def test_one_outlier_does_not_set_the_range(statistic: str) -> None:
    values = torch.cat([_samples("normal"), torch.tensor([1000.0])])
    assert choose_range(_histogram(values), statistic)[1] < 500


@pytest.mark.parametrize("statistic", STATISTICS[1:])
def test_nothing_but_zeros(statistic: str) -> None:
    histogram = RangeHistogram()
    histogram.add(torch.zeros(5))
    low, high = choose_range(histogram, statistic)
    assert float(low) <= 0 <= float(high)
    assert torch.isfinite(torch.stack([low, high])).all()


@pytest.mark.parametrize("statistic", ["native", "median"])
def test_an_unknown_statistic(statistic: str) -> None:
    histogram = _histogram(_samples("normal", 10))
    with pytest.raises(qc.QParamError, match="unknown statistic"):
        choose_range(histogram, statistic)


def test_an_empty_histogram() -> None:
    with pytest.raises(qc.QParamError, match="no value was seen"):
        choose_range(RangeHistogram(), "mse")


def test_nan_and_infinity_are_left_to_the_range_check() -> None:
    histogram = RangeHistogram()
    histogram.add(torch.tensor([1.0, float("nan")]))
    histogram.add(torch.tensor([1.0, float("inf")]))
    assert histogram.counts.sum() == 0


# --- what a quantizer makes of a range --------------------------------------------------------------------------------


def _numpy_qparams(low: float, high: float, qmin: int, qmax: int) -> tuple[float, int]:
    """Affine scale and zero_point of Jacob et al. 2018, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (qmax - qmin)
    return scale, int(np.clip(qmin - np.round(low / scale), qmin, qmax))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_zero_point_of_a_loaded_model(statistic: str, kind: str) -> None:
    model = nn.Sequential(QuantStub(), nn.Linear(1, 1)).train()
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    values = _samples(kind)
    state = {"1.weight": torch.ones(1, 1), "1.bias": torch.zeros(1)}
    qc.load_checkpoint(model, state, calibration=[values.reshape(-1, 1)], statistic=statistic)
    observer = model[0].activation_post_process.activation_post_process
    if statistic == "native":
        low, high = float(values.min()), float(values.max())
    else:
        low, high = (float(bound) for bound in choose_range(_histogram(values, 1), statistic))
    scale, zero_point = _numpy_qparams(low, high, observer.quant_min, observer.quant_max)
    assert model[0].activation_post_process.scale.item() == pytest.approx(scale, rel=1e-5)
    assert abs(model[0].activation_post_process.zero_point.item() - zero_point) <= 1
    assert float(observer.min_val) == pytest.approx(low, abs=1e-6)
    assert float(observer.max_val) == pytest.approx(high, abs=1e-6)


@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86"])
def test_per_channel_weight_scales_against_numpy(flow: str) -> None:
    """Symmetric: the largest magnitude of each channel of what the module really quantizes."""
    arch = ARCHS["plain"]
    model = prepare_for(flow, "plain")(arch.make())
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    state = {key: value.double().numpy() for key, value in arch.state().items()}
    factor = state["bn1.weight"] / np.sqrt(state["bn1.running_var"] + 1e-5)
    fused = state["conv1.weight"] * factor[:, None, None, None]
    for module, weight in ((model.conv1, fused), (model.fc, state["fc.weight"])):
        expected = np.abs(weight).reshape(len(weight), -1).max(1) / 127.5
        np.testing.assert_allclose(module.weight_fake_quant.scale.numpy(), expected, rtol=1e-5)
        assert (module.weight_fake_quant.zero_point == 0).all()


def test_other_statistics_leave_weights_alone() -> None:
    arch = ARCHS["plain"]
    native = prepare_for("eager-x86", "plain")(arch.make(1))
    native_calibration(native, arch.batches())
    model = prepare_for("eager-x86", "plain")(arch.make())
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches(), statistic="percentile")
    expected = native.state_dict()
    for key, value in model.state_dict().items():
        if "weight_fake_quant" in key:
            assert torch.equal(value, expected[key]), key
