"""Many observers at once: the bits that each gives alone, and no quantizer with something to say is passed over."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as torch_ao
from torchao.quantization.pt2e import fake_quantize as pt2e_fakes
from torchao.quantization.pt2e import observer as pt2e

from qat_compat.frameworks.base import Needs
from qat_compat.frameworks.fake_quant import FakeQuant
from qat_compat.frameworks.observers import together

PACKAGES = pytest.mark.parametrize("package", [torch_ao, pt2e], ids=["torch_ao", "pt2e"])
GRIDS: list[dict[str, Any]] = [
    {"dtype": torch.qint8},
    {"dtype": torch.quint8},
    {"dtype": torch.qint8, "reduce_range": True},
    {"dtype": torch.qint8, "quant_min": -7, "quant_max": 8},
    {"dtype": torch.quint8, "quant_min": 0, "quant_max": 15},
    {"dtype": torch.quint8, "eps": 0.25},
]
SCHEMES = ["affine", "symmetric"]
ENDS = [(-1.0, 3.0), (0.0, 0.0), (2.0, 5.0), (-5.0, -2.0), (-1e-30, 1e-30), (-3e38, 3e38), (0.1, 0.1), (-0.3, 0.7)]


def _ranges(observer: nn.Module, low: list[float], high: list[float]) -> nn.Module:
    shape = (len(low),) if "PerChannel" in type(observer).__name__ else ()
    for name, ends in (("min_val", low), ("max_val", high)):
        getattr(observer, name).resize_(shape).copy_(torch.tensor(ends).reshape(shape))
    return observer


def _observers(package: ModuleType) -> list[nn.Module]:
    found = []
    for grid, scheme in itertools.product(GRIDS, SCHEMES):
        single = {**grid, "qscheme": getattr(torch, f"per_tensor_{scheme}")}
        rows = {**grid, "qscheme": getattr(torch, f"per_channel_{scheme}")}
        found += [_ranges(package.MinMaxObserver(**single), [low], [high]) for low, high in ENDS]
        found += [_ranges(package.MovingAverageMinMaxObserver(**single), [low], [high]) for low, high in ENDS]
        for start in (0, 3):
            low, high = zip(*ENDS[start:], strict=True)
            found.append(_ranges(package.PerChannelMinMaxObserver(**rows), list(low), list(high)))
    return found


@PACKAGES
def test_the_bits_are_those_of_each_observer_alone(package: ModuleType) -> None:
    observers = _observers(package)
    groups = together((number, observer) for number, observer in enumerate(observers))
    seen = []
    for numbers, group in groups:
        for number, (scale, zero_point) in zip(numbers, group.split(*group.qparams()), strict=True):
            expected = observers[number].calculate_qparams()
            assert torch.equal(scale, expected[0]), (observers[number], scale, expected)
            assert torch.equal(zero_point, expected[1]), (observers[number], zero_point, expected)
            seen.append(number)
    assert sorted(seen) == list(range(len(observers)))
    assert len(groups) < len(observers) / 4


@PACKAGES
def test_each_may_have_an_eps_of_its_own(package: ModuleType) -> None:
    observers = [_ranges(package.MinMaxObserver(eps=eps), [-1.0], [1.0]) for eps in (1e-7, 0.5, 0.01)]
    ((_, group),) = together(enumerate(observers))
    for observer, (scale, _) in zip(observers, group.split(*group.qparams()), strict=True):
        assert torch.equal(scale, observer.calculate_qparams()[0])
        assert observer.eps.numel() == 1


def test_what_only_the_observer_can_tell_is_left_to_it() -> None:
    empty = torch_ao.PerChannelMinMaxObserver()
    double = torch_ao.MinMaxObserver()
    double.min_val, double.max_val = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    assert together([("empty", empty), ("double", double)]) == []


# --- the quantizers ---------------------------------------------------------------------------------------------------


def _fake(package: ModuleType, **options: Any) -> nn.Module:
    fakes = torch_ao if package is torch_ao else pt2e_fakes
    options = {"observer": package.MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 255, **options}
    return fakes.FakeQuantize(**options)  # type: ignore[no-any-return]


def _quantizer(number: int, module: nn.Module, needs: Needs = Needs.DATA) -> FakeQuant:
    source = (lambda: torch.ones(2)) if needs is Needs.WEIGHTS else None
    return FakeQuant((f"q{number}",), module, f"output:{number}", source)


def _seen(module: nn.Module, low: float, high: float) -> nn.Module:
    module(torch.tensor([low, high]))
    return module


@PACKAGES
def test_quantizers_settled_together_hold_what_each_settles_to(package: ModuleType) -> None:
    def made() -> list[FakeQuant]:
        modules = [_seen(_fake(package), low, high) for low, high in ENDS]
        modules.insert(2, _fake(package))  # has seen nothing
        modules.append(_seen(_fake(package, quant_max=127), -1.0, 1.0))
        modules.append(_seen(_fake(package, observer=package.HistogramObserver), -1.0, 1.0))
        for module in modules:
            module.scale.fill_(7.0)  # type: ignore[operator, union-attr]
        return [_quantizer(number, module) for number, module in enumerate(modules)]

    for without in ([], [2]):  # with one that has seen nothing, and without
        alone = [quantizer for number, quantizer in enumerate(made()) if number not in without]
        all_together = [quantizer for number, quantizer in enumerate(made()) if number not in without]
        for quantizer in alone:
            quantizer.compute_qparams()
        FakeQuant.compute_all_qparams(all_together)
        for one, other in zip(alone, all_together, strict=True):
            state, expected = other.module.state_dict(), one.module.state_dict()
            assert list(state) == list(expected)
            for key, value in expected.items():
                assert value.shape == state[key].shape and value.dtype == state[key].dtype
                assert torch.equal(value, state[key]), (key, value, state[key])


def _set(name: str, value: float) -> Any:
    def change(module: Any) -> None:
        owner = module if hasattr(module, name) and name in module._buffers else module.activation_post_process
        getattr(owner, name).fill_(value)

    return change


CHANGES: dict[str, Any] = {
    "scale of zero": _set("scale", 0.0),
    "negative scale": _set("scale", -1.0),
    "infinite scale": _set("scale", float("inf")),
    "scale that is no number": _set("scale", float("nan")),
    "scale of another grid": _set("scale", 0.5),
    "zero point above": _set("zero_point", 256),
    "zero point below": _set("zero_point", -1),
    "infinite end": _set("max_val", float("inf")),
    "end that is no number": _set("min_val", float("nan")),
    "ends the wrong way round": _set("min_val", 9.0),
    "one value only": _set("min_val", 3.0),
    "more scales than ranges": lambda module: module.scale.resize_(2).fill_(1.0),
}


@PACKAGES
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_something_to_say_is_in_doubt_and_nothing_else(package: ModuleType, change: str) -> None:
    modules: list[nn.Module] = [_seen(_fake(package), -1.0, 3.0) for _ in range(4)]
    CHANGES[change](modules[2])
    quantizers = [_quantizer(number, module) for number, module in enumerate(modules)]
    assert list(quantizers[2].check()) or list(quantizers[2].findings()), "the case shows nothing"
    assert FakeQuant.doubtful(quantizers) == [quantizers[2]]


@PACKAGES
def test_a_channel_of_zeros_is_in_doubt(package: ModuleType) -> None:
    def made(weight: Tensor) -> FakeQuant:
        options = {"observer": package.PerChannelMinMaxObserver, "quant_min": -128, "quant_max": 127}
        module = _fake(package, **options, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0)
        module(weight)
        return FakeQuant(("q",), module, "weight:fc", lambda: weight, len(weight))

    sound, flat = made(torch.tensor([[-1.0, 2.0], [3.0, 4.0]])), made(torch.tensor([[-1.0, 2.0], [0.0, 0.0]]))
    assert list(flat.findings()) and not list(sound.findings())
    assert FakeQuant.doubtful([sound, flat]) == [flat]
