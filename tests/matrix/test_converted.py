"""Integers back to float: the float model then computes what the converted one does, but for activation rounding.

The oracle is the native flow itself. Its prepared model, with its weight quantizers on and every other quantizer off,
is what the converted model is but for the rounding of activations.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import prepare_for
from torch import nn
from torch.ao.nn import qat as nnqat
from torch.ao.nn import quantized as nnq
from torch.ao.quantization.quantization_mappings import get_default_static_quant_module_mappings
from torch.ao.quantization.quantize_fx import convert_fx
from zoo import ARCHS

import qat_compat as qc
from qat_compat.frameworks import Needs
from qat_compat.source import open_any
from qat_compat.testing import assert_same_state, native_calibration

NETS = ["plain", "unordered", "crossed", "residual", "depthwise", "transposed", "conv1d", "conv3d", "linear_bn", "unet"]
CELLS = [
    *(("eager-x86", n) for n in ["plain", "crossed", "residual", "depthwise", "linear_bn", "stubs", "sequential"]),
    *(("fx-x86", n) for n in [*NETS, "functional", "transformer"] if n != "transposed"),
    *(("pt2e-x86", name) for name in [*NETS, "functional", "transformer"]),
]
FORMS = ["module", "state_dict", "pt", "saved"]


def trained(flow: str, name: str) -> nn.Module:
    """Prepared, and calibrated on what it then is asked for."""
    model = prepare_for(flow, name)(ARCHS[name].make(1))
    native_calibration(model, ARCHS[name].batches(4))
    return model


def converted(flow: str, model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if flow.startswith("eager"):
            return torch.ao.quantization.convert(copy.deepcopy(model).eval())
        if flow.startswith("fx"):
            return convert_fx(copy.deepcopy(model).eval())
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        model = copy.deepcopy(model)
        move_exported_model_to_eval(model)
        return convert_pt2e(model)


def rounded_weights(model: nn.Module) -> nn.Module:
    """The prepared model with its weights rounded as `convert` rounds them, and nothing else."""
    model = copy.deepcopy(model)
    for quantizer in open_any(model).description.quantizers:
        quantizer.disable()
        if quantizer.needs is Needs.WEIGHTS:
            quantizer.module.forward = partial(rounded, quantizer.module)
    return model


def rounded(quantizer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The fused module's own forward is on a slightly other grid than `calculate_qparams`, which `convert` asks."""
    scale, zero_point = quantizer.calculate_qparams()
    low, high = quantizer.activation_post_process.quant_min, quantizer.activation_post_process.quant_max
    zero_point = zero_point.to(torch.int32)
    if len(scale) == 1:
        return torch.fake_quantize_per_tensor_affine(weight, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, quantizer.ch_axis, low, high)


def run(flow: str, model: nn.Module, batch: Any) -> torch.Tensor:
    if flow.startswith("pt2e") and isinstance(model, torch.fx.GraphModule):
        from torchao.quantization.pt2e import move_exported_model_to_eval

        move_exported_model_to_eval(model)
    else:
        model.eval()
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, torch.Tensor) else next(iter(out.values()))


def in_form(form: str, model: nn.Module, folder: Path) -> Any:
    if form == "module":
        return model
    if form == "state_dict":
        return model.state_dict()
    path = folder / "int8.pt"
    if form == "pt":
        torch.save(model.state_dict(), path)
    else:
        qc.save_checkpoint(model, path)
    return path


@pytest.mark.parametrize(("flow", "name"), CELLS)
def test_the_float_model_computes_what_the_converted_one_does(flow: str, name: str, tmp_path: Path) -> None:
    arch = ARCHS[name]
    model = trained(flow, name)
    integers = converted(flow, model)
    batch = arch.batches(1, seed=7)[0]
    expected = run(flow, rounded_weights(model), batch)
    first: dict[str, torch.Tensor] = {}
    for form in FORMS:
        back = qc.to_float(in_form(form, integers, tmp_path), like=arch.make(3))
        target = arch.make(2)
        assert list(back) == list(target.state_dict())
        target.load_state_dict(dict(back), strict=True)
        found = run(flow, target, batch)
        # the flow and `convert` multiply a normalization into a weight in another order: a few integers differ by one
        assert float((found - expected).abs().max()) <= 0.01 * float(expected.abs().max())
        first = first or dict(back)
        assert_same_state(dict(back), first)
    target = arch.make(2)
    target.load_state_dict(first)
    if flow.startswith("pt2e"):
        torch.testing.assert_close(run("float", target, batch), run("float", without_activations(integers), batch))
    else:
        assert_weights_of(integers, first)


