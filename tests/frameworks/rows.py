"""The rows of the README's table of frameworks: how each makes its models and files, by its own package.

A row without `model` has files only, laid out as its package writes them: the package is not among those that the tests
install.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import test_brevitas
import test_modelopt
import test_nncf
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from flows import FLOWS
from native import Net, batches, float_state, make_float, native, other
from safetensors.torch import load_file, save_file
from test_converted import converted
from torch import Tensor, nn
from torch.ao.quantization import QuantWrapper, fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from zoo import Arch

from qat_compat.testing import native_calibration

ARCH = Arch("net", Net, lambda: torch.randn(3, 3, 8, 8), fuse=(("conv1", "bn1"),))
Prepare = Callable[[nn.Module, Sequence[Tensor]], nn.Module]


@dataclass(frozen=True)
class Row:
    """One framework.

    Args:
        name: Its name in the table.
        told: The framework and stage that its files are told as.
        file: Writes a file of a model with the weights of `float_state()` into a folder, without this package.
        model: Makes such a model; `None` where the tests do not install the package.
        other: Makes an equal model that holds other weights and ranges.
        dequantized: The weights of an integer model, as the framework itself dequantizes them.
        converts: Its name in `convert_checkpoint`, where that writes what its own library reads, and what the library
            makes of it.
    """

    name: str
    told: tuple[str, str]
    file: Callable[[Path], Path]
    model: Callable[[], nn.Module] | None = None
    other: Callable[[], nn.Module] | None = None
    dequantized: Callable[[], Mapping[str, Tensor]] | None = None
    converts: tuple[str, Callable[[Path], Mapping[str, Tensor]]] | None = None


# --- prepared by torch.ao and torchao ---------------------------------------------------------------------------------


def by_flow(flow: str) -> Prepare:
    """`prepare` of a flow of the matrix."""
    return partial(_calibrated, lambda model: FLOWS[flow].prepare(model, ARCH))


def _calibrated(prepare: Callable[[nn.Module], nn.Module], model: nn.Module, data: Sequence[Tensor]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare(model)
    native_calibration(model, data)
    return model


def _learning(model: nn.Module) -> nn.Module:
    """torchao's own quantizer with state: int8 per channel, as wide as torch.ao's, with a scale that is learned."""
    floats = torch.float32  # an integer zero point cannot be a parameter
    learned: Mapping[str, Any] = {"is_dynamic": False, "range_learning": True, "zero_point_precision": floats}
    config = IntxFakeQuantizeConfig(torch.int8, PerAxis(0), is_symmetric=True, **learned)
    quantize_(model.train(), QATConfig(weight_config=config, step="prepare"))
    return model


def _wrapped(model: nn.Module) -> nn.Module:
    """Every layer in a `QuantWrapper`, as SparseML prepares a model."""
    model = fuse_modules_qat(model.train(), [["conv1", "bn1"]])
    for name in ("conv1", "conv2", "fc1", "fc2"):
        wrapper = QuantWrapper(model.get_submodule(name))
        wrapper.qconfig = wrapper.module.qconfig = wrapper.quant.qconfig = get_default_qat_qconfig("x86")
        setattr(model, name, wrapper)
    return prepare_qat(model, inplace=True)


def _live(name: str, told: str, prepare: Prepare, save: Callable[[nn.Module, Path], None] | None = None) -> Row:
    made = cache(lambda: native(prepare, float_state(), batches()))

    def file(folder: Path) -> Path:
        path = folder / "model.pt"
        save(made(), path) if save else torch.save(made().state_dict(), path)
        return path

    different = cache(lambda: other(prepare))
    return Row(name, (told, "prepared"), file, lambda: copy.deepcopy(made()), lambda: copy.deepcopy(different()))


# --- converted --------------------------------------------------------------------------------------------------------


Make = Callable[[nn.Module], nn.Module]


def _integer(
    name: str, told: str, convert: Make, dequantized: Callable[[nn.Module], Any], different: Make | None = None
) -> Row:
    made = cache(lambda: convert(_float_model(1)))

    def file(folder: Path) -> Path:
        torch.save(made().state_dict(), folder / "model.pt")
        return folder / "model.pt"

    def second() -> nn.Module:
        return different(made()) if different else convert(_float_model(2))

    return Row(name, (told, "converted"), file, made, second, dequantized=lambda: dequantized(made()))


def _zeroed(model: nn.Module) -> nn.Module:
    """A copy that holds nothing: PT2E takes long to convert a second one."""
    model = copy.deepcopy(model)
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def _float_model(seed: int) -> nn.Module:
    model = make_float()
    model.load_state_dict(float_state(seed))
    return model


def _converted(model: nn.Module, flow: str) -> nn.Module:
    return converted(flow, by_flow(flow)(model, batches()))


def trained_torchao() -> nn.Module:
    """Prepared by torchao, which is what can be written as integers."""
    model = _float_model(1)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, QATConfig(config, step="prepare"))
    return model


def _converted_torchao(model: nn.Module) -> nn.Module:
    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, QATConfig(config, step="prepare"))
    quantize_(model, QATConfig(config, step="convert"))
    return model


def _of_modules(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if callable(getattr(layer, "weight", None))}
    return {f"{name}.weight": layer.weight().dequantize() for name, layer in layers.items()}


def _of_graph(model: nn.Module) -> dict[str, Tensor]:
    """By the graph's own `dequantize` nodes, at the weights of the layers in the order in which they run."""
    found = []
    for node in model.graph.nodes:
        if str(node.target) in ("aten.conv2d.default", "aten.linear.default"):
            weight = node.args[1]
            values = [getattr(model, str(a.target)) if hasattr(a, "target") else a for a in weight.args]
            found.append(weight.target(*values))
    layers = ("conv1", "conv2", "fc1", "fc2")
    return dict(zip((f"{name}.weight" for name in layers), found, strict=True))


