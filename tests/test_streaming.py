"""Loading from files into live models: memory, ties, dtypes and ranges that are worked out while reading."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_apply import CASES, untouched
from test_apply import prepared as prepared_for
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    prepare_qat,
)
from zoo import ARCHS

import qat_compat as qc
from qat_compat.frameworks import Needs, describe_model
from qat_compat.testing import assert_same_state

LARGE = 1100  # a Linear of this size is more than one block


def network() -> nn.Sequential:
    convolution = nn.Conv2d(3, 8, 3)
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.Linear(LARGE, LARGE), nn.Linear(4, 4, bias=False))


def source(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    model = network()
    return model.to(dtype)


@pytest.fixture(params=["safetensors", "pt", "own.safetensors"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    state = source().state_dict()
    path = tmp_path / f"model.{request.param}"
    if request.param == "pt":
        torch.save(state, path)
    elif request.param == "safetensors":
        save_file(state, path)
    else:
        qc.save_checkpoint(state, path)
    return path


def same(model: nn.Module, state: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_load_gives_the_values_of_the_file(path: Path, inplace: bool) -> None:
    model = network()
    memory = {key: value.data_ptr() for key, value in model.named_parameters()}
    objects = dict(model.named_parameters())
    qc.load_checkpoint(model, path, inplace=inplace)
    same(model, source().state_dict())
    assert all(objects[key] is value and value.requires_grad for key, value in model.named_parameters())
    assert inplace == ({key: value.data_ptr() for key, value in model.named_parameters()} == memory)


def test_a_meta_model_is_filled(path: Path) -> None:
    with torch.device("meta"):
        model = network()
    qc.load_checkpoint(model, path)
    same(model, source().state_dict())


def test_another_layout_in_memory_stays(path: Path) -> None:
    model = network().to(memory_format=torch.channels_last)
    qc.load_checkpoint(model, path)
    same(model, source().state_dict())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_each_tensor_has_a_storage_of_its_own(path: Path, tmp_path: Path) -> None:
    """Fresh memory is shared between tensors; what is saved, moved or shared must not be."""
    model = network()
    qc.load_checkpoint(model, path)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    torch.save(model[0].weight, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 8 * model[0].weight.nbytes + 4096
    weight = model[2].weight
    weight.share_memory_()
    assert weight.is_shared()
    del model
    assert torch.equal(weight, source()[2].weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_narrower_file_is_widened(tmp_path: Path, inplace: bool) -> None:
    state = source(torch.bfloat16).state_dict()
    save_file(state, tmp_path / "half.safetensors")
    model = network()
    report = qc.load_checkpoint(model, tmp_path / "half.safetensors", inplace=inplace)
    assert not report.losses
    same(model, {key: value.to(model.state_dict()[key].dtype) for key, value in state.items()})


def test_a_wider_file_is_rounded_and_said(path: Path) -> None:
    model = network().half()
    report = qc.load_checkpoint(model, path)
    assert "rounded from float32 to float16" in report.losses["2.weight"]
    same(model, source().half().state_dict())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_damaged_file_leaves_the_model_alone(tmp_path: Path, inplace: bool) -> None:
    path = qc.save_checkpoint(source(), tmp_path / "own.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 8
    path.write_bytes(data)
    model = network()
    with untouched(model), pytest.raises(qc.CheckpointError, match="checksum"):
        qc.load_checkpoint(model, path, inplace=inplace)


def test_tied_names_are_read_once_and_must_agree(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    save_file({"0.weight": weight, "1.weight": weight.clone()}, tmp_path / "agree.safetensors")
    model = tied()
    qc.load_checkpoint(model, tmp_path / "agree.safetensors")
    assert torch.equal(model[1].weight, weight)
    assert model[0].weight is model[1].weight
    save_file({"0.weight": weight, "1.weight": weight + 1}, tmp_path / "differ.safetensors")
    with untouched(model), pytest.raises(qc.PlanError, match="differ, and the model ties"):
        qc.load_checkpoint(model, tmp_path / "differ.safetensors")


def prepared(dtype: torch.dtype, observer: type) -> nn.Module:
    scheme = torch.per_channel_symmetric if "Channel" in observer.__name__ else torch.per_tensor_symmetric
    weight = FakeQuantize.with_args(observer=observer, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=scheme)
    model = network().to(dtype)
    model.qconfig = QConfig(activation=nn.Identity, weight=weight)
    return prepare_qat(model.train())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("observer", [MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_ranges_of_weights_are_those_of_the_native_observer(
    tmp_path: Path, inplace: bool, observer: type, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    kept, used = dtypes
    state = source(kept).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    model, native = prepared(used, observer), prepared(used, observer)
    qc.load_checkpoint(model, tmp_path / "model.safetensors", inplace=inplace)
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            parameter.copy_(state[name])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            native[1].get_buffer(name).copy_(state[f"1.{name}"])
        for layer in (native[0], native[2], native[3]):
            quantizer = layer.weight_fake_quant
            quantizer.activation_post_process(layer.weight)
            scale, zero_point = quantizer.calculate_qparams()
            quantizer.scale.resize_(scale.shape).copy_(scale)
            quantizer.zero_point.resize_(zero_point.shape).copy_(zero_point)
    same(model, dict(native.state_dict()))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("flow", "name"), CASES)
def test_a_weight_is_looked_at_while_it_is_read_and_not_again(
    flow: str, name: str, inplace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data, too, where a quantizer leaves the weight as it is: its range is the same in every batch."""
    arch, model, path = ARCHS[name], prepared_for(flow, name), tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in arch.state().items()}, path)
    expected = prepared_for(flow, name)
    qc.load_checkpoint(expected, arch.state(), calibration=arch.batches())
    weights = [q for q in describe_model(model).quantizers if q.needs is Needs.WEIGHTS]
    assert all(q.needs_no_forward() for q in weights) is not flow.startswith("torchao")
    looks = []
    for quantizer in weights:
        monkeypatch.setattr(type(quantizer), "observe", lambda *_: pytest.fail("a weight was looked at again"))
        quantizer.module.register_forward_pre_hook(
            lambda module, _: looks.append(module) if bool(getattr(module, "observer_enabled", 0)) else None
        )
    qc.load_checkpoint(model, path, calibration=arch.batches(), inplace=inplace)
    assert not looks
    assert_same_state(model, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no call for it")
def test_no_page_of_a_mapped_tensor_is_waited_for_later(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2048, 2048)}, path)
    model = nn.Linear(2048, 2048, bias=False)
    qc.load_checkpoint(model, path, mmap=True)
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    mine = [int(re.search(r"Rss: +(\d+) kB", one)[1]) for one in mappings if str(path) in one]
    assert max(mine) >= 16 << 10  # it is there, though nobody has touched it
