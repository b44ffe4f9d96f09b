"""What `save` writes: readable by torch and by safetensors' own reader, compact, checked, with ties and records."""

from __future__ import annotations

import os
import stat
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_torch_zip import DTYPES, same
from torch import Tensor, nn

from qat_compat.errors import CheckpointError, SaveError
from qat_compat.schema import Spec
from qat_compat.storage import Checkpoint, archive_writer, open_source, save

BOTH = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_every_dtype(tmp_path: Path, mmap: bool) -> None:
    tensors = {}
    for dtype in DTYPES:
        raw = torch.arange(48, dtype=torch.uint8) % 2 if dtype is torch.bool else torch.arange(48, dtype=torch.uint8)
        tensors[str(dtype)] = raw.view(dtype)
    tensors |= {"empty": torch.empty(2, 0), "scalar": torch.tensor(3), "t": torch.randn(2, 3).t()}
    tensors["q"] = torch.quantize_per_tensor(torch.randn(3), 0.1, 1, torch.quint8)
    tensors["qc"] = torch.quantize_per_channel(torch.randn(2, 3), torch.rand(2) + 1, torch.zeros(2), 0, torch.qint8)
    found = torch.load(save(tensors, tmp_path / "f.pt"), weights_only=True, mmap=mmap)
    assert list(found) == list(tensors)
    assert all(same(found[key], value) for key, value in tensors.items())


@BOTH
def test_a_model_loads_its_file_strictly(tmp_path: Path, suffix: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    record = {"sites": {"0.weight": "conv.weight"}, "hidden": {"0.scale": torch.tensor([0.5])}}
    path = save(model.state_dict(), tmp_path / f"m{suffix}", record=record)
    state = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
    if suffix == ".pt":
        assert type(state) is OrderedDict
        model.load_state_dict(state, strict=True)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@BOTH
def test_record_versions_and_metadata_come_back(tmp_path: Path, suffix: str) -> None:
    record = {"sites": {"w": "conv.weight"}, "list": [1, 2.5, None, True], "hidden": {"h.scale": torch.arange(3.0)}}
    versions = {"": {"version": 1}, "bn": {"version": 2}}
    metadata = {"epoch": 3, "name": "run", "json": "[1]", "nested": {"lr": [0.1]}}
    path = save({"w": torch.ones(2)}, tmp_path / f"f{suffix}", record=record, versions=versions, metadata=metadata)
    found = open_source(path)
    assert list(found) == ["w"]
    hidden = found.record["hidden"]
    assert {**found.record, "hidden": None} == {**record, "hidden": None}
    assert list(hidden) == ["h.scale"]
    assert torch.equal(hidden["h.scale"], torch.arange(3.0))
    assert found.versions == versions
    assert found.metadata == metadata


@BOTH
@pytest.mark.parametrize("versions", [{}, {"bn": {"version": 2}}])
def test_a_record_adds_nothing_to_the_versions(tmp_path: Path, suffix: str, versions: dict[str, Any]) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / f"f{suffix}", record={"a": 1}, versions=versions)
    assert open_source(path).versions == versions


@BOTH
def test_what_was_opened_can_be_saved_again(tmp_path: Path, suffix: str) -> None:
    one = save({"w": torch.ones(2)}, tmp_path / f"one{suffix}", record={"hidden": {"h": torch.ones(1)}, "x": 1})
    first = open_source(one)
    two = save(first, tmp_path / f"two{suffix}", record=first.record, metadata=first.metadata)
    assert one.read_bytes() == two.read_bytes()


def test_torch_reading_our_file_and_opening_that(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "f.pt", record={"x": 1, "hidden": {"h": torch.ones(1)}})
    found = open_source(torch.load(path, weights_only=True))
    assert found.record["x"] == 1
    assert found.record["hidden"]["h"].item() == 1
    assert found.versions == {}


def test_tensors_in_the_metadata(tmp_path: Path) -> None:
    state = {"state": {0: {"momentum": torch.arange(4.0)}}, "lr": 0.1}
    path = save({"w": torch.ones(1)}, tmp_path / "f.pt", metadata={"optimizer": state})
    again = save(open_source(path), tmp_path / "g.pt", metadata=open_source(path).metadata)
    for file in (path, again):
        optimizer = open_source(file).metadata["optimizer"]
        assert optimizer["state"][0]["momentum"].read().tolist() == [0, 1, 2, 3]
    with pytest.raises(SaveError, match="metadata") as error:
        save({"w": torch.ones(1)}, tmp_path / "f.safetensors", metadata={"optimizer": state})
    assert ".pt" in str(error.value.remedy)


