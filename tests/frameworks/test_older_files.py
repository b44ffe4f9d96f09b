"""QAT files of older versions of torch under this one; `tests/fixtures/older_torch.py` says how they were made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import qat_compat as qc
from qat_compat.testing import scramble

FOLDER = Path(__file__).resolve().parents[1] / "fixtures"
FILES = sorted(path.name for path in FOLDER.glob("*.pt"))
REAL = "torch-1.13.1-eager.pt"


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("older_torch", FOLDER / "older_torch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


def content(name: str) -> dict[str, Any]:
    return torch.load(FOLDER / name, weights_only=True)


def fresh(name: str) -> nn.Module:
    model = MAKER.PREPARE[Path(name).stem.rpartition("-")[2]]()
    return scramble(model)


def test_all_files_are_here() -> None:
    assert FILES == ["layout-1.5-eager.pt", "layout-1.7-eager.pt", "torch-1.13.1-eager.pt", "torch-1.13.1-fx.pt"]


@pytest.mark.parametrize("name", FILES)
def test_it_resumes_and_computes_what_it_did(name: str) -> None:
    model, held = fresh(name), content(name)
    report = qc.load_checkpoint(model, FOLDER / name)
    assert (report.synthesized, report.derived) == (0, 0)
    real = content(REAL if name.startswith("layout") else name)["state_dict"]
    state = model.state_dict()
    for key, value in real.items():
        if key.endswith(".eps") and name.startswith("layout"):
            continue
        assert torch.equal(state[key], value), key
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(held["input"]), held["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_it_goes_back_to_float(name: str) -> None:
    like = MAKER.Net()
    back = qc.to_float(FOLDER / name, like=like)
    assert list(back) == list(like.state_dict())
    real = content(REAL if name.startswith("layout") else name)["state_dict"]
    assert torch.equal(back["bn2.weight"], real["conv2.bn.weight"])
    assert torch.equal(back["bn1.running_var"], real["conv1.bn.running_var"])
    assert torch.equal(back["fc.weight"], real["fc.weight"])


def test_torch_itself_takes_the_old_ranges_for_its_own() -> None:
    """Why this is looked at: torch finds every key, and computes something else."""
    model, held = fresh("layout-1.7-eager.pt"), content("layout-1.7-eager.pt")
    found = model.load_state_dict(held["state_dict"], strict=False)
    real = content(REAL)["state_dict"]
    key = "conv1.weight_fake_quant.activation_post_process.max_val"
    assert found.missing_keys or not torch.equal(model.state_dict()[key], real[key])
