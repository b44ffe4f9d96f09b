"""How far from float to integer a source is: read off its keys, off the module, or off what was written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flows import prepare_for
from torch import nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.storage import save

SUFFIXES = pytest.mark.parametrize("suffix", ["pt", "safetensors"])


def dynamic() -> nn.Module:
    """Prepared by torchao's default configuration: its quantizers have no state, and its keys are the float model's."""
    return prepare_for("torchao-int8-int4", "transformer")(ARCHS["transformer"].make())


@SUFFIXES
def test_dynamic_quantizers_are_known_where_the_module_was_seen(tmp_path: Path, suffix: str) -> None:
    model = dynamic()
    assert list(model.state_dict()) == list(ARCHS["transformer"].make().state_dict())
    opened = qc.open_checkpoint(model)
    assert (opened.framework, opened.stage) == ("torchao", "prepared")
    for obj in (model, opened):
        found = qc.open_checkpoint(qc.save_checkpoint(obj, tmp_path / f"f.{suffix}"))
        assert (found.framework, found.stage) == ("torchao", "prepared")
    assert (opened.framework, opened.stage) == ("torchao", "prepared")  # saving it has not changed it


def test_dynamic_quantizers_leave_no_trace_in_a_bare_state_dict(tmp_path: Path) -> None:
    state = dynamic().state_dict()
    torch.save(state, tmp_path / "f.pt")
    for source in (state, tmp_path / "f.pt"):
        found = qc.open_checkpoint(source)
        assert (found.framework, found.stage) == ("plain", "float")


def test_a_saved_dynamic_model_goes_back_to_float_and_on(tmp_path: Path) -> None:
    model = dynamic()
    path = qc.save_checkpoint(model, tmp_path / "f.pt")
    for target in (dynamic(), ARCHS["transformer"].make()):
        assert qc.load_checkpoint(target, path).synthesized == 0
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in target.state_dict().items())
    assert qc.to_float(path).stage == "float"


@SUFFIXES
def test_folded_is_what_the_record_says(tmp_path: Path, suffix: str) -> None:
    path = save({"fc.weight": torch.ones(2, 2)}, tmp_path / f"f.{suffix}", record={"stage": "folded"})
    opened = qc.open_checkpoint(path)
    assert opened.stage == "folded"
    assert qc.open_checkpoint(qc.save_checkpoint(opened, tmp_path / f"again.{suffix}")).stage == "folded"


def test_a_stage_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    path = save({"fc.weight": torch.ones(2, 2)}, tmp_path / "f.pt", record={"stage": "fused"})
    with pytest.raises(qc.CheckpointError, match="stage") as caught:
        qc.open_checkpoint(path)
    assert (caught.value.file, caught.value.found) == (str(path), "'fused'")
    assert caught.value.expected == "float, folded, prepared, converted"


def test_keys_that_no_float_model_has_outweigh_a_record_of_a_float_one(tmp_path: Path) -> None:
    state = {"fc.weight": torch.ones(2, 2), "fc.weight_fake_quant.scale": torch.ones(1)}
    path = save(state, tmp_path / "f.pt", record={"framework": "plain", "stage": "float"})
    found = qc.open_checkpoint(path)
    assert (found.framework, found.stage) == ("torch_ao", "prepared")
