"""Files in another form: read by the package whose form it is, they hold what the source holds."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization as ao
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.api import initialize_fake_quantizers

import qat_compat as qc
from qat_compat.schema import Spec

BF16 = torch.bfloat16


class Net(nn.Module):
    """An embedding, a norm and linear layers, one of them never quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.norm(self.embed(x))).relu()))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def inner(module: nn.Module, name: str) -> bool:
    return name in ("up", "down")


def weights(bits: int, group: int | None = None, **more: Any) -> IntxFakeQuantizeConfig:
    granularity = PerAxis(0) if group is None else PerGroup(group)
    return IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), granularity, **more)


def per_token(symmetric: bool) -> IntxFakeQuantizeConfig:
    return IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=symmetric)


def trained(config: Any, dtype: torch.dtype = torch.float32, embeddings: bool = False) -> Callable[[], nn.Module]:
    """After one step of training, so that no weight is on its grid by chance."""

    def make() -> nn.Module:
        model = net(dtype)
        ao.quantize_(model, config, filter_fn=inner)
        if embeddings:
            ao.quantize_(model, config, filter_fn=lambda module, name: name == "embed")
        batch = torch.arange(8).reshape(2, 4)
        initialize_fake_quantizers(model, (batch,))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(batch).square().mean().backward()
        optimizer.step()
        return model

    return make


INT4_DYNAMIC = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
TRAINED: dict[str, Callable[[], nn.Module]] = {
    "int8 channels": trained(QATConfig(weight_config=weights(8), step="prepare"), embeddings=True),
    "int4 groups": trained(QATConfig(weight_config=weights(4, 32), step="prepare")),
    "int4 groups, base config": trained(QATConfig(INT4_DYNAMIC, step="prepare")),
    "int4 groups bf16": trained(QATConfig(weight_config=weights(4, 32), step="prepare"), BF16),
    "int4 groups, base config bf16": trained(QATConfig(INT4_DYNAMIC, step="prepare"), BF16),
    "int8 channels, base config bf16": trained(
        QATConfig(ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)), step="prepare"), BF16
    ),
    "int4 asymmetric": trained(QATConfig(weight_config=weights(4, 32, is_symmetric=False), step="prepare")),
    "int8 with inputs": trained(
        QATConfig(activation_config=per_token(False), weight_config=weights(8), step="prepare")
    ),
    "int3 channels": trained(QATConfig(weight_config=weights(3), step="prepare")),
    "learnt int4": trained(
        QATConfig(weight_config=weights(4, 32, is_dynamic=False, range_learning=True), step="prepare")
    ),
}  # fmt: skip


