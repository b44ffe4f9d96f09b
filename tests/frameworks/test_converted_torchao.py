"""Tensor subclasses back to float: from memory, pickles and safetensors, as torchao itself dequantizes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization as ao
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.prototype.quantization.quant_api import Float8StaticActivationFloat8WeightConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor
from torchao.quantization.qat import QATConfig
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import Int4WeightFakeQuantizer
from torchao.quantization.quant_primitives import (
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
)

import qat_compat as qc
from qat_compat.source import open_any
from qat_compat.testing import assert_same_state

BF16 = torch.bfloat16


def quantized(config: Any, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32, bias=False)).to(dtype)
        ao.quantize_(net, config)
        return net

    return make


def trained(config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
        ao.quantize_(net, QATConfig(config, step="prepare"))
        net(torch.randn(2, 64)).sum().backward()
        ao.quantize_(net, QATConfig(config, step="convert"))
        return net

    return make


def holding(make: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    """A model with a weight that torchao makes anywhere, though its workflow asks for a GPU."""

    def make_model() -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 32)).to(dtype)
        net[0].weight = nn.Parameter(make(net[0].weight.detach()), requires_grad=False)
        return net

    return make_model


INT4 = {"weight_dtype": torch.int4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "int8 rows": quantized(ao.Int8WeightOnlyConfig()),
    "int8 tensor": quantized(ao.Int8WeightOnlyConfig(granularity=PerTensor())),
    "int8 groups": quantized(ao.Int8WeightOnlyConfig(granularity=PerGroup(32)), BF16),
    "int8 dynamic": quantized(ao.Int8DynamicActivationInt8WeightConfig()),
    "int8 static": quantized(ao.Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.full((1, 1), 0.1))),
    "intx groups": quantized(ao.IntxWeightOnlyConfig(granularity=PerGroup(32), **INT4)),
    "intx asymmetric": quantized(
        ao.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerAxis(0), mapping_type=ao.MappingType.ASYMMETRIC)
    ),
    "trained intx dynamic": trained(ao.Int8DynamicActivationIntxWeightConfig(weight_granularity=PerGroup(32), **INT4)),
    "trained intx": trained(ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))),
    "float8": quantized(ao.Float8WeightOnlyConfig()),
    "float8 static": quantized(Float8StaticActivationFloat8WeightConfig(act_quant_scale=torch.ones(1, 1)), BF16),
    "nvfp4": quantized(NVFP4WeightOnlyConfig(), BF16),
    "nvfp4 blocks": holding(lambda w: NVFP4Tensor.to_nvfp4(w, is_swizzled_scales=True)),
    "mxfp8": holding(lambda w: MXTensor.to_mx(w, torch.float8_e4m3fn, 32), BF16),
    "mxfp4": holding(lambda w: MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def expected_of(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = model.state_dict()
    return {key: value.dequantize() if hasattr(value, "tensor_data_names") else value for key, value in state.items()}


def forms(model: nn.Module, folder: Path) -> dict[str, Any]:
    state = {key: value.detach() for key, value in model.state_dict().items()}
    torch.save(state, folder / "plain.pt")
    qc.save_checkpoint(model, folder / "own.pt")
    qc.save_checkpoint(model, folder / "own.safetensors")
    found = {"module": model, "state_dict": state}
    found |= {name: folder / name for name in ("plain.pt", "own.pt", "own.safetensors")}
    kinds = {type(value).__name__ for value in state.values()} - {"Tensor"}
    if kinds <= set(ALLOWED_TENSORS_SUBCLASSES):
        tensors, about = flatten_tensor_state_dict(state)
        save_file(tensors, folder / "torchao.safetensors", metadata=about)
        found["torchao.safetensors"] = folder / "torchao.safetensors"
    return found


def test_every_form_gives_what_torchao_dequantizes(model: nn.Module, tmp_path: Path) -> None:
    expected = expected_of(model)
    assert hasattr(type(model[0].weight), "tensor_data_names")
    for form, source in forms(model, tmp_path).items():
        back = qc.to_float(source)
        assert set(back) == set(expected), form
        assert (back.stage, back.notes) == ("float", ()), form
        for key, value in expected.items():
            assert back.spec(key) == (tuple(value.shape), value.dtype), (form, key)
            assert torch.equal(back[key], value), (form, key)


def test_a_float_model_takes_what_comes_back(model: nn.Module) -> None:
    linears = [m for m in model if isinstance(m, nn.Linear)]
    layers = [nn.Linear(m.in_features, m.out_features, m.bias is not None) for m in linears]
    target = nn.Sequential(layers[0], nn.ReLU(), *layers[1:]).to(model[0].weight.dtype)
    with pytest.raises(qc.PlanError, match=r"converted \(integer\) checkpoint"):
        qc.load_checkpoint(target, model)
    report = qc.load_checkpoint(target, qc.to_float(model))
    assert report.copied == len(target.state_dict())
    assert torch.equal(target[0].weight, model[0].weight.dequantize())


def test_packed_for_the_cpu(tmp_path: Path) -> None:
    """It has no dequantize; the grid that torchao quantizes to before it packs does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    weight, block = net[0].weight.detach().clone(), (1, 32)
    scale, zero = _choose_qparams_affine_tinygemm(
        weight, ao.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, BF16
    )
    values = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    expected = _dequantize_affine_tinygemm(values, block, scale, zero, torch.int32, 0, 15, output_dtype=BF16)
    ao.quantize_(net, PrototypeInt4WeightOnlyConfig(group_size=32))
    for source in forms(net, tmp_path).values():
        found = qc.to_float(source)["0.weight"]
        assert (found.dtype, found.shape) == (BF16, weight.shape)
        # the kernel rounds `q - 8`, times scale, plus zero in another order than the reference does: half an ulp each
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))
        assert torch.equal(found, torch.nn.functional.linear(torch.eye(64).bfloat16(), net[0].weight).t())


