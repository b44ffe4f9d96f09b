"""AIMET's JSON beside the weights, laid out as its specification says: the ranges go where the tensors are.

The package is not among those that the tests install; the oracle is its published formula, in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native import batches, float_state, make_float
from rows import by_flow
from table import scales
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerAxis
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import qat_compat as qc
from qat_compat.frameworks import describe_model
from qat_compat.plan import Drop, Synthesize
from qat_compat.testing import assert_same_state

LAYERS = ("conv1", "conv2", "fc1", "fc2")
VERSIONS = ("0.4.0", "0.6.1", "1.0.0", "2.0.0")
SCALE, OFFSET = 0.03125, -37  # of the activation at the output of fc1


def weight_scales() -> dict[str, list[float]]:
    """Wider than the weights, so that no one could have taken them from those."""
    state = float_state()
    return {name: (state[f"{name}.weight"].abs().flatten(1).amax(1) * 1.5 / 127).tolist() for name in LAYERS}


def encoding(version: str, scale: list[float], offset: int, symmetric: bool, channels: bool) -> Any:
    if version == "2.0.0":
        dtype, zero = ("int8", 0) if symmetric else ("uint8", -offset)
        if not channels:
            return {"output_dtype": dtype, "y_scale": scale[0], **({"y_zero_point": zero} if zero else {})}
        return {"output_dtype": dtype, "y_scale": scale, "y_zero_point": [zero] * len(scale), "axis": 0}
    if version == "1.0.0":
        kind = "PER_CHANNEL" if channels else "PER_TENSOR"
        whole = {"bw": 8, "dtype": "INT", "enc_type": kind, "is_sym": symmetric}
        return {**whole, "scale": scale, "offset": [offset] * len(scale)}
    more = {"dtype": "int"} if version == "0.6.1" else {}
    about = {"bitwidth": 8, "is_symmetric": str(symmetric), "offset": offset, **more}
    return [{**about, "scale": s, "min": s * offset, "max": s * (255 + offset)} for s in scale]


def written(
    folder: Path, version: str, *, torch_names: bool = False, channels: bool = True, offset: int = -128
) -> Path:
    """A file of float weights, and the encodings beside it."""
    found = weight_scales()
    params = {
        f"{name}.weight": encoding(version, found[name] if channels else [max(found[name])], offset, True, channels)
        for name in LAYERS
    }
    activation = encoding("0.6.1" if torch_names else version, [SCALE], OFFSET, False, False)
    activations = {"fc1": {"output": {"0": activation[0]}}} if torch_names else {"/fc1/Gemm_output_0": activation}
    data: dict[str, Any] = {"version": version}
    if version == "2.0.0" and not torch_names:
        data["encodings"] = [{"name": name, **one} for name, one in (params | activations).items()]
    elif version == "1.0.0" and not torch_names:
        data["param_encodings"] = [{"name": name, **one} for name, one in params.items()]
        data["activation_encodings"] = [{"name": name, **one} for name, one in activations.items()]
    else:
        data |= {"param_encodings": params, "activation_encodings": activations}
    torch.save(float_state(), folder / "net.pth")
    (folder / ("net_torch.encodings" if torch_names else "net.encodings")).write_text(json.dumps(data))
    return folder / "net.pth"


def learning() -> nn.Module:
    """torchao's quantizers, which hold a scale and no range."""
    learned: Any = {"is_dynamic": False, "range_learning": True, "zero_point_precision": torch.float32}
    config = IntxFakeQuantizeConfig(torch.int8, PerAxis(0), is_symmetric=True, **learned)
    model = make_float().train()
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    return model


