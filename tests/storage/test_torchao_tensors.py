"""Tensor subclasses of torchao: the same keys come out of memory, of a pickle and of torchao's own safetensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchao.quantization as ao
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import QATConfig
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

import qat_compat as qc


def _quantized(config: Callable[[], Any]) -> Tensor:
    layer = nn.Sequential(nn.Linear(64, 32))
    ao.quantize_(layer, config())
    return layer[0].weight


def _trained() -> Tensor:
    layer = nn.Sequential(nn.Linear(64, 32))
    config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    ao.quantize_(layer, QATConfig(config, step="prepare"))
    ao.quantize_(layer, QATConfig(config, step="convert"))
    return layer[0].weight


def _int4() -> Tensor:
    data, scales = torch.randint(0, 100, (32, 32), dtype=torch.uint8), torch.rand(2, 32, dtype=torch.bfloat16)
    return ao.Int4Tensor(data, scales, scales.clone(), [1, 32], torch.Size([32, 64]))


def _int4_tiles() -> Tensor:
    data, scales = torch.randint(0, 100, (4, 1, 32, 4), dtype=torch.int32), torch.rand(2, 32, 2, dtype=torch.bfloat16)
    return ao.Int4TilePackedTo4dTensor(data, scales, [1, 32], torch.Size([32, 64]))


def _float8() -> Tensor:
    kwargs = {"mm_config": Float8MMConfig(use_fast_accum=True), "act_quant_kwargs": QuantizeTensorToFloat8Kwargs()}
    data, scale = torch.randn(32, 64).to(torch.float8_e4m3fn), torch.rand(32, 1)
    return ao.Float8Tensor(data, scale, block_size=[1, 64], dtype=torch.bfloat16, **kwargs)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "int8": lambda: _quantized(ao.Int8WeightOnlyConfig),
    "int8 dynamic": lambda: _quantized(ao.Int8DynamicActivationInt8WeightConfig),
    "int4 groups": lambda: _quantized(
        lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    ),
    "QAT": _trained,
    "float8": lambda: _quantized(ao.Float8WeightOnlyConfig),
    "float8 dynamic": _float8,
    "packed int4": _int4,
    "tiled int4": _int4_tiles,
    "mxfp8": lambda: MXTensor.to_mx(torch.randn(32, 64), torch.float8_e4m3fn, 32),
    "mxfp4": lambda: MXTensor.to_mx(torch.randn(32, 64), torch.float4_e2m1fn_x2, 32),
    "nvfp4": lambda: NVFP4Tensor.to_nvfp4(torch.randn(32, 64)),
}


@pytest.fixture(params=TENSORS)
def state(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"block.fc.weight": TENSORS[request.param]().detach(), "block.fc.bias": torch.randn(32)}


@pytest.fixture
def flat(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What torchao itself makes of it for safetensors."""
    made: tuple[dict[str, Tensor], dict[str, str]] = flatten_tensor_state_dict(state)
    return made


def test_keys_tensors_and_attributes_are_those_of_torchaos_own_file(
    state: dict[str, Tensor], flat: tuple[dict[str, Tensor], dict[str, str]], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "f.pt")
    save_file(flat[0], tmp_path / "f.safetensors", metadata=flat[1])
    opened = [qc.open_checkpoint(source) for source in (state, tmp_path / "f.pt", tmp_path / "f.safetensors")]
    for checkpoint in opened:
        assert set(checkpoint) == set(flat[0])
        assert all(same_bytes(checkpoint[key], flat[0][key]) for key in checkpoint)
        assert (checkpoint.framework, checkpoint.stage) == ("torchao", "converted")
        assert checkpoint.metadata == {}
    held, pickled, header = (checkpoint.attributes for checkpoint in opened)
    assert held == pickled
    known = {name: value for name, value in held["block.fc.weight"].items() if name in header["block.fc.weight"]}
    assert header == {"block.fc.weight": known}
    packed_four_bits = flat[0]["block.fc._weight_qdata"].dtype in (torch.uint8, torch.float4_e2m1fn_x2)
    assert set(held["block.fc.weight"]) - set(known) <= ({"shape"} if packed_four_bits else set())


