"""compressed-tensors' own folders back to float: bit for bit what its own library decompresses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor, nn

import qat_compat as qc
from qat_compat import packing

BF16 = torch.bfloat16
INT8_INPUT = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8_INPUT = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def ints(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "channel", **more}


def floats(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": "tensor", **more}


GROUP = {"strategy": "group", "group_size": 32}
# name -> weights, input activations, dtype of the model
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, torch.dtype]] = {
    "W8A8": (ints(8), INT8_INPUT, torch.float32),
    "W8A8 bf16": (ints(8), INT8_INPUT, BF16),
    "W8A8 tensor": (ints(8, strategy="tensor"), INT8_INPUT, torch.float32),
    "W8A8 asymmetric": (ints(8, symmetric=False), INT8_INPUT, torch.float32),
    "W4A16 groups": (ints(4, **GROUP), None, torch.float32),
    "W4A16 groups bf16": (ints(4, **GROUP), None, BF16),
    "W4A16 channels": (ints(4), None, torch.float32),
    "W4A16 asymmetric groups": (ints(4, symmetric=False, **GROUP), None, torch.float32),
    "W4A16 asymmetric channels": (ints(4, symmetric=False), None, torch.float32),
    "W3A16 groups": (ints(3, **GROUP), None, torch.float32),
    "W8A16 groups": (ints(8, **GROUP), None, torch.float32),
    "FP8 tensor": (floats(8), FP8_INPUT, BF16),
    "FP8 channels": (floats(8, strategy="channel"), FP8_INPUT, torch.float32),
    "FP8 blocks": (floats(8, strategy="block", block_structure=[16, 32]), FP8_INPUT, torch.float32),
    "NVFP4": (floats(4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"), None, BF16),
    "MXFP4": (floats(4, strategy="group", group_size=32, scale_dtype="torch.uint8"), None, BF16),
    "MXFP8": (floats(8, strategy="group", group_size=32, scale_dtype="torch.uint8"), None, BF16),
}  # fmt: skip


def net(dtype: torch.dtype) -> nn.Module:
    """Rows and columns that no block and no word divides, where the scheme allows it."""
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 64), nn.Linear(96, 20, bias=False)).to(dtype)


def quantize(model: nn.Module, weights: dict[str, Any], inputs: dict[str, Any] | None) -> ModelCompressor:
    """As llm-compressor does: scales from the range of each block, then compressed."""
    args = QuantizationArgs(**weights)
    odd = ["2"] if args.group_size is not None else []
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=odd))
    for module in model:
        if hasattr(module, "quantization_scheme"):
            set_scales(module, args)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def set_scales(module: nn.Module, args: QuantizationArgs) -> None:
    weight = module.weight.detach()
    values = weight.unflatten(-1, (-1, args.group_size)) if args.group_size else weight
    keep = args.strategy in ("channel", "group", "tensor_group")
    low = values.amin(-1, keepdim=args.strategy == "channel") if keep else values.amin()
    high = values.amax(-1, keepdim=args.strategy == "channel") if keep else values.amax()
    more: dict[str, Any] = {}
    if args.strategy == "tensor_group":
        more["global_scale"] = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.data.copy_(more["global_scale"])
    scale, zero = calculate_qparams(low, high, args, **more)
    if args.strategy == "block":  # a scale of its own for each block
        scale = scale * torch.linspace(0.5, 1.5, module.weight_scale.numel()).reshape(module.weight_scale.shape)
        zero = torch.zeros_like(scale)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


def saved(model: nn.Module, compressor: ModelCompressor, folder: Path) -> Path:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    compressor.update_config(str(folder))
    return folder


def decompressed(model: nn.Module, compressor: ModelCompressor) -> dict[str, Tensor]:
    compressor.decompress_model(model)
    return {key: value for key, value in model.state_dict().items() if key.split(".")[-1] in ("weight", "bias")}


@pytest.mark.parametrize("name", SCHEMES)
def test_float_is_what_its_own_library_decompresses(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, inputs, dtype = SCHEMES[name]
    model = net(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compressor = quantize(model, weights, inputs)
    folder = saved(model, compressor, tmp_path)
    compressed = {key: value.clone() for key, value in model.state_dict().items()}
    expected = decompressed(model, compressor)
    opened = qc.open_checkpoint(folder)
    assert (opened.framework, opened.stage) == ("compressed_tensors", "converted")
    for source in (folder, *([compressed] if "block" not in weights["strategy"] else [])):
        back = qc.to_float(source)
        assert set(back) == set(before)
        assert back.stage == "float"
        for key, value in expected.items():
            assert back.spec(key) == (tuple(value.shape), value.dtype), key
            assert torch.equal(back[key], value), key
    step = 0.75 if weights["num_bits"] < 8 else 0.1
    assert all(float((expected[key] - before[key]).abs().max()) < step for key in before)
    assert not torch.equal(expected["0.weight"], before["0.weight"])


@pytest.mark.parametrize("columns", [1, 31, 64, 70])
@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_those_of_the_library(bits: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    torch.manual_seed(bits)
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, columns), dtype=torch.int8)
    words = packing.pack(values, bits)
    assert torch.equal(words, pack_to_int32(values, bits))
    assert torch.equal(packing.unpack(words, bits, columns), values)
    assert torch.equal(unpack_from_int32(words, bits, values.shape), values)
    stacked = values.expand(2, 5, columns)
    assert torch.equal(packing.unpack(packing.pack(stacked, bits), bits, columns), stacked)


@pytest.mark.parametrize("moved", [True, False])
def test_columns_in_another_order(moved: bool) -> None:
    """Its library no longer writes them; the arithmetic is the oracle."""
    torch.manual_seed(0)
    values = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scale, groups = torch.rand(6, 2), torch.randperm(64) % 2
    state = {
        "fc.weight_packed": packing.pack(values, 4),
        "fc.weight_scale": scale,
        "fc.weight_shape": torch.tensor([6, 64]),
        "fc.weight_g_idx": groups.int() if moved else torch.full((64,), -1),
    }
    columns = groups if moved else torch.arange(64) // 32
    expected = values.double() * scale.double()[:, columns]
    found = qc.to_float(state)["fc.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("named", [True, False])
def test_float8_blocks_of_transformers(named: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = (64, 32) if named else (128, 128)
    weight = torch.randn(200, 150).to(torch.float8_e4m3fn)
    counts = -(-200 // block[0]), -(-150 // block[1])
    scale = torch.rand(counts)
    save_file({"fc.weight": weight, "fc.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    config = {"quant_method": "fp8", **({"weight_block_size": list(block)} if named else {})}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    rows, columns = torch.arange(200) // block[0], torch.arange(150) // block[1]
    expected = weight.double() * scale.double()[rows][:, columns]
    torch.testing.assert_close(qc.to_float(tmp_path)["fc.weight"].double(), expected, rtol=2**-23, atol=0)
    if named:  # without the configuration nothing says how large a block is
        with pytest.raises(qc.PlanError, match="not those of blocks of 128 x 128"):
            qc.to_float({"fc.weight": weight, "fc.weight_scale_inv": scale})


def test_what_does_not_fit_is_said_for_every_layer() -> None:
    words = packing.pack(torch.zeros(6, 64, dtype=torch.int8), 4)
    state = {
        "a.weight_packed": words, "a.weight_scale": torch.ones(6, 1),
        "b.weight_packed": words, "b.weight_scale": torch.ones(6, 3), "b.weight_shape": torch.tensor([6, 64]),
        "c.weight": torch.zeros(6, 64, dtype=torch.int8),
        "d.weight_packed": words[:, :1], "d.weight_scale": torch.ones(6, 1), "d.weight_shape": torch.tensor([6, 5]),
    }  # fmt: skip
    with pytest.raises(qc.PlanError) as caught:
        qc.to_float(state)
    details = {problem.key: problem.detail for problem in caught.value.problems}
    assert "there is no a.weight_shape beside it" in details["a.weight"]
    assert "scales do not divide" in details["b.weight"]
    assert "there is no c.weight_scale beside it" in details["c.weight"]
    assert "do not tell of how many bits" in details["d.weight"]


def test_tensors_of_different_layers_are_named() -> None:
    state = {"fc.weight": torch.zeros(6, 64, dtype=torch.int8), "fc.weight_scale": torch.ones(6, 1)}
    back = qc.to_float({**state, "fc.weight_zero_point": torch.zeros(5, 1, dtype=torch.int8)})
    with pytest.raises(qc.CheckpointError, match="do not fit together") as caught:
        back["fc.weight"]
    assert caught.value.key == "fc.weight"
    assert "fc.weight_zero_point int8[5, 1]" in str(caught.value.expected)


def test_only_shapes_are_read_to_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs, dtype = SCHEMES["W4A16 groups"]
    model = net(dtype)
    folder = saved(model, quantize(model, weights, inputs), tmp_path)
    read: list[str] = []
    original = qc.Checkpoint.__getitem__
    monkeypatch.setattr(qc.Checkpoint, "__getitem__", lambda self, key: read.append(key) or original(self, key))
    back = qc.to_float(folder)
    assert read and all(key.endswith("weight_shape") for key in read)
    assert back["0.weight"].shape == (40, 64)
