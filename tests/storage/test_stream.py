"""Bytes go from the file straight into their targets, whatever the sizes, gaps, dtypes and number of files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import qat_compat as qc
from qat_compat.storage import Read, open_source, read_all
from qat_compat.storage.extent import Extent
from qat_compat.storage.mapped import MappedFile

MIB = 1 << 20


def content(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    path = tmp_path_factory.mktemp("stream") / "large"
    data = content(21 * MIB)
    path.write_bytes(data.numpy().tobytes())
    return path, data


SIZES = st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 3 * MIB) | st.integers(0, 64)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.randoms(use_true_random=False))
def test_any_layout_arrives(large: tuple[Path, Tensor], layout: list[tuple[int, int]], shuffler: random.Random) -> None:
    """Tensors with gaps before them, read in any order; small ones share calls, large ones are cut."""
    path, data = large
    file = MappedFile(path)
    reads, expected, position = [], [], 0
    for gap, size in layout:
        position += gap
        target = torch.zeros(size, dtype=torch.uint8)
        reads.append(Read(Extent(file, position, size), torch.uint8, target))
        expected.append(data[position : position + size])
        position += size
    order = list(reads)
    shuffler.shuffle(order)
    read_all(order)
    assert all(torch.equal(read.target, part) for read, part in zip(reads, expected, strict=True))


def test_one_tensor_of_many_blocks_and_two_over_the_same_bytes(large: tuple[Path, Tensor]) -> None:
    path, data = large
    file = MappedFile(path)
    whole, again = torch.zeros(20 * MIB, dtype=torch.uint8), torch.zeros(5 * MIB, dtype=torch.uint8)
    read_all([Read(Extent(file, 7, 20 * MIB), torch.uint8, whole), Read(Extent(file, 9, 5 * MIB), torch.uint8, again)])
    assert torch.equal(whole, data[7 : 7 + 20 * MIB])
    assert torch.equal(again, data[9 : 9 + 5 * MIB])


def test_more_small_tensors_than_one_call_takes(large: tuple[Path, Tensor]) -> None:
    path, data = large
    file = MappedFile(path)
    reads = [Read(Extent(file, 3 * i, 3), torch.uint8, torch.zeros(3, dtype=torch.uint8)) for i in range(5000)]
    read_all(reads)
    assert torch.equal(torch.cat([read.target for read in reads]), data[:15000])


@pytest.mark.parametrize("shape", [(), (3,), (700, 1000), (2, MIB)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_dtype_is_made_on_the_way(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = tmp_path / "narrow"
    path.write_bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    target = torch.zeros(shape, dtype=dtype)
    seen: list[tuple[int, int]] = []
    extent = Extent(MappedFile(path), 0, value.nbytes)
    rows = target.view(-1) if target.dim() == 0 else target

    def each(first: int, end: int) -> None:
        assert torch.equal(rows[first:end], value.view(rows.shape)[first:end].to(dtype))  # they are there by now
        seen.append((first, end))

    read_all([Read(extent, torch.bfloat16, target, each)])
    assert torch.equal(target, value.to(dtype))
    assert [row for first, end in sorted(seen) for row in range(first, end)] == list(range(len(rows)))


def test_a_file_that_ends_early_or_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    file = MappedFile(path)
    with pytest.raises(qc.CheckpointError, match="cut short"):
        file.read_into(90, [memoryview(bytearray(20))])
    os.truncate(path, 50)
    with pytest.raises(qc.CheckpointError, match="changed while it was open"):
        read_all([Read(Extent(file, 0, 20), torch.uint8, torch.zeros(20, dtype=torch.uint8))])


def test_a_checksum_is_compared_before_anything_is_written(tmp_path: Path) -> None:
    path = qc.save_checkpoint({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "own.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checkpoint = open_source(path)
    targets = {key: torch.zeros(4) for key in checkpoint}
    reads = [Read(checkpoint.extent(key), torch.float32, target) for key, target in targets.items()]
    with pytest.raises(qc.CheckpointError, match="checksum") as caught:
        read_all(reads)
    assert caught.value.key in targets
    assert not any(target.any() for target in targets.values())


def values() -> dict[str, Tensor]:
    made = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return {"a": made, "b": made.bfloat16(), "c": torch.tensor(3), "none": torch.zeros(0, 2), "d": made[0].half()}


@pytest.mark.parametrize("kind", ["safetensors", "own safetensors", "sharded", "torch", "own torch", "dcp"])
def test_every_container_says_where_its_bytes_are(tmp_path: Path, kind: str) -> None:
    tensors = values()
    path = tmp_path / "model.safetensors"
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "sharded":
        save_file({"a": tensors["a"]}, tmp_path / "1.safetensors")
        save_file({key: value for key, value in tensors.items() if key != "a"}, tmp_path / "2.safetensors")
        weight_map = {key: "1.safetensors" if key == "a" else "2.safetensors" for key in tensors}
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
    elif kind == "torch":
        path = tmp_path / "model.pt"
        torch.save(tensors, path)
    elif kind == "dcp":
        path = tmp_path / "dcp"
        dcp.save(tensors, checkpoint_id=path)
    else:
        path = qc.save_checkpoint(tensors, tmp_path / ("own.pt" if kind == "own torch" else "own.safetensors"))
    checkpoint = open_source(path)
    targets = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in tensors.items()}
    extents = {key: checkpoint.extent(key) for key in tensors}
    assert all(extents.values())
    read_all([Read(extents[key], target.dtype, target) for key, target in targets.items()])
    assert all(torch.equal(targets[key], value) for key, value in tensors.items())


def test_what_is_not_there_byte_for_byte_has_no_place(tmp_path: Path) -> None:
    square = torch.arange(12.0).view(3, 4)
    tensors = {"turned": square.t(), "part": square[1:], "complex": torch.ones(2, dtype=torch.complex64).conj()}
    torch.save(tensors, tmp_path / "views.pt")
    checkpoint = open_source(tmp_path / "views.pt")
    assert checkpoint.extent("turned") is None
    assert checkpoint.extent("complex") is None
    target = torch.zeros(2, 4)
    read_all([Read(checkpoint.extent("part"), torch.float32, target)])
    assert torch.equal(target, square[1:])
    assert open_source({"in memory": square}).extent("in memory") is None