@pytest.mark.parametrize("version", VERSIONS)
def test_scales_go_to_the_weights_of_the_same_names(version: str, tmp_path: Path) -> None:
    path = written(tmp_path, version)
    opened = qc.open_checkpoint(path)
    assert (opened.framework, opened.stage, list(opened)) == ("aimet", "prepared", list(float_state()))
    model = learning()
    qc.load_checkpoint(model, path)
    assert {site: value.tolist() for site, value in scales(model).items()} == {
        f"weight:{name}": torch.tensor(weight_scales()[name]).tolist() for name in ("fc1", "fc2")
    }
    assert_same_state(dict(qc.to_float(path)), float_state())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("flow", ["eager-x86", "fx-x86"])
def test_ranges_go_to_the_quantizers_of_torch(version: str, flow: str, tmp_path: Path) -> None:
    model = by_flow(flow)(make_float(7), batches(seed=8))
    report = qc.load_checkpoint(model, written(tmp_path, version), calibration=batches())
    for quantizer in describe_model(model).quantizers:
        kind, _, host = quantizer.site.partition(":")
        if kind == "weight" and host.startswith("fc"):
            module: Any = quantizer.module
            expected = torch.tensor(weight_scales()[host])
            assert torch.equal(module.scale, expected), quantizer.site
            assert not module.zero_point.any()
    made_anew = {describe_model(model).schema[step.key].site for step in report.steps if isinstance(step, Synthesize)}
    assert not made_anew & {"weight:fc1", "weight:fc2"} and "output:fc1" in made_anew


def test_an_activation_goes_to_the_module_that_it_is_named_by(tmp_path: Path) -> None:
    low, high = SCALE * OFFSET, SCALE * (255 + OFFSET)
    for torch_names in (True, False):
        folder = tmp_path / str(torch_names)
        folder.mkdir()
        model = by_flow("eager-x86")(make_float(7), batches(seed=8))
        report = qc.load_checkpoint(model, written(folder, "0.6.1", torch_names=torch_names), calibration=batches())
        observer: Any = model.fc1.activation_post_process.activation_post_process
        taken = (float(observer.min_val), float(observer.max_val)) == (low, high)
        assert taken is torch_names
        listed = [step.key for step in report.steps if "/fc1/Gemm_output_0" in step.key]
        assert bool(listed) is not torch_names


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("offset", [-128, -37])
def test_a_value_is_what_the_formula_says(version: str, offset: int, tmp_path: Path) -> None:
    from qat_compat.conventions import CONVENTIONS
    from qat_compat.frameworks.aimet_encodings import grid_of, numbers

    symmetric = offset == -128
    found = numbers(encoding(version, [0.1, 0.3], offset, symmetric, channels=True))
    assert found is not None and not isinstance(found, str)
    grid, affine = grid_of(found)
    assert affine is not symmetric
    tensors = {"scale": torch.tensor(found.scale).double(), "offset": torch.tensor(found.offset)}
    scale, zero = CONVENTIONS["aimet.affine" if affine else "aimet.symmetric"].qparams(tensors, grid)
    levels = torch.arange(grid.low, grid.high + 1, dtype=torch.float64)[:, None]
    counted = torch.arange(256, dtype=torch.float64)[:, None]
    assert torch.equal((levels - zero) * scale, tensors["scale"] * (counted + offset))


