"""Eager mode puts a module of other names in the place of an LSTM: there, back, resumed and converted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.ao.nn.quantizable
from torch import Tensor, nn
from torch.ao.quantization import QuantWrapper, convert, get_default_qat_qconfig, prepare_qat

import qat_compat as qc
from qat_compat.testing import assert_resume, assert_round_trip, assert_same_state, assert_twin, native_calibration

# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/ao/nn/quantizable/modules/rnn.py
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "without bias": {"bias": False},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


class Tagger(nn.Module):
    """Its linear layer has names like those of the cells."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, **options)
        self.gates = nn.ModuleDict({"layers": nn.Linear(8 if self.lstm.bidirectional else 4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.gates["layers"](self.lstm(x)[0])


def make(layout: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tagger(**LAYOUTS[layout]).train()


def prepare(model: nn.Module) -> nn.Module:
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model.train())


def batches() -> list[Tensor]:
    return list(torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(1)))


def calibrated(layout: str) -> nn.Module:
    model = prepare(make(layout, 1))
    native_calibration(model, batches())
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twin(layout: str) -> None:
    twin = assert_twin(partial(make, layout), prepare, make(layout, 1).state_dict(), batches())
    assert isinstance(twin.native.lstm, torch.ao.nn.quantizable.LSTM)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str) -> None:
    """Without `like=` the order is that of the cells, weight and bias of one input side by side."""
    state = make(layout, 1).state_dict()
    assert_round_trip(partial(make, layout), prepare, state, batches=batches(), ordered=())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume(layout: str) -> None:
    assert_resume(partial(make, layout), prepare, calibrated(layout), batches())


def test_in_a_wrapper() -> None:
    def wrapped(seed: int = 0) -> nn.Module:
        return QuantWrapper(make("one layer", seed)).train()

    state = make("one layer", 1).state_dict()
    model = prepare(wrapped())
    qc.load_checkpoint(model, state, calibration=batches())
    assert_same_state(dict(qc.to_float(model, like=make("one layer"))), state)


def test_an_lstm_without_qconfig_stays_what_it_is() -> None:
    def without(model: nn.Module) -> nn.Module:
        model.qconfig, model.lstm.qconfig = get_default_qat_qconfig("x86"), None
        return prepare_qat(model.train())

    twin = assert_twin(partial(make, "one layer"), without, make("one layer", 1).state_dict(), batches())
    assert type(twin.native.lstm) is nn.LSTM


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_back_to_float(layout: str) -> None:
    """The weights are what the cells' own integers say, under the names of `nn.LSTM`."""
    integers = convert(calibrated(layout).eval())
    back = qc.to_float(integers.state_dict(), like=make(layout))
    make(layout).load_state_dict(dict(back), strict=True)
    for number, layer in enumerate(integers.lstm.layers):
        cell = layer.layer_fw.cell
        assert torch.equal(back[f"lstm.weight_ih_l{number}"], cell.igates.weight().dequantize())
        assert torch.equal(back[f"lstm.weight_hh_l{number}"], cell.hgates.weight().dequantize())