def test_attributes_are_the_tensors_own(state: dict[str, Tensor]) -> None:
    tensor: Any = state["block.fc.weight"]
    found = qc.open_checkpoint(state).attributes["block.fc.weight"]
    assert found["class"] == type(tensor).__name__
    assert (tuple(found["shape"]), found["dtype"]) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    checkpoint = qc.open_checkpoint(state)
    assert all(same_bytes(checkpoint[key], getattr(tensor, part)) for part, key in found["tensors"].items())
    block = tensor.block_size
    assert found["block_size"] == (block if isinstance(block, int) else list(block))


def test_a_module_and_what_is_saved_of_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    expected = qc.open_checkpoint(model.state_dict())
    for name in ("f.pt", "f.safetensors"):
        for source in (model, model.state_dict(), expected):
            qc.save_checkpoint(source, tmp_path / name)
            found = qc.open_checkpoint(tmp_path / name)
            assert found.attributes == expected.attributes
            assert (set(found), found.stage) == (set(expected), "converted")
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    kwargs = expected.attributes["0.weight"]["act_quant_kwargs"]
    assert kwargs["granularity"] == {"class": "PerRow", "dim": -1}
    assert kwargs["mapping_type"] == "SYMMETRIC"


def test_shards(tmp_path: Path) -> None:
    """The tensors inside a subclass may be in different shards, and every shard's header describes all of them."""
    state = {f"{layer}.weight": TENSORS["int8 dynamic"]().detach() for layer in range(3)}
    flat, about = flatten_tensor_state_dict(state)
    keys = sorted(flat)
    weight_map = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(keys)}
    for name in set(weight_map.values()):
        save_file({key: flat[key] for key in keys if weight_map[key] == name}, tmp_path / name, metadata=about)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert qc.open_checkpoint(tmp_path).attributes == qc.open_checkpoint(state).attributes


@pytest.mark.parametrize("size", [8, 64, 256])
def test_a_folder_of_torch_distributed(tmp_path: Path, size: int) -> None:
    """The index says what the tensor stands for; the shard holds what it is, at any size."""
    model = nn.Sequential(nn.Linear(size, size))
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    found, expected = qc.open_checkpoint(tmp_path), qc.open_checkpoint(model)
    assert list(found) == list(expected)
    assert found.attributes == expected.attributes
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tied_subclasses_are_tied_inside() -> None:
    weight = TENSORS["int8"]()
    checkpoint = qc.open_checkpoint({"embed.weight": weight, "head.weight": weight})
    assert checkpoint.alias("embed._weight_qdata") == checkpoint.alias("head._weight_qdata")


def test_a_name_that_is_taken_is_an_error() -> None:
    state = {"fc.weight": TENSORS["int8"](), "fc._weight_qdata": torch.ones(2)}
    with pytest.raises(qc.CheckpointError, match="two tensors have one name") as caught:
        qc.open_checkpoint(state)
    assert caught.value.key == "fc._weight_qdata"


class Nested:
    """Pickles as a tensor subclass of torchao with an attribute that is made of lists in lists."""

    def __init__(self, attribute: Any) -> None:
        self.attribute = attribute

    def __reduce__(self) -> tuple[Any, ...]:
        kind, shape = ao.Int8Tensor, torch.Size([2, 2])
        parts = {"qdata": torch.ones(2, 2, dtype=torch.int8), "block_size": self.attribute}
        wrapper = (kind, torch.float32, shape, (2, 1), 0, torch.strided, "cpu", False)
        make = torch._utils._rebuild_wrapper_subclass
        return torch._tensor._rebuild_from_type_v2, (make, kind, wrapper, parts)


def test_attributes_without_end_are_refused(tmp_path: Path) -> None:
    deep: Any = []
    wide: Any = [1]
    for _ in range(300):
        deep = [deep]
    for _ in range(20):
        wide = [wide] * 20  # shared parts: written out, 20 to the power of 20
    for attribute in (deep, wide):
        torch.save({"fc.weight": Nested(attribute)}, tmp_path / "f.pt")
        with pytest.raises(qc.LimitError, match="attributes of a tensor subclass"):
            qc.open_checkpoint(tmp_path / "f.pt")
    about = {"_type": "Int8Tensor", "_data": {"block_size": deep}, "_tensor_data_names": ["qdata"]}
    header = {"tensor_names": '["fc.weight"]', "fc.weight": json.dumps(about)}
    save_file({"fc._weight_qdata": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "f.safetensors", metadata=header)
    with pytest.raises(qc.LimitError, match="attributes of a tensor subclass"):
        qc.open_checkpoint(tmp_path / "f.safetensors")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one).equal(_bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