def converted(config: Any, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = net(dtype)
        ao.quantize_(model, config, filter_fn=inner)
        return model

    return make


CONVERTED: dict[str, Callable[[], nn.Module]] = {
    "int8 rows": converted(ao.Int8WeightOnlyConfig()),
    "int8 tensor": converted(ao.Int8WeightOnlyConfig(granularity=ao.PerTensor())),
    "int8 rows bf16": converted(ao.Int8WeightOnlyConfig(), BF16),
    "int8 dynamic": converted(ao.Int8DynamicActivationInt8WeightConfig(granularity=PerRow())),
    "intx groups": converted(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "intx dynamic bf16": converted(INT4_DYNAMIC, BF16),
    "intx asymmetric": converted(
        ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int2, granularity=PerAxis(0), mapping_type=ao.MappingType.ASYMMETRIC
        )
    ),
}  # fmt: skip


def decompressed(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """As transformers loads such a folder: the configuration makes the modules, the file fills them."""
    model = net(dtype)
    config = QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    compressor.decompress_model(model)
    return {key: value for key, value in model.state_dict().items() if key.split(".")[-1] in ("weight", "bias")}


def assert_same(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for key in expected:
        assert torch.equal(found[key].to(expected[key].dtype), expected[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_decompresses_to_what_training_saw(name: str, tmp_path: Path) -> None:
    model = TRAINED[name]()
    expected = dict(qc.to_float(model, weights="quantized"))
    latent = {key: value.clone() for key, value in qc.to_float(model).items()}
    assert not torch.equal(expected["up.weight"], latent["up.weight"])
    folder = qc.convert_checkpoint(model, "compressed-tensors", tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(decompressed(folder, model.norm.weight.dtype), expected)
    assert_same(qc.to_float(folder), expected)
    assert_same(qc.to_float(model), latent)


@pytest.mark.parametrize("name", [*TRAINED, "static int4"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_saved_model_is_written_as_the_model_itself(name: str, suffix: str, tmp_path: Path) -> None:
    """Byte for byte: the file holds what its quantizers are, and where these hold ranges, those."""
    static = QATConfig(weight_config=weights(4, 32, is_dynamic=False), step="prepare")
    model = TRAINED[name]() if name in TRAINED else trained(static)()
    live = qc.convert_checkpoint(model, "compressed-tensors", tmp_path / "live")
    saved = qc.save_checkpoint(model, tmp_path / f"qat.{suffix}")
    again = qc.save_checkpoint(qc.open_checkpoint(saved), tmp_path / f"again.{suffix}")
    for source in (saved, again):
        folder = qc.convert_checkpoint(source, "compressed-tensors", tmp_path / source.stem)
        for path in live.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    quantized = dict(qc.to_float(model, weights="quantized"))
    assert_same(decompressed(live, model.norm.weight.dtype), quantized)
    assert_same(qc.to_float(saved, weights="quantized"), quantized)
    resumed = net(model.norm.weight.dtype)
    resumed.load_state_dict(dict(qc.to_float(saved)), strict=True)
    assert_same(resumed.state_dict(), qc.to_float(model))


def test_a_saved_model_is_refused_as_the_model_itself(tmp_path: Path) -> None:
    config = QATConfig(ao.Float8DynamicActivationFloat8WeightConfig(), step="prepare")
    for index, make in enumerate(
        [trained(QATConfig(activation_config=per_token(False), step="prepare")), trained(config)]
    ):
        found = []
        for source in (make(), qc.save_checkpoint(make(), tmp_path / f"{index}.pt")):
            with pytest.raises(qc.PlanError, match=r"down\.weight: it is what its own quantizers make of it") as caught:
                qc.convert_checkpoint(source, "compressed-tensors", tmp_path / "out")
            found.append(caught.value.problems)
        assert found[0] == found[1]


def test_the_configuration_says_what_training_did(tmp_path: Path) -> None:
    folder = qc.convert_checkpoint(TRAINED["int8 with inputs"](), "compressed-tensors", tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (config["format"], group["targets"]) == ("int-quantized", ["up", "down"])
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    assert group["input_activations"]["dynamic"] and not group["input_activations"]["symmetric"]
    folder = qc.convert_checkpoint(TRAINED["int4 asymmetric"](), "compressed-tensors", tmp_path / "int4")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (config["format"], weights["symmetric"], weights["group_size"]) == ("pack-quantized", False, 32)


@pytest.mark.parametrize("name", CONVERTED)
def test_integers_of_torchao_and_back(name: str, tmp_path: Path) -> None:
    model = CONVERTED[name]()
    expected = dict(qc.to_float(model))
    folder = qc.convert_checkpoint(model, "compressed-tensors", tmp_path / "out")
    assert_same(decompressed(folder, model.norm.weight.dtype), expected)
    path = qc.convert_checkpoint(folder, "torchao", tmp_path / "back.safetensors")
    with safe_open(path, "pt") as file:
        state, left = unflatten_tensor_state_dict(load_file(path), file.metadata())
    assert not left
    assert_same({key: value.dequantize() if is_subclass(value) else value for key, value in state.items()}, expected)
    assert_same(qc.to_float(path), expected)
    old = model.up.weight
    assert torch.equal(state["up.weight"].qdata, old.qdata)
    assert {key for key, value in state.items() if is_subclass(value)} == {"up.weight", "down.weight"}
    again = qc.convert_checkpoint(path, "compressed-tensors", tmp_path / "again")
    one, two = (load_file(place / "model.safetensors") for place in (folder, again))
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (folder / "config.json").read_text() == (again / "config.json").read_text()


def is_subclass(value: Tensor) -> bool:
    return hasattr(type(value), "tensor_data_names")


def test_a_trained_model_runs_as_torchaos_integers(tmp_path: Path) -> None:
    model = TRAINED["int4 groups, base config"]().eval()
    batch = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        expected = model(batch)
    path = qc.convert_checkpoint(model, "torchao", tmp_path / "int4.safetensors")
    with safe_open(path, "pt") as file:
        state, _ = unflatten_tensor_state_dict(load_file(path), file.metadata())
    target = net()
    target.load_state_dict(state, assign=True)
    with torch.no_grad():
        torch.testing.assert_close(target(batch), expected, rtol=1e-4, atol=1e-4)


def test_float_from_integers(tmp_path: Path) -> None:
    folder = qc.convert_checkpoint(CONVERTED["intx groups"](), "compressed-tensors", tmp_path / "int4")
    for name in ("model.safetensors", "model.pt"):
        path = qc.convert_checkpoint(folder, "float", tmp_path / name, like=net())
        opened = qc.open_checkpoint(path)
        assert (opened.stage, opened.framework, list(opened)) == ("float", "plain", list(net().state_dict()))
        assert_same(opened, qc.to_float(folder))
    net().load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_the_rest_of_the_configuration_is_kept(tmp_path: Path) -> None:
    folder = qc.convert_checkpoint(CONVERTED["int8 rows"](), "compressed-tensors", tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architectures": ["Net"], **config}))
    again = qc.convert_checkpoint(folder, "compressed-tensors", tmp_path / "b")
    assert json.loads((again / "config.json").read_text()) == {"architectures": ["Net"], **config}


@pytest.mark.parametrize("to", ["float", "torchao", "compressed-tensors"])
def test_one_tensor_at_a_time(to: str, tmp_path: Path) -> None:
    """Of the tensors that were read, those of one layer are alive."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(key: str) -> Tensor:
        nonlocal most
        value = torch.zeros(8, 64, dtype=torch.int8) if key.endswith("weight") else torch.ones(8, 2)
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    specs: dict[str, Spec] = {}
    for index in range(24):
        specs[f"layers.{index}.weight"] = Spec((8, 64), torch.int8)
        specs[f"layers.{index}.weight_scale"] = Spec((8, 2), torch.float32)
    checkpoint = qc.Checkpoint(specs, read, name="large")
    out = qc.convert_checkpoint(checkpoint, to, tmp_path / ("out" if to[0] == "c" else "out.safetensors"))
    assert out.exists() and len(alive) >= 48
    assert most <= 4


def test_what_cannot_be_written_exactly_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = TRAINED["int4 groups"]()
    with pytest.raises(qc.CompatError, match="cannot be written as 'gguf'") as caught:
        qc.convert_checkpoint(model, "gguf", out)
    assert caught.value.expected == "float, torchao, compressed-tensors, modelopt"
    with pytest.raises(qc.PlanError, match="nothing says to which integers its weights are rounded"):
        qc.convert_checkpoint(model.state_dict(), "compressed-tensors", out)
    with pytest.raises(qc.PlanError, match=r"up\.weight: .* Float8Tensor dequantized, for which compressed-tensors"):
        qc.convert_checkpoint(converted(ao.Float8WeightOnlyConfig())(), "compressed-tensors", out)
    static = converted(ao.Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.full((1, 1), 0.1)))()
    with pytest.raises(qc.PlanError, match=r"quantized in another way \(static\)"):
        qc.convert_checkpoint(static, "compressed-tensors", out)
    only_inputs = trained(QATConfig(activation_config=per_token(False), step="prepare"))()
    with pytest.raises(qc.PlanError, match=r"down\.weight: it is what its own quantizers make of it"):
        qc.convert_checkpoint(only_inputs, "compressed-tensors", out)
    with pytest.raises(qc.CompatError, match="the option is for other forms"):
        qc.convert_checkpoint(model, "compressed-tensors", out, like=net())
    with pytest.raises(qc.SaveError, match="is a safetensors file"):
        qc.convert_checkpoint(model, "torchao", tmp_path / "out.pt")
    per_row = {"up.weight_scale": torch.ones(4, 1), "up.weight_shape": torch.tensor([4, 8])}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["up"], "weights": {"num_bits": 4}, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    packed = {"up.weight_packed": torch.ones(4, 1, dtype=torch.int32), **per_row}
    symmetric = qc.open_checkpoint({"state_dict": packed, "quantization_config": config})
    with pytest.raises(qc.PlanError, match="no tensor for such weights with symmetric inputs") as refused:
        qc.convert_checkpoint(symmetric, "torchao", tmp_path / "out.safetensors")
    assert refused.value.file == symmetric.name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["torchao", "compressed-tensors"])
@pytest.mark.parametrize(
    ("form", "more", "kind"),
    [
        ("Int8Tensor", {"block_size": [1, 0]}, qc.PlanError),
        ("Int8Tensor", {"block_size": [1, 3]}, qc.PlanError),
        ("IntxUnpackedToInt8Tensor", {"block_size": [1, 8], "target_dtype": "int99"}, qc.PlanError),
        ("IntxUnpackedToInt8Tensor", {"block_size": [1, 8], "target_dtype": "int4"}, qc.CheckpointError),
        ("IntxUnpackedToInt8Tensor", {"block_size": [1, 4], "target_dtype": "int8"}, qc.CheckpointError),
    ],
)
def test_integers_that_are_not_what_their_file_says(
    to: str, form: str, more: dict[str, Any], kind: type[qc.CompatError], tmp_path: Path
) -> None:
    """Groups of no size, more bits than there are, fewer than the integers take, scales for other groups."""
    parts = {name: f"fc._weight_{name}" for name in ("qdata", "scale", "zero_point")}
    state = {"fc._weight_qdata": torch.full((4, 8), 100, dtype=torch.int8), "fc._weight_scale": torch.ones(4, 1)}
    checkpoint = qc.open_checkpoint({**state, "fc._weight_zero_point": torch.zeros(4, 1, dtype=torch.int8)})
    checkpoint.attributes = {"fc.weight": {"class": form, "tensors": parts, "dtype": "float32", **more}}
    with pytest.raises(kind, match=r"fc\.weight"):
        qc.convert_checkpoint(checkpoint, to, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_beside_a_file_is_kept(tmp_path: Path) -> None:
    model = TRAINED["int4 groups"]()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Net"]}')
    saved = qc.save_checkpoint(model, tmp_path / "model" / "model.safetensors")
    folder = qc.convert_checkpoint(saved, "compressed-tensors", tmp_path / "out")
    found = json.loads((folder / "config.json").read_text())
    assert found.pop("architectures") == ["Net"]
    live = qc.convert_checkpoint(model, "compressed-tensors", tmp_path / "live")
    assert json.loads((live / "config.json").read_text()) == found


def test_all_or_nothing(tmp_path: Path) -> None:
    folder = qc.convert_checkpoint(CONVERTED["int8 rows"](), "compressed-tensors", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(qc.SaveError, match="the destination is taken"):
        qc.convert_checkpoint(CONVERTED["intx groups"](), "compressed-tensors", folder)
    good = qc.open_checkpoint(folder)
    broken = {key: good[key] for key in good} | {"down.weight_scale": torch.ones(3, 1)}
    with pytest.raises(qc.CompatError):
        qc.convert_checkpoint(broken, "compressed-tensors", tmp_path / "other")
    (tmp_path / "empty").mkdir()
    qc.convert_checkpoint(good, "compressed-tensors", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
