"""Fake-quantizers that learn scale and zero_point: torch.ao's, and PT2E's, which has none until it has run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import qat_compat as qc
from qat_compat.testing import (
    assert_resume,
    assert_round_trip,
    assert_same_output,
    assert_same_state,
    assert_twin,
    native_calibration,
    scramble,
)
from qat_compat.testing.scrambling import settle

Prepare = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))


def make(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net().train()
        settle(model, [((batch,), {}) for batch in batches()])
    return model


def batches() -> list[Tensor]:
    return list(torch.randn(2, 3, 3, 6, 6, generator=torch.Generator().manual_seed(5)))


def torch_ao(model: nn.Module, *, per_channel: bool) -> nn.Module:
    activation = _LearnableFakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, use_grad_scaling=True
    )
    integers = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "use_grad_scaling": True}
    for layer in (model.conv, model.fc):
        weight = _LearnableFakeQuantize.with_args(
            **integers,
            **(
                {
                    "observer": tq.MovingAveragePerChannelMinMaxObserver,
                    "qscheme": torch.per_channel_symmetric,
                    "channel_len": len(layer.weight),
                    "ch_axis": 0,
                }
                if per_channel
                else {"observer": tq.MovingAverageMinMaxObserver, "qscheme": torch.per_tensor_symmetric}
            ),
        )
        layer.qconfig = tq.QConfig(activation=activation, weight=weight)
    for layer in (model.bn, model.relu):
        layer.qconfig = model.conv.qconfig
    return tq.prepare_qat(tq.fuse_modules_qat(model.train(), [["conv", "bn", "relu"]]))


def pt2e(model: nn.Module) -> nn.Module:
    import torchao.quantization.pt2e as pt2e
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    def spec(integers: tuple[torch.dtype, int, int], qscheme: torch.qscheme, observer: type) -> QuantizationSpec:
        make_quantizer = LearnableFakeQuantize.with_args(observer=observer, use_grad_scaling=True)
        axis = {"ch_axis": 0} if qscheme is torch.per_channel_symmetric else {}
        return QuantizationSpec(*integers[:1], make_quantizer, *integers[1:], qscheme, **axis)

    inputs = spec((torch.uint8, 0, 255), torch.per_tensor_affine, pt2e.MovingAverageMinMaxObserver)
    signed, observer = (torch.int8, -128, 127), pt2e.MovingAveragePerChannelMinMaxObserver
    weights = spec(signed, torch.per_channel_symmetric, observer)

    class Learning(Quantizer):
        def annotate(self, graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in graph.graph.nodes:
                if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
                    chosen = {node.args[0]: inputs, node.args[1]: weights}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(chosen, _annotated=True)
            return graph

        def validate(self, graph: torch.fx.GraphModule) -> None:
            pass

    return prepare_qat_pt2e(torch.export.export(model.train(), (batches()[0],)).module(), Learning())


FLOWS: dict[str, Prepare] = {
    "torch_ao per tensor": partial(torch_ao, per_channel=False),
    "torch_ao per channel": partial(torch_ao, per_channel=True),
    "pt2e per channel": pt2e,
}
flows = pytest.mark.parametrize("flow", FLOWS)


def learning(prepare: Prepare) -> Prepare:
    """With observers off and ranges learning, as a model that is to be trained on."""

    def prepared(model: nn.Module) -> nn.Module:
        model = prepare(model)
        for module in model.modules():
            for start in ("enable_param_learning", "enable_range_learning"):
                getattr(module, start, lambda: None)()
        return model

    return prepared


@cache
def native(flow: str) -> nn.Module:
    model = make()
    model.load_state_dict(make(1).state_dict())
    model = FLOWS[flow](model)
    native_calibration(model, batches())
    return model


@cache
def trained(flow: str) -> nn.Module:
    """After steps in which scales and zero points were learnt: these are then no whole numbers."""
    model = learning(copy.deepcopy)(native(flow))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for batch in batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.endswith(".scale") for name in moved)
    assert any(name.endswith(".zero_point") for name in moved)
    return model


@flows
def test_twin(flow: str) -> None:
    assert_twin(make, FLOWS[flow], make(1).state_dict(), batches())


@flows
def test_twin_of_a_model_that_is_learning_already(flow: str) -> None:
    """The observer is off, and calibration is what it is for; afterwards it is off again."""
    twin = learning(copy.deepcopy)(native(flow))
    model = learning(FLOWS[flow])(scramble(make()))
    qc.load_checkpoint(model, make(1).state_dict(), calibration=batches())
    assert_same_state(model, twin)
    assert_same_output(model, twin, batches())
    learnt = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert learnt == {name: parameter.requires_grad for name, parameter in twin.named_parameters()}


@flows
def test_resume(flow: str) -> None:
    """Into a model that observes: its switches are those of the source afterwards."""
    assert_resume(make, FLOWS[flow], trained(flow), batches())


@flows
def test_own_file(flow: str, tmp_path: Path) -> None:
    model = trained(flow)
    fresh = learning(FLOWS[flow])(scramble(make()))
    qc.load_checkpoint(fresh, qc.save_checkpoint(model, tmp_path / "qat.pt"))
    assert_same_state(fresh, model)
    assert_same_output(fresh, model, batches())


@flows
def test_round_trip(flow: str) -> None:
    assert_round_trip(make, FLOWS[flow], make(1).state_dict(), batches=batches())


@flows
def test_quantized_weights_are_those_that_were_learnt(flow: str) -> None:
    model = copy.deepcopy(trained(flow))
    weight = dict(model.named_parameters())["fc.weight"]
    quantizers: list[Any] = [module for module in model.modules() if hasattr(module, "learning_enabled")]
    fitting = [q for q in quantizers if "symmetric" in str(q.qscheme) and q.scale.numel() in (1, len(weight))]
    found = qc.to_float(trained(flow), weights="quantized")["fc.weight"]
    assert not torch.equal(found, weight)
    assert any(torch.equal(found, q(weight)) for q in fitting)


@flows
def test_an_error_leaves_no_parameter_behind(flow: str) -> None:
    """PT2E's quantizers have no scale before, and none after."""
    model = FLOWS[flow](scramble(make()))
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    source = trained(flow).state_dict()
    bad = next(key for key in source if key.endswith(".scale"))
    with pytest.raises(qc.QParamError, match="not finite"):
        qc.load_checkpoint(model, {**source, bad: torch.full_like(source[bad], torch.nan)})
    assert list(model.state_dict()) == keys
    assert_same_state(model.state_dict(), values)


@flows
def test_what_was_learnt_may_be_past_its_bounds(flow: str) -> None:
    """After a ReLU a zero point begins at the smallest integer, and any step may take it below; torch clamps it."""
    model = copy.deepcopy(trained(flow))
    quantizers: list[Any] = [module for module in model.modules() if hasattr(module, "learning_enabled")]
    for quantizer in quantizers:
        quantizer.zero_point.data.fill_(-1.25e-3 if quantizer.quant_min == 0 else -128.5)
    fresh = learning(FLOWS[flow])(scramble(make()))
    report = qc.load_checkpoint(fresh, model.state_dict())
    assert_same_state(fresh, model)
    assert any("has left its bounds" in text for text in report.warnings)
    quantizers[0].scale.data.fill_(torch.nan)
    with pytest.raises(qc.QParamError, match="not finite"):
        qc.load_checkpoint(fresh, model.state_dict())
