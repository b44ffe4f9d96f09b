"""Scale and zero point, by the table, against what each package's own quantizer makes of numbers, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import test_brevitas
import test_modelopt
import test_nncf
import torch
from native import Encoding, NativePrepare, batches, encoding_of, float_state, native
from torch import Tensor, nn

from qat_compat.conventions import CONVENTIONS, Grid
from qat_compat.frameworks import describe_model

FLOWS: dict[str, tuple[NativePrepare, set[str]]] = {
    "modelopt int8": (test_modelopt.prepare, {"modelopt.int"}),
    "modelopt int4 blocks": (partial(test_modelopt.prepare, config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), {"modelopt.int"}),
    "modelopt fp8": (partial(test_modelopt.prepare, config="FP8_DEFAULT_CFG"), {"modelopt.e4m3"}),
    **{
        f"brevitas {name}": (partial(test_brevitas.prepare, build=test_brevitas.CONFIGS[name]), {"brevitas.int", row})
        for name, row in {
            "default": "brevitas.int",
            "learned per channel": "brevitas.int",
            "four bits": "brevitas.int",
            "affine": "brevitas.shifted",
            "power of two": "brevitas.log2",
            "learned logarithms": "brevitas.log",
        }.items()
    },
    "nncf": (test_nncf.prepare, {"nncf.symmetric"}),
    "nncf mixed": (partial(test_nncf.prepare, config="mixed"), {"nncf.symmetric", "nncf.asymmetric"}),
}


def rounded(value: Tensor, encoding: Encoding) -> Tensor:
    """Quantized and dequantized, as scale and zero point mean it."""
    scale, zero_point = encoding.qparams()
    if encoding.convention == "modelopt.e4m3":
        return (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(value.dtype) * scale
    level = ((value / scale).round() + zero_point).clamp(encoding.grid.low, encoding.grid.high)
    return (level - zero_point) * scale


@pytest.mark.parametrize("flow", FLOWS)
def test_the_table_says_what_the_package_does(flow: str) -> None:
    prepare, rows = FLOWS[flow]
    model = native(prepare, float_state(), batches()).eval().double()
    seen: set[str] = set()
    for quantizer in describe_model(model).quantizers:
        encoding = encoding_of(quantizer)
        if encoding is None:
            continue
        seen.add(encoding.convention)
        assert set(encoding.tensors) == set(CONVENTIONS[encoding.convention].tensors)
        value, blocks = _example(model, quantizer.site, quantizer.module, encoding)
        with torch.no_grad():
            out = quantizer.module(value)
        out = getattr(out, "value", out)
        mine = rounded(value.reshape(blocks), encoding).reshape(value.shape)
        scale = float(encoding.qparams()[0].max())
        # ModelOpt works in float32, whatever it is given: there a value half-way between two levels may go either way
        single = flow.startswith("modelopt")
        wrong = (out - mine).abs() > (1e-5 * scale + 1e-6 * mine.abs() if single else 1e-9 * scale)
        assert float(wrong.double().mean()) <= (1e-3 if single else 0), quantizer
    assert seen == rows


def _example(model: nn.Module, site: str, module: nn.Module, encoding: Encoding) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor that the quantizer can be shown, with values beyond its range, and the shape of its blocks."""
    kind, _, host = site.partition(":")
    value = (
        model.get_submodule(host).weight.detach() * 1.5 if kind == "weight" else torch.randn(3, 16, dtype=torch.float64)
    )
    blocks = getattr(module, "_block_reshape_size", None)
    if blocks is not None:
        padded = torch.nn.functional.pad(value, getattr(module, "_padding", (0, 0)))
        assert padded.numel() >= value.numel()
        rows = encoding.tensors["_amax"].shape[0]
        return value, (rows, value.numel() // rows)
    return value, tuple(value.shape)


def test_nvfp4() -> None:
    """Two levels of scales, against ModelOpt's own packed tensor."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    weight = torch.randn(8, 64) * torch.logspace(-3, 1, 8)[:, None]
    packed, first, second = qtensor.quantize(weight.clone(), 16)
    assert packed is not None
    blocks = weight.reshape(8, 4, 16).abs().amax(-1)
    tensors = {"_amax": blocks.double(), "_global_amax": weight.abs().max().double()}
    scale, _ = CONVENTIONS["modelopt.nvfp4"].qparams(tensors, Grid(4))
    torch.testing.assert_close(scale, first.double() * second.double(), rtol=1e-6, atol=0)
    back = packed.dequantize(dtype=torch.float32, scale=first, double_scale=second, block_sizes={-1: 16}).reshape(
        8, 4, 16
    )
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    on_grid = (back.double() / scale[..., None]).abs()
    assert bool(((on_grid[..., None] - levels).abs().amin(-1) < 1e-5).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_grids_are_those_of_brevitas(bits: int, signed: bool) -> None:
    functions = pytest.importorskip("brevitas.function.ops")
    width = torch.tensor(float(bits))
    for narrow in (True, False) if signed else (False,):
        grid = Grid(bits, signed, narrow)
        assert grid.low == int(functions.min_int(signed, narrow, width))
        assert grid.high == int(functions.max_int(signed, narrow, width))
