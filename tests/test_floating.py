"""The way back: what the float keys hold, under whose names, and what is asked for where neither can be known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import prepare_for
from test_apply import prepared, untouched
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.qat import QATConfig
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_same_state, native_calibration


def calibrated(flow: str, name: str) -> nn.Module:
    model = prepare_for(flow, name)(ARCHS[name].make(1))
    native_calibration(model, ARCHS[name].batches())
    return model


def _like(form: str, name: str, folder: Path) -> Any:
    model = ARCHS[name].make(4)
    if form == "model":
        return model
    if form == "state_dict":
        return model.state_dict()
    if form == "keys":
        return list(model.state_dict())
    if form == "generator of keys":
        return (key for key in model.state_dict())
    path = folder / f"float.{form}"
    qc.save_checkpoint(model.state_dict(), path)
    return path if form == "pt" else str(path)


@pytest.mark.parametrize("form", ["model", "state_dict", "keys", "generator of keys", "pt", "safetensors"])
def test_like_in_every_form(form: str, tmp_path: Path) -> None:
    back = qc.to_float(calibrated("eager-x86", "plain"), like=_like(form, "plain", tmp_path))
    expected = ARCHS["plain"].make(1).state_dict()
    assert list(back) == list(expected)
    assert_same_state(dict(back.items()), dict(expected))


def test_like_sets_the_dtypes_and_the_order() -> None:
    model = calibrated("eager-x86", "plain")
    like = {key: v.half() if v.is_floating_point() else v for key, v in ARCHS["plain"].make().state_dict().items()}
    like = dict(reversed(like.items()))
    back = qc.to_float(model, like=like)
    assert list(back) == list(like)
    assert back["fc.weight"].dtype == back.spec("fc.weight").dtype == torch.float16
    assert torch.equal(back["fc.weight"], model.fc.weight.half())


def test_a_model_that_is_fused_and_holds_no_quantizer_goes_both_ways(tmp_path: Path) -> None:
    arch = ARCHS["plain"]
    state, model = arch.state(), fuse_modules_qat(arch.make(), arch.fusions(arch.make()))
    assert qc.load_checkpoint(model, state).copied == len(state)
    saved = qc.save_checkpoint(model, tmp_path / "fused.pt")
    for source in (model, saved):
        assert_same_state(dict(qc.to_float(source)), state)
    again = fuse_modules_qat(arch.make(), arch.fusions(arch.make()))
    qc.load_checkpoint(again, saved)
    assert_same_state(again, model)


class Named(nn.Module):
    """A part, or a buffer, is called like what a framework or a wrapper makes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.fc, self.name = nn.Linear(4, 4), name
        if name == "qzeros":
            self.register_buffer(name, torch.arange(4))
        else:
            self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        own = getattr(self, self.name)
        return self.fc(x + own if isinstance(own, Tensor) else own(x))


@pytest.mark.parametrize("name", ["activation_post_process", "weight_fake_quant", "qzeros", "_orig_mod"])
def test_what_is_called_like_a_part_of_a_framework_is_the_models_own(name: str) -> None:
    model, state = Named(name).train(), Named(name).state_dict()
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    qc.load_checkpoint(model, state, calibration=[torch.randn(2, 4)])
    for source in (model, model.state_dict()):
        assert_same_state(dict(qc.to_float(source)), dict(state))


def test_a_dtype_of_like_that_cannot_hold_a_value_is_refused() -> None:
    """The same rule as on the way there: a value is never turned into infinity."""
    model = calibrated("eager-x86", "plain")
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e30
    like = {key: v.half() if v.is_floating_point() else v for key, v in ARCHS["plain"].make().state_dict().items()}
    with pytest.raises(qc.PlanError, match="overflow"):
        dict(qc.to_float(model, like=like).items())


@pytest.mark.parametrize(
    "like", [{"other.weight": torch.ones(1)}, ["other.weight"], nn.Linear(3, 2)], ids=["dict", "keys", "model"]
)
def test_a_layout_that_does_not_fit_is_refused(like: Any) -> None:
    with pytest.raises(qc.PlanError, match=r"other\.weight|weight"):
        qc.to_float(calibrated("eager-x86", "plain"), like=like)


@pytest.mark.parametrize("like", [5, 5.5, b"keys"], ids=str)
def test_like_that_is_none_of_them(like: Any) -> None:
    with pytest.raises(qc.CompatError):
        qc.to_float(calibrated("eager-x86", "plain"), like=like)


def test_a_prepared_model_as_like_is_refused() -> None:
    model = calibrated("eager-x86", "plain")
    with pytest.raises(qc.CompatError) as caught:
        qc.to_float(model, like=prepared("eager-x86", "plain"))
    assert str(caught.value) == (
        "like= is a prepared model\n  key:      like\n  expected: the float model\n  found:    torch_ao"
    )


