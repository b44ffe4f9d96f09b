"""Float file onto a freshly prepared model: bit for bit what load -> prepare -> calibrate gives, for every flow x
architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flows import CELLS, FLOWS, Flow, cells, prepare_for
from torch import nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_same_state, assert_twin, native_calibration


@pytest.mark.parametrize(("flow", "name"), CELLS)
def test_twin(flow: str, name: str) -> None:
    arch = ARCHS[name]
    # FX registers a module that has two names under the first; that the second is the same, the float model knows
    options = {"float_model": arch.make()} if (flow, name) == ("fx-x86", "shared") else {}
    assert_twin(arch.make, prepare_for(flow, name), arch.state(), arch.batches(), **options)


@pytest.mark.parametrize(("flow", "name"), cells("eager-x86/plain", "fx-x86/residual", "torchao-static/transformer"))
def test_twin_from_a_training_checkpoint(flow: str, name: str, tmp_path: Path) -> None:
    """The same from what a trainer saves: nested, with a DDP prefix, beside the optimizer."""
    arch = ARCHS[name]
    state = arch.state()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": wrapped, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, tmp_path / "last.pth")
    assert_twin(arch.make, prepare_for(flow, name), state, arch.batches(), source=tmp_path / "last.pth")


@pytest.mark.parametrize(("flow", "name"), cells("eager-x86/bert", "pt2e-x86/bert"))
def test_twin_with_own_inputs(flow: str, name: str) -> None:
    arch = ARCHS[name]
    batches = [{"data": batch, "label": 1} for batch in arch.batches()]
    assert_twin(arch.make, prepare_for(flow, name), arch.state(), batches, inputs=lambda batch: ((), batch["data"]))


def test_twin_of_labelled_pairs() -> None:
    """A `(x, label)` batch is cut to what `forward` takes."""
    arch = ARCHS["plain"]
    batches = [(batch.numpy(), torch.zeros(3)) for batch in arch.batches()]
    assert_twin(arch.make, prepare_for("eager-x86", "plain"), arch.state(), batches)


@pytest.mark.parametrize("flow", ["torchao-int8-int4", "torchao-weight-only", "torchao-static", "torchao-learned"])
@pytest.mark.parametrize("name", ["transformer", "embedding"])
def test_twin_from_meta(flow: str, name: str) -> None:
    """A model without memory gets the file's tensors."""
    arch = ARCHS[name]

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return arch.build().train()

    twin = assert_twin(arch.make, prepare_for(flow, name), arch.state(), arch.batches(), make_target=on_meta)
    assert not any(tensor.is_meta for tensor in twin.loaded.state_dict().values())


@pytest.mark.parametrize(("flow", "name"), cells("eager-x86/crossed", "eager-x86/dynamic", "fx-x86/crossed"))
def test_twin_with_the_float_model_as_witness(flow: str, name: str) -> None:
    arch = ARCHS[name]
    assert_twin(arch.make, prepare_for(flow, name), arch.state(), arch.batches(), float_model=arch.make())


@pytest.mark.parametrize(
    "flow", [flow for flow in FLOWS.values() if flow.kind != "torchao"], ids=lambda flow: flow.name
)
def test_weight_quantizers_need_no_data(flow: Flow) -> None:
    """`calibration="defer"` fills weight quantizers as calibration would, and leaves the others for training."""
    name = "plain" if "plain" in flow.archs else flow.archs[-1]
    arch = ARCHS[name]
    prepare = prepare_for(flow.name, name)
    twin, loaded = (_prepared(arch.make, prepare, arch.state()) for _ in range(2))
    initial = copy.deepcopy(twin.state_dict())
    native_calibration(twin, arch.batches())
    qc.load_checkpoint(loaded, arch.state(), calibration="defer")
    calibrated = twin.state_dict()
    weights = _weight_quantizers(twin)
    assert weights or flow.name == "pt2e-embedding"  # its weights have observers, not quantizers
    expected = {
        key: calibrated[key] if key.rpartition(".")[0].removesuffix(".activation_post_process") in weights else value
        for key, value in initial.items()
    }
    if flow.name != "pt2e-embedding":
        assert_same_state(loaded.state_dict(), expected)


def _prepared(make: Callable[[], nn.Module], prepare: Callable[[nn.Module], nn.Module], state: object) -> nn.Module:
    model = make()
    model.load_state_dict(state)
    return prepare(model)


def _weight_quantizers(model: nn.Module) -> set[str]:
    """Names of quantizers that see no data: signed or of embeddings, in these flows."""
    return {
        name
        for name, module in model.named_modules()
        if hasattr(module, "fake_quant_enabled")
        and (module.dtype in (torch.qint8, torch.int8) or module.qscheme is torch.per_channel_affine_float_qparams)
    }