def without_activations(model: nn.Module) -> nn.Module:
    """A converted graph that rounds weights only."""
    assert isinstance(model, torch.fx.GraphModule)
    model = copy.deepcopy(model)
    for node in list(model.graph.nodes):
        if "quantize_per_tensor" in str(node.target) and "_frozen_param" not in str(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.recompile()
    model.eval = lambda: model  # an exported graph refuses it, and has nothing to switch
    return model


def assert_weights_of(integers: nn.Module, floats: dict[str, torch.Tensor]) -> None:
    """Every integer module's own `weight()` and `bias()` is in the float state; a folded bias may be the norm's."""
    modules = [(n, m) for n, m in integers.named_modules() if callable(getattr(m, "weight", None))]
    assert modules
    for path, module in modules:
        assert torch.equal(floats[f"{path}.weight"], module.weight().dequantize())
        bias = module.bias()
        assert bias is None or any(torch.equal(bias, value) for value in floats.values())


@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86", "pt2e-x86"])
def test_torch_itself_loads_what_is_saved(flow: str, tmp_path: Path) -> None:
    """Packed parameters are in the file as torch packs them."""
    first, second = (converted(flow, trained(flow, "plain")) for _ in range(2))
    for tensor in second.state_dict().values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.data.zero_()
    path = qc.save_checkpoint(first, tmp_path / "int8.pt")
    torch.save(first.state_dict(), tmp_path / "native.pt")
    second.load_state_dict(torch.load(path, weights_only=True), strict=True)
    for source in (second, path):
        assert_same_state(dict(qc.open_checkpoint(source)), dict(qc.open_checkpoint(tmp_path / "native.pt")))


@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86", "pt2e-x86"])
def test_without_a_layout_the_folded_names_are_kept_and_said(flow: str, tmp_path: Path) -> None:
    back = qc.to_float(converted(flow, trained(flow, "plain")))
    assert list(back) == [f"{name}.{leaf}" for name in ("conv1", "conv2", "fc") for leaf in ("weight", "bias")]
    assert back.stage == "folded" and "folded into convolutions" in " ".join(back.notes)
    with_norms = qc.to_float(back, like=ARCHS["plain"].make())
    assert with_norms.stage == "float"
    assert_same_state(
        dict(qc.to_float(converted(flow, trained(flow, "plain")), like=ARCHS["plain"].make())), with_norms
    )
    path = qc.save_checkpoint(back, tmp_path / "folded.safetensors")
    assert qc.open_checkpoint(path).stage == "folded"
    model = prepare_for("eager-x86", "plain")(ARCHS["plain"].make(5))
    report = qc.load_checkpoint(model, path, calibration=ARCHS["plain"].batches())
    assert report.derived == 10
    assert_same_state(dict(qc.to_float(model)), with_norms)


def test_a_file_of_an_exported_model_does_not_tell_what_is_folded(tmp_path: Path) -> None:
    torch.save(converted("pt2e-x86", trained("pt2e-x86", "plain")).state_dict(), tmp_path / "int8.pt")
    with pytest.raises(qc.PlanError, match="it may be folded into a convolution and out of use") as error:
        qc.to_float(tmp_path / "int8.pt")
    assert "like= of to_float" in error.value.problems[0].remedy


@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86", "pt2e-x86"])
def test_integers_are_never_taken_for_float_unasked(flow: str) -> None:
    integers = converted(flow, trained(flow, "plain"))
    for target in (ARCHS["plain"].make(), prepare_for("eager-x86", "plain")(ARCHS["plain"].make())):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(qc.PlanError) as error:
            qc.load_checkpoint(target, integers, calibration=ARCHS["plain"].batches())
        (problem,) = error.value.problems
        assert problem.detail.startswith("the source is a converted (integer) checkpoint")
        assert "to_float(source) to dequantize it" in problem.remedy
        assert_same_state(target, before)


def test_a_quantized_embedding_comes_back() -> None:
    model = prepare_for("eager-embedding", "embedding")(ARCHS["embedding"].make(1))
    native_calibration(model, ARCHS["embedding"].batches())
    mapping = {
        **get_default_static_quant_module_mappings(),
        nnqat.Embedding: nnq.Embedding,
        nnqat.EmbeddingBag: nnq.EmbeddingBag,
    }
    integers = torch.ao.quantization.convert(model.eval(), mapping=mapping)
    back = qc.to_float(integers)
    for path, module in integers.named_modules():
        if hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)):
            assert torch.equal(back[f"{path}.weight"], module.weight().dequantize())
    assert set(back) == set(ARCHS["embedding"].state())
    assert back.stage == "float"
    partly = torch.ao.quantization.convert(copy.deepcopy(model).eval())  # its own mapping passes embeddings by
    assert set(qc.to_float(partly)) == set(ARCHS["embedding"].state())


def test_a_recurrent_layer_says_that_it_cannot_be_read_back() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 3)), {nn.LSTM}, dtype=torch.qint8)
    with pytest.raises(qc.CompatError, match=r"_all_weight_values"):
        qc.to_float(model)