def test_the_state_dict_of_a_prepared_model_as_like_is_refused() -> None:
    """Its keys are no float layout, whatever they fit."""
    model = calibrated("eager-x86", "plain")
    with pytest.raises(qc.CompatError):
        qc.to_float(model, like=prepared("eager-x86", "plain").state_dict())


def test_names_that_cannot_be_known_ask_for_like() -> None:
    state = dict(calibrated("eager-x86", "unordered").state_dict())
    with pytest.raises(qc.PlanError) as caught:
        qc.to_float(state)
    text = str(caught.value)
    assert text.startswith("the float names cannot be known from the source alone")
    assert text.count("pass like= (the float model, its state_dict, a path or its keys)") == 2
    assert "first" in text
    assert "second" in text
    back = qc.to_float(state, like=ARCHS["unordered"].make())
    assert_same_state(dict(back.items()), dict(ARCHS["unordered"].make(1).state_dict()))


@pytest.mark.parametrize("name", ["plain", "tied", "transformer", "constants"])
def test_a_float_module_is_its_own_float_form(name: str) -> None:
    model = ARCHS[name].make()
    with untouched(model):
        back = qc.to_float(model)
        assert list(back) == list(model.state_dict())
        assert_same_state(dict(back.items()), dict(model.state_dict()))
        quantized = qc.to_float(model, weights="quantized")
        assert_same_state(dict(quantized.items()), dict(model.state_dict()))


# --- weights="quantized" ----------------------------------------------------------------------------------------------


def _own_fake_quant(model: nn.Module) -> dict[str, Tensor]:
    """A fused module quantizes `w * f` with `f = gamma / sqrt(running_var + eps)`: its weight is `fq(w * f) / f`."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if hasattr(module, "weight_fake_quant"):
            quantizer = copy.deepcopy(module.weight_fake_quant)
            quantizer.observer_enabled.fill_(0)
            quantizer.fake_quant_enabled.fill_(1)
            weight, factor = module.weight.detach(), torch.ones(1)
            if hasattr(module, "bn"):
                factor = (module.bn.weight / torch.sqrt(module.bn.running_var + module.bn.eps)).detach()
                factor = factor.reshape(-1, *[1] * (weight.dim() - 1))
            found[f"{path}.weight"] = quantizer(weight * factor).detach() / factor
    return found


@pytest.mark.parametrize("flow", ["eager-x86", "eager-qnnpack", "eager-minmax-per-tensor", "fx-x86"])
@pytest.mark.parametrize("name", ["plain", "residual"])
@pytest.mark.parametrize("when", ["in use", "just calibrated"])
def test_quantized_weights_are_the_modules_own_fake_quant_unscaled(flow: str, name: str, when: str) -> None:
    """torch's fused fake-quantizer writes another scale in its first forward than `calculate_qparams` gives."""
    model = calibrated(flow, name)
    if when == "in use":
        model.eval()(ARCHS[name].batches()[0])
    before = copy.deepcopy(model.state_dict())
    back = qc.to_float(model, weights="quantized", like=ARCHS[name].make())
    assert_same_state(model.state_dict(), before)
    expected = _own_fake_quant(model)
    assert len(expected) >= 3
    for key, value in expected.items():
        torch.testing.assert_close(back[key], value, rtol=1e-6, atol=1e-7)
        assert not torch.equal(back[key], model.state_dict()[key]), key


@pytest.mark.parametrize("flow", ["torchao-static", "torchao-learned", "torchao-int8-int4", "torchao-intx"])
def test_quantized_weights_of_torchao(flow: str) -> None:
    model = calibrated(flow, "transformer")
    with untouched(model):
        back = dict(qc.to_float(model, weights="quantized").items())
    for path, module in copy.deepcopy(model).named_modules():
        if hasattr(module, "weight_fake_quantizer"):
            expected = module.weight_fake_quantizer(module.weight).detach()
            assert torch.equal(back[f"{path}.weight"], expected), path
            assert len(expected[0, :8].unique()) <= 16


def test_switches_do_not_change_what_quantized_means() -> None:
    """Fake-quant may be off for the first epochs; the weights that the quantizer makes are the same."""
    for flow, name in (("eager-x86", "plain"), ("torchao-static", "transformer")):
        model = calibrated(flow, name)
        on = dict(qc.to_float(model, weights="quantized", like=ARCHS[name].make()).items())
        for module in model.modules():
            if hasattr(module, "fake_quant_enabled"):
                module.fake_quant_enabled.fill_(0)
            elif hasattr(module, "weight_fake_quantizer"):
                module.weight_fake_quantizer.enabled = False
        off = dict(qc.to_float(model, weights="quantized", like=ARCHS[name].make()).items())
        assert_same_state(off, on)