MALFORMED: dict[str, tuple[Any, str]] = {
    "no scale": ([{"bitwidth": 8, "is_symmetric": "True", "offset": -128}], "it has no scale"),
    "text": ([{"bitwidth": 8, "is_symmetric": "True", "offset": -128, "scale": "wide"}], "it is malformed"),
    "nan": ([{"bitwidth": 8, "is_symmetric": "True", "offset": -128, "scale": float("nan")}], "not finite"),
    "offset": ([{"bitwidth": 8, "is_symmetric": "False", "offset": 11, "scale": 0.1}], "not on the grid"),
    "lpbq": ({"enc_type": "LPBQ", "bw": 8, "is_sym": True, "scale": [1.0], "offset": [0]}, "LPBQ"),
    "quantized scale": ({"output_dtype": "int4", "y_scale": {"x": [1], "x_scale": 1.0}}, "quantized itself"),
    "float8": ({"output_dtype": "float8e4m3fn", "y_scale": 1.0}, "not of integers"),
    "columns": ({"output_dtype": "int4", "y_scale": [[1.0], [1.0]], "axis": 0, "block_size": 32}, "along the rows"),
    "nothing": ([], "it is no encoding"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_not_read_is_named(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, "0.6.1")
    raw, reason = MALFORMED[name]
    data = json.loads((tmp_path / "net.encodings").read_text())
    data["param_encodings"]["fc1.weight"] = raw
    (tmp_path / "net.encodings").write_text(json.dumps(data))
    model = learning()
    report = qc.load_checkpoint(model, path)
    (note,) = [note for note in report.warnings if "not read" in note]
    assert note.startswith("of net.encodings, 1 encodings are not read: fc1.weight (") and reason in note
    found, expected = scales(model), torch.tensor(weight_scales()["fc2"])
    assert torch.equal(found["weight:fc2"], expected) and not torch.equal(
        found["weight:fc1"], torch.tensor(weight_scales()["fc1"])
    )


def test_names_that_are_no_tensors_are_listed(tmp_path: Path) -> None:
    path = written(tmp_path, "2.0.0")
    data = json.loads((tmp_path / "net.encodings").read_text())
    data["encodings"] += [{"name": "gone.weight", "output_dtype": "int8", "y_scale": 0.5}]
    (tmp_path / "net.encodings").write_text(json.dumps(data))
    report = qc.load_checkpoint(learning(), path)
    dropped = [step.key for step in report.steps if isinstance(step, Drop)]
    assert {"gone.weight.aimet_encoding.scale", "/fc1/Gemm_output_0.aimet_encoding.scale"} <= set(dropped)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "0.6.1"}'])
def test_a_file_that_is_no_encodings_is_passed_over(text: str, tmp_path: Path) -> None:
    torch.save(float_state(), tmp_path / "net.pth")
    (tmp_path / "net.encodings").write_text(text)
    opened = qc.open_checkpoint(tmp_path / "net.pth")
    assert (opened.framework, opened.stage) == ("plain", "float")
    assert ["net.encodings beside the weights is passed over" in note for note in opened.notes] == [True]


def test_files_of_others_and_of_other_names_are_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "0.6.1")
    trained = by_flow("eager-x86")(make_float(), batches())
    torch.save(trained.state_dict(), path)
    assert qc.open_checkpoint(path).framework == "torch_ao"
    assert_same_state(dict(qc.open_checkpoint(path)), dict(trained.state_dict()))
    torch.save(float_state(), tmp_path / "other.pth")
    assert qc.open_checkpoint(tmp_path / "other.pth").framework == "plain"


def test_what_is_saved_again_keeps_them(tmp_path: Path) -> None:
    path = written(tmp_path, "1.0.0")
    (tmp_path / "again").mkdir()
    again = qc.save_checkpoint(qc.open_checkpoint(path), tmp_path / "again" / "net.pt")
    one, two = learning(), learning()
    qc.load_checkpoint(one, path)
    qc.load_checkpoint(two, again)
    assert_same_state(one, two)
    assert set(torch.load(again, weights_only=True)) == set(float_state())


def test_floats_of_it_are_floats(tmp_path: Path) -> None:
    path = written(tmp_path, "1.0.0")
    one, two = learning(), learning()
    qc.load_checkpoint(one, qc.to_float(path))
    qc.load_checkpoint(two, float_state())
    assert_same_state(one, two)


def test_one_scale_does_not_fit_a_quantizer_of_many(tmp_path: Path) -> None:
    model = learning()
    report = qc.load_checkpoint(model, written(tmp_path, "0.6.1", channels=False))
    assert "another granularity" in str(report.to_json())
    assert not torch.equal(scales(model)["weight:fc1"], torch.full((32,), max(weight_scales()["fc1"])))