@BOTH
def test_a_small_view_does_not_write_its_neighbours(tmp_path: Path, suffix: str) -> None:
    storage = torch.arange(1 << 20, dtype=torch.float32)
    path = save({"part": storage[5:7], "column": storage.view(1024, 1024)[:, 3]}, tmp_path / f"f{suffix}")
    assert path.stat().st_size < 10_000
    found = open_source(path)
    assert found["part"].tolist() == [5.0, 6.0]
    assert torch.equal(found["column"], storage.view(1024, 1024)[:, 3])


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    tied = {"embed": weight, "head": weight, "other": weight.clone()}
    path = save(tied, tmp_path / "f.pt")
    assert path.stat().st_size < 2.5 * weight.nbytes
    found = torch.load(path, weights_only=True)
    assert found["embed"].data_ptr() == found["head"].data_ptr() != found["other"].data_ptr()
    streamed = torch.load(save(open_source(path), tmp_path / "g.pt"), weights_only=True)
    assert streamed["embed"].data_ptr() == streamed["head"].data_ptr() != streamed["other"].data_ptr()
    assert open_source(save(tied, tmp_path / "f.safetensors")).record["ties"] == [["embed", "head"]]


def test_tensors_that_follow_each_other_in_memory_are_not_tied(tmp_path: Path) -> None:
    """A stream that computes each tensor when asked may hand out the same address twice."""
    buffer = torch.zeros(4)

    def read(key: str) -> Tensor:
        return buffer.fill_(float(key))

    source = Checkpoint({str(i): Spec((4,), torch.float32) for i in range(3)}, read, name="<stream>")
    assert [value[0].item() for value in torch.load(save(source, tmp_path / "f.pt"), weights_only=True).values()] == [
        0,
        1,
        2,
    ]


@BOTH
def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, suffix: str) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read(key: str) -> Tensor:
        assert sum(ref() is not None for ref in alive) <= 1
        made = torch.full((8,), float(key))
        alive.append(weakref.ref(made))
        return made

    source = Checkpoint({str(i): Spec((8,), torch.float32) for i in range(5)}, read, name="<stream>")
    assert open_source(save(source, tmp_path / f"f{suffix}"))["4"][0] == 4
    assert len(alive) == 5


def test_archives_beyond_the_limits_of_plain_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZIP64, without gigabytes: the limits are lowered."""
    monkeypatch.setattr(archive_writer, "_LIMIT", 100)
    monkeypatch.setattr(archive_writer, "_MAX_COUNT", 3)
    tensors = {str(i): torch.full((50,), float(i)) for i in range(5)}
    path = save(tensors, tmp_path / "f.pt")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for found in (torch.load(path, weights_only=True), open_source(path, verify=True)):
        assert all(torch.equal(found[key], value) for key, value in tensors.items())


@BOTH
def test_a_changed_byte_is_found_when_the_tensor_is_read(tmp_path: Path, suffix: str) -> None:
    path = save({"a": torch.full((9,), 7, dtype=torch.uint8), "b": torch.ones(3)}, tmp_path / f"f{suffix}")
    path.write_bytes(path.read_bytes().replace(b"\7" * 9, b"\7" * 8 + b"\6"))
    found = open_source(path)
    assert found["b"].sum() == 3
    with pytest.raises(CheckpointError, match="differs from its checksum") as error:
        found["a"]
    assert error.value.key is not None
    assert error.value.file == str(path)
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        open_source(path, verify=True)
    assert open_source(path, verify=False)["a"][-1] == 6


@BOTH
def test_equal_content_is_equal_bytes(tmp_path: Path, suffix: str) -> None:
    one, two = (save({"w": torch.arange(5)}, tmp_path / f"{name}{suffix}", record={"a": 1}) for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_what_safetensors_cannot_hold(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    packed = torch.tensor(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for value in (quantized, torch.ones(2, dtype=torch.complex128), packed):
        with pytest.raises(SaveError, match="no form in safetensors") as error:
            save({"ok": torch.ones(1), "fc.w": value}, tmp_path / "f.safetensors")
        assert (error.value.key, error.value.remedy) == ("fc.w", "save as .pt")
    assert list(tmp_path.iterdir()) == []


def test_backup_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for value in range(3):
        save({"w": torch.tensor(value)}, path, backup=True)
        os.utime(path, (1_700_000_000,) * 2)
    assert open_source(path)["w"] == 2
    kept = sorted(file.name for file in tmp_path.iterdir() if file != path)
    assert len(kept) == 2
    assert all(name.startswith("model.2023111") and name.endswith(".pt") for name in kept)
    assert {open_source(tmp_path / name)["w"].item() for name in kept} == {0, 1}


def test_backups_are_kept_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    test_backup_keeps_the_old_file(tmp_path)


def test_links_and_modes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "real.pt", tmp_path / "link.pt"
    save({"w": torch.tensor(1)}, target)
    target.chmod(0o640)
    link.symlink_to(target)
    assert save({"w": torch.tensor(2)}, link) == link
    assert link.is_symlink()
    assert open_source(target)["w"] == 2
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["real.pt"]


def test_a_new_file_obeys_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = save({"w": torch.ones(1)}, tmp_path / "f.pt")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
