"""safetensors files; the oracle is the format's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_torch_zip import DTYPES, same

from qat_compat.errors import CheckpointError, LimitError
from qat_compat.storage import open_source, save


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {}
    for dtype in set(DTYPES) - {torch.complex128}:
        raw = torch.arange(32, dtype=torch.uint8) % 2 if dtype is torch.bool else torch.arange(32, dtype=torch.uint8)
        tensors[str(dtype)] = raw.view(dtype)
    tensors["packed"] = torch.arange(8, dtype=torch.uint8).view(2, 4).view(torch.float4_e2m1fn_x2)
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "file")
    checkpoint = open_source(tmp_path / "file")
    assert set(checkpoint) == set(tensors)
    for key, expected in load_file(tmp_path / "file").items():
        assert checkpoint.spec(key) == (tuple(expected.shape), expected.dtype)
        assert same(checkpoint[key], expected), key


def test_every_dtype_is_written_as_the_format_says(tmp_path: Path) -> None:
    tensors = {
        "b": torch.tensor([True]),
        "w": torch.randn(3, 2),
        "h": torch.ones(3).bfloat16(),
        "d": torch.ones(1).double(),
    }
    save(tensors, tmp_path / "ours.safetensors")
    found = load_file(tmp_path / "ours.safetensors")
    assert all(same(found[key], value) for key, value in tensors.items())
    assert list(open_source(tmp_path / "ours.safetensors")) == list(tensors)


def test_metadata_is_decoded(tmp_path: Path) -> None:
    about = {"format": "pt", "step": "7", "names": '["w"]', "of": '{"w": 1}', "tensor_names": "none", "odd": "{"}
    save_file({"w": torch.ones(1)}, tmp_path / "f.safetensors", metadata=about)
    found = open_source(tmp_path / "f.safetensors").metadata
    assert found == {"step": "7", "names": ["w"], "of": {"w": 1}, "tensor_names": "none", "odd": "{"}


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write(path: Path, header: dict[str, Any] | str, data: int) -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


MALFORMED = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap", "b"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "hole", "b"),
    "hole at the start": ({"a": entry(4, 8)}, 8, "hole", "a"),
    "trailing bytes": ({"a": entry(0, 4)}, 5, "after the last tensor", None),
    "beyond the end": ({"a": entry(0, 8)}, 4, "beyond the end", "a"),
    "overflow": ({"a": entry(0, 8, [2**62, 2**62, 4])}, 8, "length does not fit", "a"),
    "too large a number": ({"a": entry(0, 8, [2**64])}, 8, "malformed", "a"),
    "negative": ({"a": entry(0, 8, [-8])}, 8, "malformed", "a"),
    "backwards": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, 4, "length does not fit", "a"),
    "fraction": ({"a": entry(0, 8, [8.0])}, 8, "malformed", "a"),
    "unknown dtype": ({"a": entry(0, 8, dtype="F9")}, 8, "unknown dtype", "a"),
    "missing field": ({"a": {"dtype": "U8", "shape": [8]}}, 8, "malformed", "a"),
    "not an object": ("[1]", 0, "not a checkpoint", None),
    "bad JSON": ('{"a": ', 0, "not valid JSON", None),
    "duplicate key": ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0, "twice", "a"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__", "__metadata__"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_headers(tmp_path: Path, name: str) -> None:
    header, data, message, key = MALFORMED[name]
    with pytest.raises(CheckpointError, match=message) as error:
        open_source(write(tmp_path / "f.safetensors", header, data))
    assert error.value.key == key
    assert error.value.file == str(tmp_path / "f.safetensors")
    assert error.value.remedy


def test_a_header_that_is_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes((1 << 20).to_bytes(8, "little") + b'{"a":{}}')
    with pytest.raises(CheckpointError, match="cut short"):
        open_source(tmp_path / "f")


def test_an_oversize_header(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes((1 << 38).to_bytes(8, "little") + b'{"a":{}}')
    with pytest.raises(LimitError, match="header is too long"):
        open_source(tmp_path / "f")


def test_a_header_of_many_levels(tmp_path: Path) -> None:
    deep = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
    with pytest.raises(LimitError, match="deep"):
        open_source(write(tmp_path / "f", deep, 0))


@pytest.mark.parametrize("name", [b"qat_compat.digest", b"qat_compat.digesu"])
def test_a_corrupt_header_of_our_own(tmp_path: Path, name: bytes) -> None:
    path = save({"w": torch.zeros(2, 3)}, tmp_path / "f.safetensors")
    data = path.read_bytes().replace(b"qat_compat.digest", name)
    path.write_bytes(data.replace(b'"shape":[2,3]', b'"shape":[3,2]'))
    with pytest.raises(CheckpointError, match="header differs from its checksum"):
        open_source(path)
