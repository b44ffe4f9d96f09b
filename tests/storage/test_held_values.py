"""Values that stand where a tensor would, paths that cannot be looked at, and many files at once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qat_compat as qc
from qat_compat.storage import Checkpoint, open_source

# --- numpy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mapping", "pickle"])
def test_numbers_of_numpy_are_tensors_beside_others(form: str, tmp_path: Path) -> None:
    model, fresh = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model.num_batches_tracked.fill_(77)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    if form == "pickle":
        torch.save(state, tmp_path / "n.pt")
    qc.load_checkpoint(fresh, state if form == "mapping" else tmp_path / "n.pt")
    assert fresh.num_batches_tracked == 77 and fresh.num_batches_tracked.dtype == torch.int64


def test_a_number_beside_the_weights_makes_no_weights() -> None:
    tree = {"best": {"loss": np.array(0.5)}, "model": {"w": torch.ones(2)}}
    assert list(open_source(tree)) == ["w"]


def test_arrays_in_any_order_of_memory_and_of_dtypes_that_torch_has_not() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    record = np.zeros(3, dtype=[("a", "i1"), ("b", "<f4")])
    state = {"back": values[::-1], "odd": record["b"], "model": torch.ones(1)}
    found = open_source(state)
    assert torch.equal(found["back"], torch.from_numpy(values[::-1].copy()))
    assert torch.equal(found["odd"], torch.zeros(3))
    assert list(open_source({"model": {"w": torch.ones(2)}, "stats": {"mean": np.zeros(2, np.longdouble)}})) == ["w"]


# --- paths ------------------------------------------------------------------------------------------------------------


def test_the_folder_in_which_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert list(qc.open_checkpoint(".")) == ["w"]


def test_a_name_as_long_as_a_name_may_be(tmp_path: Path) -> None:
    path = qc.save_checkpoint({"w": torch.ones(2)}, tmp_path / ("a" * 240 + ".pt"))
    assert list(qc.open_checkpoint(path)) == ["w"]
    assert qc.find_checkpoint(tmp_path, "*.pt") == path
    with pytest.raises(qc.CheckpointError):
        qc.open_checkpoint(tmp_path / ("a" * 300 + ".pt"))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of a process are set on Linux")
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """One descriptor for each; and where that is too many, it is said how to have more."""
    names = {f"w{i}": f"model-{i:05}.safetensors" for i in range(150)}
    for key, name in names.items():
        save_file({key: torch.ones(2)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    program = (
        "import resource, sys, qat_compat as qc\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)\n"
        "try:\n    print(len(dict(qc.open_checkpoint(sys.argv[1]).specs)))\n"
        "except qc.CheckpointError as error:\n    print(error.remedy)\n"
    )
    said = []
    for limit in ("220", "100"):
        command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path), limit]
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert said[0] == "150"
    assert "ulimit -n" in said[1]


# --- what lies beside, and what is a part -----------------------------------------------------------------------------


def test_of_two_indexes_the_one_that_others_look_for_is_taken_and_both_are_named(tmp_path: Path) -> None:
    for stem, key in (("consolidated", "layers.0.wq.weight"), ("model", "model.layers.0.q_proj.weight")):
        save_file({key: torch.ones(2)}, tmp_path / f"{stem}-00001.safetensors")
        index = {"weight_map": {key: f"{stem}-00001.safetensors"}}
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    found = open_source(tmp_path)
    assert list(found) == ["model.layers.0.q_proj.weight"]
    assert any("also there: consolidated.safetensors.index.json" in note for note in found.notes)


def test_a_ranks_shard_is_no_checkpoint(tmp_path: Path) -> None:
    told = {"w": {"saved_offsets": [2, 0]}}
    save_file({"w": torch.ones(2, 4)}, tmp_path / "part.safetensors", {"DCP_SHARDING_INFO": json.dumps(told)})
    with pytest.raises(qc.CheckpointError, match="one rank's shard"):
        open_source(tmp_path / "part.safetensors")


def test_the_configuration_of_quantized_keys_is_saved_with_them(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    for suffix in (".pt", ".safetensors"):
        again = qc.open_checkpoint(qc.save_checkpoint(qc.open_checkpoint(tmp_path), tmp_path / f"again{suffix}"))
        assert again.metadata["quantization_config"] == {"quant_method": "gptq", "bits": 4}


# --- memory -----------------------------------------------------------------------------------------------------------


def test_ties_stay_ties_on_the_way_to_float(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

    for source in (Tied(), qc.save_checkpoint(Tied(), tmp_path / "t.pt")):
        state = torch.load(qc.save_checkpoint(qc.to_float(source), tmp_path / "f.pt"), weights_only=True)
        assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_mmap_does_not_share_what_the_caller_holds() -> None:
    source, model = nn.Linear(2, 3), nn.Linear(2, 3)
    state = source.state_dict()
    for held in (state, source, qc.to_float(source)):
        qc.load_checkpoint(model, held, mmap=True)
        assert torch.equal(model.weight, source.weight)
        assert model.weight.data_ptr() != source.weight.data_ptr()


def test_hidden_state_is_read_once_for_each_key() -> None:
    reads: list[str] = []

    class Counted(dict[str, torch.Tensor]):
        def __getitem__(self, key: str) -> torch.Tensor:
            reads.append(key)
            return super().__getitem__(key)

    from qat_compat.schema import Schema
    from qat_compat.source import Source

    hidden = Counted({f"q{i}.scale": torch.ones(1) for i in range(20)})
    source = Source(Checkpoint({}, hidden.__getitem__, name="<test>", record={"hidden": hidden}), Schema({}))
    for key in list(hidden):
        source.read(key)
    assert reads == list(hidden)


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_what_replaces_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    path = qc.save_checkpoint({"w": torch.ones(2)}, tmp_path / "private.pt")
    path.chmod(0o600)
    modes: list[int] = []

    def read(key: str) -> torch.Tensor:
        modes.extend(file.stat().st_mode & 0o777 for file in tmp_path.glob(".qat_compat-*.tmp"))
        return torch.ones(2)

    from qat_compat.schema import Spec

    qc.save_checkpoint(Checkpoint({"w": Spec((2,), torch.float32)}, read, name="<test>"), path)
    assert modes == [0o600]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_header_that_no_reader_takes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_compat.storage.safetensors._MAX_HEADER", 1000)
    with pytest.raises(qc.SaveError, match="too long for a safetensors file"):
        qc.save_checkpoint({f"{i}.weight": torch.ones(1) for i in range(100)}, tmp_path / "long.safetensors")
    assert not any(tmp_path.iterdir())