def test_packed_for_mslk_is_the_grid_that_training_saw() -> None:
    """The kernels are for GPUs; the fake-quantizer that torchao trains for them with is the oracle."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    grid = Int4WeightFakeQuantizer(Int4WeightFakeQuantizeConfig(32, BF16))(weight)
    groups = weight.unflatten(1, (2, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    values = ((groups - low) / scale).round().clamp(0, 15).flatten(1).to(torch.int8) - 8
    packed = (values[:, ::2] & 0xF) | (values[:, 1::2] << 4)
    scales, zeros = scale.squeeze(-1).t().contiguous(), (low + scale * 8).squeeze(-1).t().contiguous()
    tensor = ao.Int4Tensor(packed.view(torch.uint8), scales, zeros, [1, 32], weight.shape)
    assert torch.equal(qc.to_float({"fc.weight": tensor})["fc.weight"], grid)


def test_a_scale_of_the_input_goes_into_the_weight() -> None:
    torch.manual_seed(0)
    net = MODELS["int8 rows"]()
    pre = torch.rand(64) + 0.5
    old = net[0].weight
    net[0].weight = nn.Parameter(
        ao.Int8Tensor(old.qdata, old.scale, old.block_size, old.dtype, old.zero_point, act_pre_scale=pre),
        requires_grad=False,
    )
    batch, target = torch.randn(3, 64), nn.Linear(64, 32)
    target.load_state_dict({"weight": qc.to_float(net)["0.weight"], "bias": net[0].bias})
    torch.testing.assert_close(target(batch), net[0](batch))


def test_scales_of_activations_have_their_own_site() -> None:
    schema = open_any(MODELS["int8 static"]()).schema
    entry = schema["0._weight_act_quant_scale"]
    assert (entry.site, entry.role.value) == ("input:0", "scale")
    schema = open_any(MODELS["float8 static"]()).schema
    assert schema["0._weight_act_quant_scale"].site == "input:0"


def test_what_cannot_be_computed_is_named(tmp_path: Path) -> None:
    tiles = ao.Int4TilePackedTo4dTensor(
        torch.zeros(4, 1, 32, 4, dtype=torch.int32), torch.zeros(2, 32, 2, dtype=BF16), [1, 32], torch.Size([32, 64])
    )
    int8 = MODELS["int8 rows"]()[0].weight.detach()
    state = {"a.weight": tiles, "b.weight": int8, "c.weight": tiles}
    with pytest.raises(qc.PlanError) as caught:
        qc.to_float(state)
    assert [problem.key for problem in caught.value.problems] == ["a.weight", "c.weight"]
    assert "Int4TilePackedTo4dTensor of torchao, which only the kernel" in caught.value.problems[0].detail
    tensors, about = flatten_tensor_state_dict({"b.weight": int8})
    del tensors["b._weight_scale"]
    save_file(tensors, tmp_path / "cut.safetensors", metadata=about)
    with pytest.raises(qc.PlanError, match=r"a Int8Tensor of torchao without its tensor b\._weight_scale"):
        qc.to_float(tmp_path / "cut.safetensors")
    tensors["b._weight_scale"] = torch.ones(5, 1)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata=about)
    with pytest.raises(qc.CheckpointError, match="do not fit together"):
        qc.to_float(tmp_path / "wrong.safetensors")["b.weight"]


@pytest.mark.parametrize("name", ["int8 rows", "intx asymmetric", "trained intx dynamic"])
def test_torch_itself_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    path = qc.save_checkpoint(model, tmp_path / "int.pt")
    state = torch.load(path, weights_only=True)
    assert type(state["0.weight"]) is type(model[0].weight.detach())
    fresh = MODELS[name]()
    fresh.load_state_dict(state, strict=True)
    batch = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(fresh(batch), model(batch))
    assert_same_state(dict(qc.to_float(path)), dict(qc.to_float(model)))


SOUND = {"block_size": [1, 8], "dtype": {"_type": "torch.dtype", "_data": "float32"}}
MALFORMED = {
    "no scale": (SOUND, ["qdata"]),
    "a number of blocks": ({**SOUND, "block_size": 5}, ["qdata", "scale"]),
    "blocks of one dimension": ({**SOUND, "block_size": [1]}, ["qdata", "scale"]),
    "a block of no size": ({**SOUND, "block_size": [1, None]}, ["qdata", "scale"]),
    "a shape of lists": ({**SOUND, "shape": [[4], 8]}, ["qdata", "scale"]),
    "a negative shape": ({**SOUND, "shape": [4, -8]}, ["qdata", "scale"]),
    "a granularity": ({**SOUND, "act_quant_kwargs": {"granularity": 1}}, ["qdata", "scale"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_a_file_says_of_a_weight_is_not_taken_for_granted(name: str, tmp_path: Path) -> None:
    about, parts = MALFORMED[name]
    held = {"qdata": torch.ones(4, 8, dtype=torch.int8), "scale": torch.ones(4, 1)}
    told = {"_type": "Int8Tensor", "_data": about, "_tensor_data_names": parts}
    header = {"tensor_names": '["fc.weight"]', "fc.weight": json.dumps(told)}
    save_file({f"fc._weight_{part}": held[part] for part in parts}, tmp_path / "f.safetensors", metadata=header)
    for call in (qc.open_checkpoint, qc.to_float):
        with pytest.raises(qc.CheckpointError, match="malformed") as error:
            call(tmp_path / "f.safetensors")
        assert (error.value.key, error.value.file) == ("fc.weight", str(tmp_path / "f.safetensors"))


def test_a_weight_of_another_shape_than_it_is_said_to_have() -> None:
    tensors = {"qdata": "fc._weight_qdata", "scale": "fc._weight_scale"}
    about = {"class": "Int8Tensor", "tensors": tensors, "block_size": [1, 8], "dtype": "float32", "shape": [4, 9]}
    state = {"fc._weight_qdata": torch.ones(4, 8, dtype=torch.int8), "fc._weight_scale": torch.ones(4, 1)}
    checkpoint = qc.open_checkpoint(state)
    checkpoint.attributes = {"fc.weight": about}
    with pytest.raises(qc.CheckpointError, match="do not fit together") as error:
        qc.to_float(checkpoint)["fc.weight"]
    assert (error.value.key, error.value.found) == ("fc.weight", "ValueError: it computes to [4, 8] and not to [4, 9]")


def test_an_object_that_has_no_form_in_a_file_is_refused(tmp_path: Path) -> None:
    model = MODELS["int8 rows"]()
    path = qc.save_checkpoint(model, tmp_path / "int.pt")
    before = path.read_bytes()
    model[0].weight.act_quant_kwargs = lambda: None
    with pytest.raises(qc.SaveError, match="could not be written"):
        qc.save_checkpoint(model, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
