"""GPTQ and AWQ to float, against words that are packed value by value and computed in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qat_compat as qc

AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]  # the output at each place of a word


def words(values: Tensor, bits: int) -> Tensor:
    """(rows, columns) unsigned -> words along the columns, one by one."""
    per_word = 32 // bits
    rows, columns = values.shape
    made = torch.zeros(rows, columns // per_word, dtype=torch.int64)
    for row in range(rows):
        for column in range(columns):
            made[row, column // per_word] += int(values[row, column]) << (bits * (column % per_word))
    return torch.where(made >= 2**31, made - 2**32, made).to(torch.int32)


def layer(bits: int, inputs: int = 64, outputs: int = 32, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Values (in, out), zero points from 1 on and scales (groups, out)."""
    torch.manual_seed(bits)
    values = torch.randint(0, 1 << bits, (inputs, outputs))
    return values, torch.randint(1, 1 << bits, (groups, outputs)), torch.rand(groups, outputs).half()


def exact(values: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return ((values.double() - zeros.double()[groups]) * scales.double()[groups]).t()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("moved", [True, False])
def test_gptq(bits: int, form: str, moved: bool, tmp_path: Path) -> None:
    values, zeros, scales = layer(bits)
    groups = torch.randperm(64) % 2 if moved else torch.arange(64) // 32
    stored = zeros - int(form == "gptq")
    state = {
        "q.qweight": words(values.t(), bits).t().contiguous(),
        "q.qzeros": words(stored, bits),
        "q.scales": scales,
        "q.g_idx": groups.int(),
        "q.bias": torch.ones(32),
        "norm.weight": torch.ones(64),
    }
    folder = hugging_face(state, tmp_path, {"quant_method": "gptq", "bits": bits, "checkpoint_format": form})
    opened = qc.open_checkpoint(folder)
    assert (opened.framework, opened.stage) == ("gptq", "converted")
    back = qc.to_float(folder)
    assert set(back) == {"q.weight", "q.bias", "norm.weight"}
    assert back.spec("q.weight") == ((32, 64), torch.float16)
    assert torch.equal(back["q.weight"], exact(values, zeros, scales, groups).half())
    with pytest.raises(qc.PlanError, match="whether its zero points are stored less 1"):
        qc.to_float(state)
    if not moved:
        del state["q.g_idx"]
        hugging_face(state, tmp_path, {"quant_method": "gptq", "bits": bits, "checkpoint_format": form})
        assert torch.equal(qc.to_float(tmp_path)["q.weight"], back["q.weight"])


def test_awq(tmp_path: Path) -> None:
    values, zeros, scales = layer(4)
    mixed = [8 * word + place for word in range(4) for place in AWQ_PLACES]
    state = {"q.qweight": words(values[:, mixed], 4), "q.qzeros": words(zeros[:, mixed], 4), "q.scales": scales}
    back = qc.to_float(hugging_face(state, tmp_path, {"quant_method": "awq", "bits": 4}))
    assert torch.equal(back["q.weight"], exact(values, zeros, scales, torch.arange(64) // 32).half())
    assert torch.equal(qc.to_float(state)["q.weight"], back["q.weight"])


def hugging_face(state: dict[str, Tensor], folder: Path, config: dict[str, Any]) -> Path:
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_what_is_neither_is_said() -> None:
    values, zeros, scales = layer(4)
    state = {"a.qweight": words(values.t(), 4).t(), "a.qzeros": words(zeros, 4), "a.scales": scales[:, :30]}
    state |= {"b.qweight": state["a.qweight"], "b.qzeros": state["a.qzeros"]}
    with pytest.raises(qc.PlanError) as caught:
        qc.to_float(state)
    details = {problem.key: problem.detail for problem in caught.value.problems}
    assert "neither GPTQ of 2, 4, 8 bits nor AWQ" in details["a.weight"]
    assert "qzeros or scales are missing" in details["b.weight"]
