"""What the keys of each framework's checkpoints are taken for: framework, stage, and site and role of each tensor.

The keys are those that the packages themselves wrote (versions in the framework files).
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import qat_compat as qc
from qat_compat.frameworks import KeyView, describe_keys
from qat_compat.schema import Schema, Spec

F32, I8, I32, U8 = torch.float32, torch.int8, torch.int32, torch.uint8
NORM = {"bn.weight": (4,), "bn.bias": (4,), "bn.running_mean": (4,), "bn.running_var": (4,)}
NET = {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,), **NORM, "fc.weight": (6, 4), "fc.bias": (6,)}


def described(keys: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] | None = None) -> Schema:
    types = dtypes or {}
    return describe_keys(KeyView({key: Spec(shape, types.get(key, F32)) for key, shape in keys.items()}))


# framework -> (key -> shape, "role site" of it); all of them stand beside the keys of NET
PREPARED: Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]] = {
    "modelopt": {
        "conv.input_quantizer._amax":                  ((), "amax input:conv"),
        "conv.weight_quantizer._amax":                 ((4, 1, 1, 1), "amax weight:conv"),
        "fc.weight_quantizer.0._amax":                 ((6, 1), "amax weight:fc"),
        "fc.weight_quantizer.1._amax":                 ((), "amax weight:fc"),
        "fc.output_quantizer._amax":                   ((), "amax output:fc"),
        "attn.q_bmm_quantizer._amax":                  ((), "amax q_bmm:attn"),
        "input_quantizer._bias_value":                 ((), "zero_point input:"),
    },
    "pytorch_quantization": {
        "conv._input_quantizer._amax":                 ((), "amax input:conv"),
        "conv._weight_quantizer._amax":                ((4, 1, 1, 1), "amax weight:conv"),
        "avgpool._input_quantizer._amax":              ((), "amax input:avgpool"),
        "fc._aftergemm_quantizer._amax":               ((), "amax aftergemm:fc"),
        "fc._input_quantizer.clip.clip_value_min":     ((), "min_val input:fc"),
        "fc._input_quantizer.clip.clip_value_max":     ((), "max_val input:fc"),
    },
    "brevitas": {
        "inp.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value":  ((), "amax output:inp"),
        "conv.input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value": ((), "amax input:conv"),
        "conv.output_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value": ((), "amax output:conv"),
        "fc.weight_quant.tensor_quant.scaling_impl.value": ((6, 1), "amax weight:fc"),
        "fc.input_quant.fused_activation_quant_proxy.tensor_quant.zero_point_impl.value": ((), "zero_point input:fc"),
        "fc.weight_quant.tensor_quant.msb_clamp_bit_width_impl.bit_width": ((), "constant weight:fc"),
    },
    "aimet": {
        "conv.param_quantizers.weight.min":            ((4, 1, 1, 1), "min_val weight:conv"),
        "conv.param_quantizers.weight.max":            ((4, 1, 1, 1), "max_val weight:conv"),
        "fc.param_quantizers.bias.max":                ((), "max_val bias:fc"),
        "fc.input_quantizers.0.min":                   ((), "min_val input:fc"),
        "add.input_quantizers.1.min":                  ((), "min_val input:add#1"),
        "relu.output_quantizers.0.max":                ((), "max_val output:relu"),
    },
    "nncf": {
        "__nncf_hooks.pre_hooks.conv/conv2d/0__1.0.scale":          ((4, 1, 1, 1), "amax weight:conv"),
        "__nncf_hooks.pre_hooks.conv/conv2d/0__1.0.enabled":        ((1,), "enabled weight:conv"),
        "__nncf_hooks.pre_hooks.block:fc/linear/0__1.0.scale":      ((6, 1), "amax weight:block.fc"),
        "__nncf_hooks.pre_hooks.block/0/fc/linear/0__1.0.scale":    ((6, 1), "amax weight:block.0.fc"),
        "__nncf_hooks.post_hooks.block/0/relu/relu/0__0.0.scale":   ((1,), "amax output:block.0.relu"),
        "__nncf_hooks.post_hooks.x__0.0.scale":                     ((1,), "amax input:x"),
        "__nncf_hooks.post_hooks.relu/relu/0__0.0.input_low":       ((1,), "min_val output:relu"),
        "__nncf_hooks.post_hooks./mean/0__0.0._num_bits":           ((1,), "constant output:mean"),
        "__nncf_hooks.pre_hooks./add/0__1.0.scale":                 ((1,), "amax input:add#1"),
    },
    "compressed_tensors": {
        "fc.weight_scale":                             ((6, 1), "scale weight:fc"),
        "fc.weight_zero_point":                        ((6, 1), "zero_point weight:fc"),
        "fc.input_scale":                              ((1,), "scale input:fc"),
        "fc.input_zero_point":                         ((1,), "zero_point input:fc"),
        "attn.k_scale":                                ((1,), "scale k:attn"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PREPARED)
def test_prepared(name: str) -> None:
    schema = described(NET | {key: shape for key, (shape, _) in PREPARED[name].items()})
    assert (schema.framework, schema.stage.value) == (name, "prepared")
    found = {key: f"{schema[key].role.value} {schema[key].site}" for key in PREPARED[name]}
    assert found == {key: expected for key, (_, expected) in PREPARED[name].items()}
    assert list(schema.float_keys()) == list(NET)
    assert all(schema[key].site == key for key in NET)
    for key in PREPARED[name]:
        entry = schema[key]
        assert entry.quantizer and key.startswith(entry.quantizer), key


def test_the_state_of_one_quantizer_is_together() -> None:
    schema = described(NET | {key: shape for key, (shape, _) in PREPARED["compressed_tensors"].items()})
    assert schema.by_quantizer()["fc.weight"] == ["fc.weight_scale", "fc.weight_zero_point"]
    schema = described(NET | {key: shape for key, (shape, _) in PREPARED["pytorch_quantization"].items()})
    assert len(schema.by_quantizer()["fc._input_quantizer"]) == 2


def test_nncf_two() -> None:
    schema = described(
        {
            "nncf_module.conv.weight": (4, 1, 3, 3),
            "nncf_module.conv.nncf_padding_value": (1,),
            "nncf_module.conv.pre_ops.0.op.scale": (4, 1, 1, 1),
            "nncf_module.conv.pre_ops.0.op.signed_tensor": (1,),
            "external_quantizers./nncf_model_input_0|OUTPUT.scale": (1,),
            "nncf_module.activation_quantizers.Net/NNCFConv2d[conv]/conv2d_0|OUTPUT.scale": (1,),
        }
    )
    assert (schema.framework, schema.stage.value) == ("nncf", "prepared")
    assert [schema[key].site for key in schema.float_keys()] == ["conv.weight"]
    assert schema["nncf_module.conv.pre_ops.0.op.scale"].site == "weight:conv"
    assert schema["external_quantizers./nncf_model_input_0|OUTPUT.scale"].site == "graph:/nncf_model_input_0|OUTPUT"


def test_aimet_one() -> None:
    schema = described({"conv._module_to_wrap.weight": (4, 1, 3, 3), "conv.param_quantizers.weight.min": ()})
    assert schema["conv._module_to_wrap.weight"].site == "conv.weight"


def test_sparseml_qat_wrapper_and_norm_wrapper() -> None:
    observer = ".activation_post_process.scale"
    schema = described(
        {
            "add.input_quant_stubs.0" + observer: (1,),
            "add.input_quant_stubs.1" + observer: (1,),
            "add.forward_fn.weight": (3,),
            "add.output_quant_stubs.0" + observer: (1,),
            "bn1.bn.module.weight": (4,),
            "bn1.bn.module.running_mean": (4,),
            "block.conv.quant" + observer: (1,),
            "block.conv.module.weight": (4, 4, 1, 1),
            "block.conv.module.weight_fake_quant.scale": (1,),
            "block.bn.module.weight": (4,),
            "block.bn.module.running_mean": (4,),
            "block.bn.quant" + observer: (1,),
        }
    )
    assert (schema.framework, schema.stage.value) == ("sparseml", "prepared")
    assert [schema[key].site for key in schema] == [
        "input:add", "input:add#1", "add.weight", "output:add", "bn1.weight", "bn1.running_mean", "input:block.conv",
        "block.conv.weight", "weight:block.conv", "block.bn.weight", "block.bn.running_mean", "input:block.bn",
    ]  # fmt: skip


def test_what_only_looks_alike_is_plain() -> None:
    assert described(NET | {"fc.weight_scale": (3, 7, 2)}).framework == "plain"
    assert described(NET | {"attn.input_scale": (1,), "attn.scale": (1,), "attn.zero_point": ()}).framework == "plain"
    assert (
        described(NET | {"weight_quant": (1,), "quantizer.weight": (3, 3), "vq.quantizer.scale": ()}).framework
        == "plain"
    )
    assert described(NET | {"quant.weight": (3,), "module.quant.module.weight": (3, 3)}).framework == "plain"


CONVERTED: Mapping[str, tuple[Mapping[str, tuple[tuple[int, ...], torch.dtype]], str]] = {
    "torch.ao": (
        {
            "quant.scale":                             ((1,), F32),
            "quant.zero_point":                        ((1,), torch.int64),
            "conv.weight":                             ((2, 1, 1, 1), torch.qint8),
            "conv.bias":                               ((2,), F32),
            "conv.scale":                              ((), F32),
            "fc._packed_params._packed_params.0":      ((3, 2), torch.qint8),
            "fc._packed_params._packed_params.1":      ((3,), F32),
        },
        "converted",
    ),
    "pt2e": ({"conv.weight": ((2, 1), F32), "_frozen_param0": ((2, 1), I8), "_scale_0": ((2,), F32)}, "pt2e"),
    "torchao": ({"fc._weight_qdata": ((6, 4), I8), "fc._weight_scale": ((6, 1), F32), "b": ((6,), F32)}, "torchao"),
    "torchao, the model itself": ({"_weight_qdata": ((6, 4), I8), "_weight_scale": ((6, 1), F32)}, "torchao"),
    "int-quantized": ({"fc.weight": ((6, 4), I8), "fc.weight_scale": ((6, 1), F32)}, "compressed_tensors"),
    "fp8 blocks": (
        {"fc.weight": ((6, 4), torch.float8_e4m3fn), "fc.weight_scale_inv": ((1, 1), F32)}, "compressed_tensors",
    ),
    "pack-quantized": (
        {"fc.weight_packed": ((6, 1), I32), "fc.weight_scale": ((6, 1), F32), "fc.weight_shape": ((2,), torch.int64)},
        "compressed_tensors",
    ),
    "mtq.compress": (
        {"fc.weight": ((6, 2), U8), "fc.weight_quantizer._amax": ((6, 1), F32)},
        "modelopt",
    ),
    "GPTQ": ({"fc.qweight": ((1, 6), I32), "fc.qzeros": ((1, 1), I32), "fc.scales": ((1, 6), F32)}, "gptq"),
    "bitsandbytes": ({"fc.weight": ((12, 1), U8), "fc.weight.absmax": ((1,), F32)}, "bitsandbytes"),
    "bitsandbytes, int8": ({"fc.weight": ((6, 4), I8), "fc.SCB": ((6,), F32)}, "bitsandbytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_converted(name: str) -> None:
    keys, framework = CONVERTED[name]
    schema = describe_keys(KeyView({key: Spec(*spec) for key, spec in keys.items()}))
    assert (schema.framework, schema.stage.value) == (framework, "converted")


def test_keys_are_looked_at_once() -> None:
    """Many layers are described in time that grows with their number."""
    for name, rows in PREPARED.items():
        keys = {f"layers.{i}.{key}": shape for i in range(2000) for key, (shape, _) in rows.items()}
        assert described(keys | {"fc.weight": (6, 4)}).framework in (name, "plain"), name


def test_layers_that_a_configuration_names_are_looked_at_once() -> None:
    """As convert_checkpoint writes it, every layer by its name."""
    keys = {"weight_packed": ((6, 8), I32), "weight_scale": ((6, 1), F32), "weight_shape": ((2,), torch.int64)}
    count = 20000
    specs = {f"layers.{i}.{key}": Spec(*spec) for i in range(count) for key, spec in keys.items()}
    group = {"targets": [f"layers.{i}" for i in range(count)], "weights": {"num_bits": 4, "strategy": "channel"}}
    shapes = {f"layers.{i}.weight_shape": (6, 64) for i in range(count)}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    assert len(describe_keys(KeyView(specs, config=config, numbers=shapes)).roundings) == count


def test_the_checkpoint_says_framework_and_stage() -> None:
    state = {"fc.weight": torch.ones(2, 2), "fc._input_quantizer._amax": torch.ones(())}
    checkpoint = qc.open_checkpoint(state)
    assert (checkpoint.framework, checkpoint.stage) == ("pytorch_quantization", "prepared")
