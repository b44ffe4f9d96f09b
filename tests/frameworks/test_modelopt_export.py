"""What ModelOpt exports for inference, to float: against its own `dequantize`, and the model that it exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import from_quantized_weight, pack_int4_in_uint8
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qat_compat as qc

# config of ModelOpt -> its algorithm, in the words of the exported folder
CONFIGS = {
    "FP8_DEFAULT_CFG": "FP8",
    "NVFP4_DEFAULT_CFG": "NVFP4",
    "INT4_AWQ_CFG": "W4A16_AWQ",
    "INT8_SMOOTHQUANT_CFG": "W8A8_SQ_PER_CHANNEL",
}
F32 = torch.float32


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config).eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def exported(config: str, folder: Path) -> None:
    """What ModelOpt makes of `llama()`, as a folder."""
    model = llama()
    model = mtq.quantize(model, copy.deepcopy(getattr(mtq, config)), lambda m: [m(tokens(seed)) for seed in range(3)])
    export_hf_checkpoint(model, dtype=F32, export_dir=folder)


def dequantized(state: dict[str, Tensor], key: str, config: str) -> Tensor:
    """By the package's own functions."""
    weight, scale = state[key], state[f"{key}_scale"]
    if config.startswith("NVFP4"):
        packed = NVFP4QTensor(torch.Size((weight.shape[0], weight.shape[1] * 2)), F32, weight)
        second: Any = state[f"{key}_scale_2"]
        return packed.dequantize(dtype=F32, scale=scale, double_scale=second, block_sizes={-1: 16})
    form = "fp8" if config.startswith("FP8") else "int8_sq"
    return from_quantized_weight(weight, scale, form, F32)


@pytest.mark.parametrize("config", CONFIGS)
def test_export(config: str, tmp_path: Path) -> None:
    exported(config, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    opened = qc.open_checkpoint(tmp_path)
    assert (opened.framework, opened.stage) == ("modelopt", "converted")
    assert opened.metadata["quantization_config"]["quant_algo"] == CONFIGS[config]
    float_model = llama(seed=1)
    back = qc.to_float(tmp_path, like=float_model)
    assert list(back) == list(float_model.state_dict())
    quantized = [key for key in state if f"{key}_scale" in state]
    assert len(quantized) == 7
    for key in quantized:
        smoothing = state.get(key.replace("weight", "pre_quant_scale"))
        plain = back[key] if smoothing is None else back[key] / smoothing.float()
        if config == "INT4_AWQ_CFG":
            scale = state[f"{key}_scale"]
            block = back[key].shape[1] // scale.shape[1]
            assert torch.equal(pack_int4_in_uint8(plain, scale, block), state[key]), key
        elif smoothing is None:
            assert torch.equal(back[key], dequantized(state, key, config)), key
        else:
            assert torch.equal(back[key], dequantized(state, key, config) * smoothing.float()), key
    # it computes what the model did before its weights were rounded, but for that
    float_model.load_state_dict(dict(back), strict=True)
    with torch.no_grad():
        expected, found = llama()(tokens(9)).logits, float_model(tokens(9)).logits
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < (0.25 if "4" in config else 0.06), error
    bare = qc.to_float(state, like=llama(seed=1))  # without its config.json
    assert all(torch.equal(bare[key], back[key]) for key in back)


def test_what_is_not_known_is_said() -> None:
    weight, scale = torch.zeros(6, 32, dtype=torch.uint8), torch.ones(6, 4)
    state = {
        "a.weight": weight, "a.weight_scale": scale, "a.weight_scale_2": torch.ones(()),
        "b.weight": torch.zeros(2, 6, 32, dtype=torch.int8), "b.weight_scale": torch.ones(2, 6),
        "c.weight": weight,
        "d.weight": torch.zeros(6, 32, dtype=torch.int8), "d.weight_scale": torch.ones(6),
        "d.pre_quant_scale": torch.ones(31),
    }  # fmt: skip
    with pytest.raises(qc.PlanError) as caught:
        qc.to_float(state)
    details = {problem.key: problem.detail for problem in caught.value.problems}
    assert set(details) == {"a.weight", "b.weight", "c.weight", "d.weight"}
    assert "no format that is known" in details["a.weight"] and "no format that is known" in details["b.weight"]
    assert "there is no c.weight_scale" in details["c.weight"]
    assert "not one number for each input" in details["d.weight"]


def test_float_models_with_such_names_stay_float() -> None:
    state = {"attn.k_scale": torch.ones(1), "attn.pre_quant_scale": torch.ones(4), "fc.weight": torch.ones(4, 4)}
    assert (opened := qc.open_checkpoint(state)).framework == "plain" and opened.stage == "float"
