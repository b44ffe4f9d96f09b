"""A `config.json` beside the weights: what it says of their quantization is known, and it is never needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import save_file
from torch import nn

import qat_compat as qc

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "channels": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "blocks": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}),
}


def write(folder: Path, scheme: str, *, compress: bool) -> dict[str, Any]:
    """A model folder as compressed-tensors itself writes it; returns its `quantization_config`."""
    layout, args = SCHEMES[scheme]
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    group = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=layout)
    config = QuantizationConfig(config_groups={"all": group}, quantization_status="frozen", format=layout)
    apply_quantization_config(model, config)
    for layer in model:
        layer.weight_scale.data.fill_(0.01)
    compressor = ModelCompressor.from_pretrained_model(model, layout)
    if compress:
        compressor.compress_model(model)
    (folder / "config.json").write_text("{}")
    # the zero points of symmetric schemes are all 0, and are left out when a model is compressed
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("zero_point")}
    save_file(state, folder / "model.safetensors")
    compressor.update_config(folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("compress", [False, True], ids=["frozen", "compressed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_folder_file_and_index(tmp_path: Path, scheme: str, compress: bool) -> None:
    expected = write(tmp_path, scheme, compress=compress)
    keys = list(qc.open_checkpoint(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "model.safetensors")}))
    for source in (tmp_path, tmp_path / "model.safetensors", index):
        found = qc.open_checkpoint(source)
        assert found.metadata["quantization_config"] == expected
        assert (found.framework, found.stage) == ("compressed_tensors", "converted" if compress else "prepared")


def test_it_tells_what_shapes_cannot(tmp_path: Path) -> None:
    """A scale for each block of a float weight could be a tensor of the model's own."""
    write(tmp_path, "blocks", compress=False)
    (tmp_path / "config.json").unlink()
    assert qc.open_checkpoint(tmp_path).framework == "plain"
    write(tmp_path, "blocks", compress=False)
    found = qc.to_float(tmp_path)
    assert list(found) == ["0.bias", "0.weight", "1.bias", "1.weight"]


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("", "the file is empty"), ("\xff", "not valid JSON")],
    ids=["cut short", "nested", "empty", "not text"],
)
def test_a_bad_one_is_passed_over(tmp_path: Path, text: str, word: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="latin1")
    (note,) = qc.open_checkpoint(tmp_path).notes
    assert note.startswith("config.json beside the weights is passed over") and word in note


@pytest.mark.parametrize("text", ['{"hidden_size": 4}', "[1]", '{"quantization_config": null}'])
def test_one_of_a_float_model_says_nothing(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    found = qc.open_checkpoint(tmp_path)
    assert (found.metadata, found.notes) == ({}, ())


def test_a_pipe_and_a_link_out_of_the_folder_are_passed_over(tmp_path: Path) -> None:
    folder, path = tmp_path / "model", tmp_path / "model" / "config.json"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    os.mkfifo(path)
    assert "not a regular file" in qc.open_checkpoint(folder).notes[0]
    path.unlink()
    (tmp_path / "other.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    path.symlink_to(tmp_path / "other.json")
    found = qc.open_checkpoint(folder)
    assert "outside its folder" in found.notes[0] and found.metadata == {}


def test_the_cache_of_hugging_face_links_it_to_a_blob(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    expected = write(blobs, "channels", compress=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert qc.open_checkpoint(snapshot).metadata["quantization_config"] == expected
