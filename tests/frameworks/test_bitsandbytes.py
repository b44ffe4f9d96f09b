"""bitsandbytes to float, against codes that are packed one by one and computed in float64.

The package is not installed here. Its `dequantize_4bit` and `int8_vectorwise_dequant` (0.50.2, on a CPU) gave the same
bits for weights of whole blocks of rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qat_compat as qc

BLOCK, NESTED = 64, 16  # the inner blocks are smaller than the package's 256, so that there are several


def layer(kind: str, dtype: torch.dtype, nested: bool, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """A state_dict of one weight, and the weight in float64."""
    torch.manual_seed(0)
    count = torch.Size(shape).numel()
    codes, table = torch.randint(0, 16, (count,)), torch.randn(16)
    blocks = -(-count // BLOCK)
    about: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "dtype": str(dtype)[6:], "shape": list(shape)}
    state = {"fc.weight.quant_map": table, "fc.weight": torch.zeros(-(-count // 2), 1, dtype=torch.uint8)}
    for index, code in enumerate(codes.tolist()):
        state["fc.weight"][index // 2, 0] |= code << (4 if index % 2 == 0 else 0)
    magnitude = torch.rand(blocks)
    exact = magnitude.double()
    if nested:
        inner, inner_table = torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.randn(256)
        inner_magnitude, offset = torch.rand(-(-blocks // NESTED)), 2.5
        exact = torch.stack(
            [inner_table.double()[int(c)] * inner_magnitude.double()[i // NESTED] + offset for i, c in enumerate(inner)]
        )
        state |= {"fc.weight.nested_absmax": inner_magnitude, "fc.weight.nested_quant_map": inner_table}
        about |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        magnitude = inner
    state["fc.weight.absmax"] = magnitude
    text = json.dumps(about).encode()
    state[f"fc.weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    values = [table.double()[code] * exact[index // BLOCK] for index, code in enumerate(codes.tolist())]
    return state, torch.stack(values).reshape(shape)


@pytest.mark.parametrize("shape", [(32, 64), (6, 33), (3, 5)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind: str, dtype: torch.dtype, nested: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    state, exact = layer(kind, dtype, nested, shape)
    state["fc.bias"] = torch.ones(shape[0])
    save_file(state, tmp_path / "model.safetensors")
    opened = qc.open_checkpoint(tmp_path / "model.safetensors")
    assert (opened.framework, opened.stage) == ("bitsandbytes", "converted")
    for source in (tmp_path / "model.safetensors", state):
        back = qc.to_float(source)
        assert set(back) == {"fc.weight", "fc.bias"} and back.spec("fc.weight") == (shape, dtype)
        steps = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(back["fc.weight"].double(), exact, rtol=steps, atol=1e-6 if nested else 0)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_are_stored_in_any_dtype(storage: torch.dtype) -> None:
    state, _ = layer("nf4", torch.float32, False, (32, 64))
    other = {**state, "fc.weight": state["fc.weight"].flatten().view(storage).unsqueeze(1)}
    assert torch.equal(qc.to_float(other)["fc.weight"], qc.to_float(state)["fc.weight"])


def test_eight_bits() -> None:
    torch.manual_seed(0)
    values, magnitude = torch.randint(-127, 128, (6, 32), dtype=torch.int8), torch.rand(6)
    state = {"fc.weight": values, "fc.SCB": magnitude, "fc.weight_format": torch.tensor(0, dtype=torch.uint8)}
    back = qc.to_float(state)
    assert list(back) == ["fc.weight"]
    exact = values.double() * magnitude.double()[:, None] / 127
    torch.testing.assert_close(back["fc.weight"].double(), exact, rtol=3 * 2**-23, atol=0)
    del state["fc.weight_format"]
    assert torch.equal(qc.to_float(state)["fc.weight"], back["fc.weight"])
    state["fc.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(qc.CheckpointError, match="do not fit together"):
        qc.to_float(state)["fc.weight"]


def test_what_does_not_fit_is_said() -> None:
    whole, _ = layer("nf4", torch.float32, True, (32, 64))
    state_key = "fc.weight.quant_state.bitsandbytes__nf4"

    def problem(changes: dict[str, Tensor | None]) -> str:
        state = {key: value for key, value in (whole | changes).items() if value is not None}
        with pytest.raises(qc.PlanError) as caught:
            qc.to_float(state)
        (found,) = caught.value.problems
        assert found.key == "fc.weight"
        return found.detail

    assert "its quant_state, which says its shape" in problem({state_key: None})
    assert "its quant_state, which says its shape" in problem({state_key: torch.zeros(9, dtype=torch.uint8)})
    assert "are not two to each" in problem({"fc.weight": whole["fc.weight"][:-1]})
    assert "not one number for each 64" in problem({"fc.weight.absmax": whole["fc.weight.absmax"][:-1]})
    assert "nested_quant_map" in problem({"fc.weight.nested_quant_map": None})
    with pytest.raises(qc.PlanError, match="not one number for each row"):
        qc.to_float({"fc.weight": torch.zeros(6, 4, dtype=torch.int8), "fc.SCB": torch.ones(5)})