def test_quantized_weights_equal_those_of_pt2e() -> None:
    expected = qc.to_float(
        calibrated("eager-x86", "transformer"), weights="quantized", like=ARCHS["transformer"].make()
    )
    back = qc.to_float(calibrated("pt2e-x86", "transformer"), weights="quantized", like=ARCHS["transformer"].make())
    for key in ("attn.qkv.weight", "mlp.0.weight"):
        assert len(back[key][0].unique()) <= 256
        torch.testing.assert_close(back[key], expected[key], rtol=0, atol=float(expected[key].abs().max()) / 100)


@pytest.mark.parametrize(("flow", "name"), [("eager-x86", "plain"), ("torchao-learned", "transformer")])
def test_a_quantizer_that_has_seen_nothing_makes_no_weights(flow: str, name: str) -> None:
    """A scale that is still at its default would round every weight to nought."""
    with pytest.raises(qc.CompatError):
        dict(qc.to_float(prepared(flow, name), weights="quantized", like=ARCHS[name].make()).items())


def test_quantized_weights_need_the_model(tmp_path: Path) -> None:
    state = calibrated("eager-x86", "plain").state_dict()
    with pytest.raises(qc.CompatError, match="does not hold its bit width") as caught:
        qc.to_float(state, weights="quantized", like=ARCHS["plain"].make())
    assert caught.value.remedy == "load the file into the prepared model, and pass the model"
    with pytest.raises(qc.CompatError, match="unknown option"):
        qc.to_float(state, weights="int8", like=ARCHS["plain"].make())  # type: ignore[arg-type]


class Tied(nn.Module):
    """An embedding and a head, of one tensor where `tie` is set."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.head = nn.Linear(64, 20, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_one_tensor_of_like_has_one_value(tmp_path: Path) -> None:
    model = Tied()
    untied = {key: value.clone() for key, value in model.state_dict().items()}
    untied["head.weight"] = untied["head.weight"] + 1
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4))  # the head only, as torchao does by itself
    torch.save(model.state_dict(), tmp_path / "int4.pt")
    origins = {"as it is held": untied, "IntxUnpackedToInt8Tensor dequantized": tmp_path / "int4.pt"}
    for origin, source in origins.items():
        with pytest.raises(qc.PlanError) as caught:
            qc.to_float(source, like=Tied())
        (problem,) = caught.value.problems
        assert (problem.kind.value, problem.key) == ("mismatched", "head.weight")
        start = "embed.weight and head.weight are one tensor in like=, so one value is expected; the source has two: "
        assert problem.detail.startswith(start) and problem.detail.endswith(origin)
        assert "tie_word_embeddings=False" in problem.remedy
        for like in (None, Tied(tie=False), list(untied)):
            assert not torch.equal(*qc.to_float(source, like=like).values())


def test_equal_values_are_one_tensor_of_like() -> None:
    model = Tied()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int8), filter_fn=lambda m, _: hasattr(m, "weight"))
    copies = {key: value.clone() for key, value in Tied().state_dict().items()}
    for source in (model, copies):
        back = qc.to_float(source, like=Tied())
        assert torch.equal(back["embed.weight"], back["head.weight"])
        assert torch.equal(back["embed.weight"], qc.to_float(source)["embed.weight"])


def test_quantizers_make_a_second_value_of_a_tied_tensor() -> None:
    model = Tied()
    quantize_(model, QATConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4), step="prepare"))
    assert torch.equal(*qc.to_float(model, like=Tied()).values())
    with pytest.raises(qc.PlanError, match="the source has two"):
        qc.to_float(model, like=Tied(), weights="quantized")


def test_reading_back_is_lazy_and_leaves_the_model_untouched() -> None:
    model = calibrated("fx-x86", "plain")
    with untouched(model):
        back = qc.to_float(model)
        assert back.spec("conv1.weight").shape == (6, 3, 3, 3)
        assert (back.framework, back.stage) == ("plain", "float")
        values: dict[str, Tensor] = dict(back.items())
    assert not any(value.requires_grad for value in values.values())
    assert json.dumps(dict(back.metadata)) == "{}"


@pytest.mark.parametrize("wrapper", ["compile", "DataParallel", "AveragedModel", "both"])
def test_a_running_wrapper_is_not_part_of_the_names(wrapper: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    wrap: dict[str, Any] = {
        "compile": torch.compile,
        "DataParallel": nn.DataParallel,
        "AveragedModel": torch.optim.swa_utils.AveragedModel,
        "both": lambda inner: nn.DataParallel(torch.compile(inner)),
    }
    back = qc.to_float(wrap[wrapper](model))
    assert list(back) == list(model.state_dict())
    nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).load_state_dict(back, strict=True)