def _of_tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {key: value.dequantize() for key, value in state.items() if hasattr(value, "tensor_data_names")}


# --- files ------------------------------------------------------------------------------------------------------------


def _amax(weight: Tensor) -> Tensor:
    return weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)


def _pytorch_quantization() -> dict[str, Tensor]:
    state = float_state()
    for name in ("conv1", "conv2", "fc1", "fc2"):
        state[f"{name}._input_quantizer._amax"] = torch.tensor(3.0)
        state[f"{name}._weight_quantizer._amax"] = _amax(state[f"{name}.weight"])
    return state


def _aimet() -> dict[str, Tensor]:
    state = float_state()
    for name in ("conv1", "conv2", "fc1", "fc2"):
        high = _amax(state[f"{name}.weight"])
        weight, inputs = f"{name}.param_quantizers.weight", f"{name}.input_quantizers.0"
        state |= {f"{weight}.min": -high * 128 / 127, f"{weight}.max": high}
        state |= {f"{inputs}.min": torch.tensor(-3.0), f"{inputs}.max": torch.tensor(3.0)}
    return state


def _plain(name: str, told: str, state: Callable[[], dict[str, Tensor]]) -> Row:
    def file(folder: Path) -> Path:
        torch.save(state(), folder / "model.pth")
        return folder / "model.pth"

    return Row(name, (told, "prepared"), file)


WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel"}


@cache
def _compressed() -> tuple[nn.Module, ModelCompressor, dict[str, Tensor]]:
    """Its own library's compression of the linear layers, and what the library decompresses again."""
    model = _float_model(1)
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups))
    for layer in (model.fc1, model.fc2):
        layer.weight_scale.data.copy_(_amax(layer.weight.detach()) / 127)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    back = copy.deepcopy(model)
    compressor.decompress_model(back)
    return model, compressor, {f"{name}.weight": back.get_submodule(name).weight.detach() for name in ("fc1", "fc2")}


def _compressed_folder(folder: Path) -> Path:
    model, compressor, _ = _compressed()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    compressor.update_config(str(folder))
    return folder


def _decompressed(folder: Path) -> dict[str, Tensor]:
    """As transformers loads such a folder: the configuration makes the modules, the file fills them."""
    model = make_float()
    config = QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    compressor.decompress_model(model)
    return {key: value.detach() for key, value in model.state_dict().items() if key in float_state()}


# --- all --------------------------------------------------------------------------------------------------------------

_LEARNED = partial(test_brevitas.prepare, build=test_brevitas.CONFIGS["learned per channel"])

ROWS = (
    _live("torch.ao eager", "torch_ao", by_flow("eager-x86")),
    _live("torch.ao FX", "fx", by_flow("fx-x86")),
    _live("torchao PT2E", "pt2e", by_flow("pt2e-x86")),
    _live("torchao QATConfig", "torchao", partial(_calibrated, _learning)),
    _integer("torch.ao eager, converted", "converted", partial(_converted, flow="eager-x86"), _of_modules),
    _integer("torch.ao FX, converted", "converted", partial(_converted, flow="fx-x86"), _of_modules),
    _integer("torchao PT2E, converted", "pt2e", partial(_converted, flow="pt2e-x86"), _of_graph, _zeroed),
    _integer("torchao tensors, converted", "torchao", _converted_torchao, _of_tensors),
    _live("NVIDIA ModelOpt", "modelopt", test_modelopt.prepare, test_modelopt.mto.save),
    _plain("pytorch-quantization, Super-Gradients", "pytorch_quantization", _pytorch_quantization),
    _live("Brevitas", "brevitas", _LEARNED),
    _plain("AIMET", "aimet", _aimet),
    _live("NNCF", "nncf", test_nncf.prepare),
    _live("SparseML", "sparseml", partial(_calibrated, _wrapped)),
    Row(
        "compressed-tensors",
        ("compressed_tensors", "converted"),
        _compressed_folder,
        dequantized=lambda: _compressed()[2],
        converts=("compressed-tensors", _decompressed),
    ),
)
