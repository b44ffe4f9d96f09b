"""A QAT file of another framework: its float tensors into prepared and plain models, its quantizers dropped with the
reason, and the way back bit for bit; an integer file is refused with one clear problem."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import prepare_for
from test_files_keys import PREPARED
from torch import Tensor, nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.frameworks import converted_pt2e
from qat_compat.testing import assert_same_state, assert_twin

ARCH = ARCHS["plain"]
FLOWS = ("eager-x86", "fx-x86")


def foreign(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of that framework over these weights: its own keys, at the layers of this network."""
    extra = {}
    for key, (shape, _) in PREPARED[name].items():
        for old, new in (("conv", "conv1"), ("inp.", "bn1.")):
            key = key.replace(f"/{old}2d", "/conv2d") if old in key.partition("/")[2] else key
            key = new + key[len(old) :] if key.startswith(old) else key
        extra[key] = torch.full(shape, 2.0)
    if name == "compressed_tensors":
        extra["fc.weight_scale"] = torch.ones(state["fc.weight"].shape[0], 1)
    return state | extra


@pytest.mark.parametrize("name", PREPARED)
def test_a_qat_file_is_read_as_its_weights(tmp_path: Path, name: str) -> None:
    state = ARCH.state()
    content = foreign(name, state)
    torch.save({"state_dict": content, "epoch": 2}, tmp_path / "qat.pt")
    checkpoint = qc.open_checkpoint(tmp_path / "qat.pt")
    assert (checkpoint.framework, checkpoint.stage) == (name, "prepared")
    back = qc.to_float(tmp_path / "qat.pt")
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    plain = ARCH.make()
    report = qc.load_checkpoint(plain, tmp_path / "qat.pt")
    assert report.dropped == len(content) - len(state)
    assert "state of a quantizer that the target does not have" in str(report)
    assert_same_state(plain, state)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", ["modelopt", "brevitas"])
def test_into_a_prepared_model(name: str, flow: str) -> None:
    """Nothing of the other framework's ranges is taken for this one's: the twin is that of the bare weights."""
    state = ARCH.state()
    assert_twin(ARCH.make, prepare_for(flow, "plain"), state, ARCH.batches(), source=foreign(name, state))


def _converted_eager() -> nn.Module:
    model = prepare_for("eager-x86", "plain")(ARCH.make())
    model(ARCH.batches(1)[0])
    return torch.ao.quantization.convert(model.eval())


def _converted_pt2e() -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    model = prepare_for("pt2e-x86", "plain")(ARCH.make())
    model(ARCH.batches(1)[0])
    move_exported_model_to_eval(model)
    return convert_pt2e(model)


def _converted_torchao() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = ARCH.make()
    quantize_(model, Int8WeightOnlyConfig())
    return model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "converted": _converted_eager,
    "pt2e": _converted_pt2e,
    "torchao": _converted_torchao,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_converted_model_is_never_taken_for_float(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MAKERS[name]()
        torch.save(model.state_dict(), tmp_path / "int8.pt")
        for source in (model, model.state_dict(), tmp_path / "int8.pt"):
            _refused(source, name)
        with pytest.raises(qc.PlanError, match=r"the target is a converted \(integer\) model") as error:
            qc.load_checkpoint(model, ARCH.state(), calibration=ARCH.batches())
        assert error.value.problems[0].remedy == "load into the float or prepared model, and convert that"


def _refused(source: Any, name: str) -> None:
    checkpoint = qc.open_checkpoint(source)
    assert (checkpoint.framework, checkpoint.stage) == (name, "converted")
    for target in (ARCH.make(), prepare_for("eager-x86", "plain")(ARCH.make())):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(qc.PlanError) as error:
            qc.load_checkpoint(target, source, calibration=ARCH.batches())
        (problem,) = error.value.problems
        assert problem.detail.startswith(f"the source is a converted (integer) checkpoint ({name})")
        assert problem.remedy.startswith("pass the float or QAT checkpoint that it was converted from")
        assert_same_state(target, before)


def test_a_scale_that_multiplies_the_input_is_not_dropped() -> None:
    """AWQ's and SmoothQuant's `_pre_quant_scale` is part of what the layer computes."""
    make = partial(nn.Sequential, nn.Linear(4, 3))
    state = {key: value.detach() for key, value in make().state_dict().items()}
    state["0.weight_quantizer._amax"] = torch.ones(3, 1)
    state["0.input_quantizer._pre_quant_scale"] = torch.full((4,), 2.0)
    with pytest.raises(qc.PlanError, match=r"mismatched +0\.input_quantizer\._pre_quant_scale"):
        qc.load_checkpoint(make(), state)


@pytest.mark.parametrize("order", ["of the keys", "reversed"])
def test_integers_and_weights_of_one_shape_are_paired_once(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the keys, as a graph has them, with one look at each; in any other they are found as well."""
    looks: list[int] = []
    is_rounded = converted_pt2e._is_rounded

    def counted(*arguments: Any) -> bool:
        looks.append(1)
        return is_rounded(*arguments)

    monkeypatch.setattr(converted_pt2e, "_is_rounded", counted)
    torch.manual_seed(0)
    count = 12
    weights = [torch.randn(6, 5) for _ in range(count)]
    scales = [weight.abs().amax(1) / 127 for weight in weights]
    zeros = [torch.zeros(6, dtype=torch.int64) for _ in weights]
    integers = [torch.round(w / s[:, None]).to(torch.int8) for w, s in zip(weights, scales, strict=True)]
    if order == "reversed":
        integers.reverse()
    group = converted_pt2e._Group(tuple(f"{i}.weight" for i in range(count)), count, count)
    for index, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        found = group.value(index, *weights, *integers, *scales, *zeros)
        assert torch.equal(found, torch.round(weight / scale[:, None]) * scale[:, None])
    if order == "of the keys":
        assert len(looks) == count
