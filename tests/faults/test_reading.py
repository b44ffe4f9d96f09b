"""Reading: nothing runs, memory is bounded, every corruption is a CheckpointError, the world outside stays as it is."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchao.quantization  # noqa: F401 - it adds to torch's safe globals, before the first test looks at them
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import qat_compat as qc
from qat_compat.errors import CheckpointError, CompatError, LimitError, UnsafeCheckpointError
from qat_compat.storage import open_source, save

TENSORS = OrderedDict(a=torch.randn(5, 3), b=torch.arange(4), h=torch.ones(2).bfloat16())


@pytest.fixture(autouse=True)
def nothing_else_changes() -> Iterator[None]:
    """torch's list of safe globals, the random state and the modules that are loaded stay as they are."""
    before = list(torch.serialization.get_safe_globals()), torch.get_rng_state()
    yield
    assert torch.serialization.get_safe_globals() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch file around a pickle that was written by hand."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", b"3\n")
        for name, content in (records or {}).items():
            file.writestr(f"archive/{name}", content)
    return path


def call(module: str, name: str, *arguments: bytes, op: bytes = b"R") -> bytes:
    """Opcodes that call a global with arguments that are opcodes themselves."""
    if op == b"o":
        return b"(" + f"c{module}\n{name}\n".encode() + b"".join(arguments) + op
    if op == b"i":
        return b"(" + b"".join(arguments) + f"i{module}\n{name}\n".encode()
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"t" + op


def pickled(value: bytes) -> bytes:
    """`{"model": {}, "evil": value}`, as opcodes."""
    return b"\x80\x02}(X\x05\0\0\0model}X\x04\0\0\0evil" + value + b"u."


COMMAND = b"S'touch executed'\n"
DANGEROUS = [
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("__builtin__", "exec"),
    ("builtins", "__import__"), ("builtins", "open"), ("importlib", "import_module"), ("runpy", "run_path"),
    ("sys", "exit"), ("shutil", "rmtree"), ("pickle", "loads"), ("torch", "load"), ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"), ("socket", "create_connection"), ("os.path", "join"), ("ctypes", "CDLL"),
    ("pty", "spawn"), ("torch", "empty"), ("torch", "set_default_device"),
]  # fmt: skip


@pytest.mark.parametrize("op", [b"R", b"\x81", b"o", b"i"], ids=["REDUCE", "NEWOBJ", "OBJ", "INST"])
@pytest.mark.parametrize(("module", "name"), DANGEROUS)
def test_dangerous_callables(
    tmp_path: Path, module: str, name: str, op: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "f.pt", pickled(call(module, name, COMMAND, op=op)))
    with pytest.raises(UnsafeCheckpointError, match="would run code") as error:
        open_source(path)
    assert f"{module.replace('__builtin__', 'builtins')}.{name}" in str(error.value.found)
    assert error.value.key == "archive/data.pkl"
    assert error.value.file == str(path)
    assert not (tmp_path / "executed").exists()


def test_a_name_in_two_parts_is_no_way_around(tmp_path: Path) -> None:
    """STACK_GLOBAL takes dotted names, and getattr could walk to anything; neither is ever resolved."""
    dotted = b"\x8c\x02os\x8c\x06system\x93(" + COMMAND + b"tR"
    with pytest.raises(UnsafeCheckpointError):
        open_source(archive(tmp_path / "a.pt", pickled(dotted)))
    chain = call("builtins", "getattr", b"cmath\n__loader__\n", b"S'load_module'\n")
    weights = b"}X\x01\0\0\0w" + _tensor(b"K\x01\x85", b"K\x01\x85") + b"s"
    path = archive(
        tmp_path / "b.pt",
        b"\x80\x02}(X\x05\0\0\0model" + weights + b"X\x04\0\0\0evil" + chain + b"u.",
        {"data/0": bytes(4)},
    )
    assert open_source(path).metadata["evil"]["class"] == "builtins.getattr"


def test_the_environment_cannot_switch_safety_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, ("touch executed",)

    torch.save({"model": TENSORS, "x": Evil()}, tmp_path / "zip.pt")
    torch.save({"model": TENSORS, "x": Evil()}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "legacy.pt"):
        with pytest.raises(UnsafeCheckpointError):
            open_source(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name",
    ["FloatTensor", "LongStorage", "Tensor", "cuda.FloatTensor", "storage.UntypedStorage", "nn.parameter.Parameter"],
)
def test_calls_that_return_memory_of_the_heap(tmp_path: Path, name: str) -> None:
    module, _, cls = f"torch.{name}".rpartition(".")
    with pytest.raises(UnsafeCheckpointError, match="would run code") as error:
        open_source(archive(tmp_path / "f.pt", pickled(call(module, cls, b"M\x00\x10"))))
    assert "uninitialised memory" in str(error.value.found)


def _storage(count: bytes, kind: str = "FloatStorage") -> bytes:
    return b"(X\x07\0\0\0storage" + f"ctorch\n{kind}\n".encode() + b"X\x01\0\0\x000X\x03\0\0\0cpu" + count + b"tQ"


def _tensor(size: bytes, stride: bytes, *, offset: bytes = b"K\0", count: bytes = b"K\x01") -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + _storage(count) + offset + size + stride + b"\x89" + hooks + b"tR"


def _long(value: int) -> bytes:
    data = value.to_bytes(9, "little")
    return b"\x8a\x09" + data


def doubled(value: Any) -> Any:
    """2**60 references to `value`, in 60 objects."""
    for _ in range(60):
        value = type(value)((value, value))
    return value


def opcodes(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


BOMBS: dict[str, bytes] = {
    "bytearray": pickled(call("builtins", "bytearray", _long(2**32))),
    "stride 0": pickled(_tensor(_long(2**45) + b"\x85", b"K\0\x85")),
    "nesting": pickled(b"]" * 200_000 + b"a" * 199_999),
    "nested dicts": pickled(b"}K\x01" * 100_000 + b"}" + b"s" * 100_000),
    "shared lists": pickled(opcodes(doubled([]))),
    "shared tuples": pickled(opcodes(doubled(()))),
    "shared keys": pickled(b"}" + opcodes(doubled(())) + b"K\x01s"),
    "members of a set": pickled(call("builtins", "set", b"]" + opcodes(doubled(())) + b"a")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_claim_much(tmp_path: Path, name: str) -> None:
    data = BOMBS[name]
    weights = b"X\x05\0\0\0model}X\x01\0\0\0w" + _tensor(b"K\x01\x85", b"K\x01\x85") + b"s"
    data = data.replace(b"X\x05\0\0\0model}", weights, 1)
    path = archive(tmp_path / "f.pt", data, {"data/0": bytes(4)})
    tracemalloc.start()
    try:
        with pytest.raises(LimitError):
            open_source(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_calls_that_copy_one_large_value_over_and_over(tmp_path: Path) -> None:
    """A few kilobytes on the disk, gigabytes in memory: what calls make is counted while they make it."""
    text = b"x" * (1 << 20)
    large = b"X" + len(text).to_bytes(4, "little") + text + b"q\0"
    encode = b"c_codecs\nencode\nq\1"
    body = b"\x80\x02" + large + b"0" + encode + b"0](" + b"h\1h\0X\6\0\0\0latin1\x86R" * 2000 + b"e."
    path = archive(tmp_path / "a.pt", body)
    with pytest.raises(LimitError, match="far more than it holds"):
        open_source(path)
    zeros = b"cnumpy.core.numeric\n_frombuffer\n"
    size = b"\x8a\x05\0\0\0\0\x20"  # 2**37 as a LONG1
    dtype = b"cnumpy\ndtype\nX\2\0\0\0u1\x85R"
    call = b"\x80\x02}X\1\0\0\0w" + zeros + b"(" + size + dtype + size + b"\x85X\1\0\0\0CtRs."
    with pytest.raises(CheckpointError, match="malformed"):
        open_source(archive(tmp_path / "b.pt", call))


def test_a_compressed_record_of_a_gigabyte(tmp_path: Path) -> None:
    """As its directory has it: the limit is one of what is claimed, and nothing is inflated to find out."""
    data = b"\x80\x02}X\x01\0\0\0w" + _tensor(b"J\0\0\0\x10\x85", b"K\x01\x85", count=b"J\0\0\0\x10") + b"s."
    path = archive(tmp_path / "f.pt", data, {"data/0": bytes(1 << 20)}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    size = content.rindex(b"archive/data/0") - 46 + 24  # in the entry of the directory
    content[size : size + 4] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(LimitError, match="inflate"):
        open_source(path)["w"]


def test_a_container_that_holds_itself(tmp_path: Path) -> None:
    state: dict[str, Any] = {"model": dict(TENSORS), "extra": {}}
    state["extra"]["again"] = state["extra"]
    torch.save(state, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="holds itself"):
        open_source(tmp_path / "f.pt")


TEXTS = {
    "a shape": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + _storage(b"K\x01")
    + b"K\0"
    + opcodes(doubled(()))
    + b")\x89NtR",
    "a device": call("torch", "device", opcodes(doubled(()))),
    "a layout": call("torch.serialization", "_get_layout", opcodes(doubled(()))),
    "a path": call("pathlib", "PosixPath", opcodes(doubled(()))),
    "a numpy dtype": call("numpy", "dtype", opcodes(doubled(()))),
    "a sparse layout": call("torch._utils", "_rebuild_sparse_tensor", opcodes(doubled(())), b")"),
    "a persistent id": opcodes(doubled(())) + b"Q",
    "a storage key": _storage(b"K\x01").replace(b"X\x01\0\0\x000", opcodes(doubled(()))),
}


@pytest.mark.parametrize("name", TEXTS)
def test_no_message_or_hash_of_a_value_takes_forever(tmp_path: Path, name: str) -> None:
    """Objects that share their parts: the text of 60 of them would have 2**60 characters."""
    data = b"\x80\x02}X\x01\0\0\0w" + TEXTS[name] + b"s."
    with pytest.raises(CheckpointError) as error:
        open_source(archive(tmp_path / "f.pt", data, {"data/0": bytes(4)}))
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("kind", ["a record", "a shard", "a key"])
def test_no_message_is_as_long_as_a_name_in_the_file(tmp_path: Path, kind: str) -> None:
    name = "x" * 60_000
    if kind == "a record":
        path = archive(tmp_path / "f.pt", b"\x80\x02}.", {"a": b"", name: b""})
        path.write_bytes(path.read_bytes().replace(b"archive/xx", b"archive/xy", 1))
    elif kind == "a shard":
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"w": name}}))
    else:
        path = save({name: torch.ones(2), f"{name}y": torch.ones(2)}, tmp_path / "f.pt")
    with pytest.raises(CompatError) as error:
        qc.load_checkpoint(torch.nn.ReLU(), path)
    assert len(str(error.value)) < 20_000
    assert " characters)" in str(error.value)


VIEWS = {
    "beyond the storage": (b"K\x02\x85", b"K\x01\x85", b"K\0"),
    "offset": (b"K\x01\x85", b"K\x01\x85", b"K\x01"),
    "negative stride": (b"K\x01\x85", b"J\xff\xff\xff\xff\x85", b"K\0"),
    "negative offset": (b"K\x01\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"),
    "more strides than sizes": (b"K\x01\x85", b"K\x01K\x01\x86", b"K\0"),
    "overflow": (_long(2**61) + b"\x85", _long(2**61) + b"\x85", b"K\0"),
    "a size that is a float": (b"G" + struct.pack(">d", 1.0) + b"\x85", b"K\x01\x85", b"K\0"),
    "a size that is no tuple": (b"K\x01", b"K\x01\x85", b"K\0"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_that_leave_their_storage(tmp_path: Path, name: str) -> None:
    size, stride, offset = VIEWS[name]
    data = b"\x80\x02}X\x01\0\0\0w" + _tensor(size, stride, offset=offset) + b"s."
    with pytest.raises(CheckpointError):
        open_source(archive(tmp_path / "f.pt", data, {"data/0": bytes(4)}))


@pytest.mark.parametrize("size", [0, 3, 5, 8])
def test_a_record_that_is_not_as_long_as_its_storage(tmp_path: Path, size: int) -> None:
    data = b"\x80\x02}X\x01\0\0\0w" + _tensor(b"K\x01\x85", b"K\x01\x85") + b"s."
    with pytest.raises(CheckpointError, match="not as long as its storage") as error:
        open_source(archive(tmp_path / "f.pt", data, {"data/0": bytes(size)}))
    assert (error.value.key, error.value.expected, error.value.found) == ("archive/data/0", "4 bytes", f"{size} bytes")


def test_a_storage_that_is_missing(tmp_path: Path) -> None:
    data = b"\x80\x02}X\x01\0\0\0w" + _tensor(b"K\x01\x85", b"K\x01\x85") + b"s."
    with pytest.raises(CheckpointError, match="missing") as error:
        open_source(archive(tmp_path / "f.pt", data))
    assert error.value.key == "archive/data/0"


MALFORMED = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "unknown opcode": b"\x80\x02\xff.",
    "unknown protocol": b"\x80\x09}.",
    "stack underflow": b"\x80\x02a.",
    "below the mark": b"\x80\x02](a.",
    "memo": b"\x80\x02h\x07.",
    "two objects": b"\x80\x02}}.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "odd items": b"\x80\x02}(K\x01u.",
    "call of a number": b"\x80\x02K\x01)R.",
    "arguments in a list": b"\x80\x02cgcd\nx\n]R.",
    "state of a list": b"\x80\x02]}b.",
    "length beyond the end": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "negative length": b"\x80\x02T\xff\xff\xff\xffabc.",
    "huge long": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "decimal of many digits": b"L" + b"9" * 10_000 + b"L\n.",
    "extension code": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02K\x01Q.",
    "textual persistent id": b"P1\n.",
    "trailing bytes": b"\x80\x02}..",
    "rebuild of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "dtype of a wrong type": b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(" + _storage(b"K\x01") + b"K\0))\x89NNtR.",
    "codec": b"\x80\x02c_codecs\nencode\nS'x'\nS'rot13'\n\x86R.",
    "set of lists": b"\x80\x02c__builtin__\nset\n]]a\x85R.",
    "buffer": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pickles(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        open_source(archive(tmp_path / "f.pt", MALFORMED[name], {"data/0": bytes(4)}))
    assert error.value.key == "archive/data.pkl"
    assert error.value.remedy


def test_a_directory_whose_records_overlap(tmp_path: Path) -> None:
    path = archive(tmp_path / "f.pt", b"\x80\x02}.", {"data/0": bytes(100), "data/1": bytes(100)})
    data = bytearray(path.read_bytes())
    first, second = (data.rindex(name) for name in (b"archive/data/0", b"archive/data/1"))
    data[second - 4 : second] = data[first - 4 : first]  # both entries point at one record
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="overlap"):
        open_source(path)


def files(folder: Path) -> dict[str, Path]:
    """One small file of each format, foreign and our own."""
    paths = {name: folder / name for name in ("zip.pt", "legacy.pt", "foreign.safetensors", "plain.npz", "packed.npz")}
    trainer = {"state_dict": TENSORS, "epoch": 1, "loss": np.float64(2), "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    torch.save(trainer, paths["zip.pt"])
    torch.save(trainer, paths["legacy.pt"], _use_new_zipfile_serialization=False)
    save_file(dict(TENSORS), paths["foreign.safetensors"])
    arrays = {"a": np.ones((3, 4)), "b": np.arange(3)}
    np.savez(paths["plain.npz"], **arrays)
    np.savez_compressed(paths["packed.npz"], **arrays)
    for name in ("own.pt", "own.safetensors"):
        paths[name] = save(TENSORS, folder / name, record={"k": [1], "hidden": {"h": torch.ones(2)}})
    return paths


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files(tmp_path_factory.mktemp("samples")).items()}


FORMATS = ["zip.pt", "legacy.pt", "foreign.safetensors", "own.pt", "own.safetensors", "plain.npz", "packed.npz"]
fuzzing = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_all(path: Path) -> dict[str, Tensor]:
    checkpoint = qc.open_checkpoint(path)
    return {key: checkpoint[key] for key in checkpoint}


@pytest.mark.parametrize("name", FORMATS)
def test_truncation_at_any_byte(tmp_path: Path, samples: dict[str, bytes], name: str) -> None:
    """Each of the last bytes, and places all over the file."""
    data = samples[name]
    step = max(1, len(data) // 250)
    for length in {*range(0, len(data), step), *range(max(0, len(data) - 60), len(data))}:
        (tmp_path / "f").write_bytes(data[:length])
        with pytest.raises(CheckpointError) as error:
            read_all(tmp_path / "f")
        assert error.value.file == str(tmp_path / "f"), length


@pytest.mark.parametrize("name", FORMATS)
@fuzzing
@given(seed=st.integers(0, 2**32))
def test_changed_bytes_never_raise_anything_else(
    tmp_path: Path, samples: dict[str, bytes], name: str, seed: int
) -> None:
    rng = random.Random(seed)
    data = bytearray(samples[name])
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (tmp_path / "f").write_bytes(data)
    try:
        read_all(tmp_path / "f")
    except CompatError as error:
        assert error.file == str(tmp_path / "f")


def quantized(*names: str) -> dict[str, Tensor]:
    """Tensors of one layer `fc`, whose weight is (4, 8), as frameworks name and lay them out."""
    made = {
        "weight": torch.ones(4, 8), "bias": torch.zeros(4),
        "_weight_qdata": torch.ones(4, 8, dtype=torch.int8), "_weight_scale": torch.ones(4, 1),
        "weight_packed": torch.ones(4, 1, dtype=torch.int32), "weight_scale": torch.ones(4, 1),
        "weight_shape": torch.tensor([4, 8]), "weight_quantizer._amax": torch.ones(4, 1),
        "qweight": torch.ones(1, 4, dtype=torch.int32), "scales": torch.ones(1, 4),
        "qzeros": torch.ones(1, 1, dtype=torch.int32), "g_idx": torch.zeros(8, dtype=torch.int32),
        "weight_fake_quant.scale": torch.ones(4), "weight_fake_quant.zero_point": torch.zeros(4, dtype=torch.int32),
    }  # fmt: skip
    return {f"fc.{name}": made[name] for name in names}


QUANTIZER = {"_num_bits": 8, "_axis": 0, "_unsigned": False, "_narrow_range": True, "is_enabled": True}
RECORDS: dict[str, dict[str, Any]] = {
    "our own": {
        "framework": "torch_ao", "stage": "prepared", "sites": {"fc.weight": "fc.weight"}, "hidden": {"h": [1]},
        "aliases": {"fc.weight_fake_quant": "fc.weight_fake_quant"}, "grids": {"fc.weight_fake_quant": "-128..127"},
        "encodings": {"fc.weight_fake_quant": {
            "convention": "brevitas.int", "bits": 8, "signed": True, "narrow": False, "leaves": {"value": "scale"},
        }},
    },
    "torchao": {"attributes": {"fc.weight": {
        "class": "Int8Tensor", "tensors": {"qdata": "fc._weight_qdata", "scale": "fc._weight_scale"}, "shape": [4, 8],
        "block_size": [1, 8], "dtype": "float32", "act_quant_kwargs": {"granularity": {"class": "PerRow"}},
    }}},
    "torchao QAT": {"fake_quantizers": {"fc.weight_fake_quantizer": {
        "class": "IntxFakeQuantizeConfig", "dtype": "int4", "granularity": {"class": "PerGroup", "group_size": 8},
        "mapping_type": "SYMMETRIC", "scale_precision": "float32", "zero_point_precision": "int32",
        "zero_point_domain": "INT", "is_dynamic": True, "range_learning": False, "eps": None,
    }}},
    "converted PT2E": {"stage": "converted", "folded": ["bn"], "integers": {
        "fc.weight": {"integers": "_frozen_param0", "scale": 0.5, "zero_point": 0, "axis": None},
    }},
}  # fmt: skip
BESIDE: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "our own": (quantized("weight", "bias", "weight_fake_quant.scale", "weight_fake_quant.zero_point"), {}),
    "torchao": (quantized("_weight_qdata", "_weight_scale"), {}),
    "torchao QAT": (quantized("weight", "bias"), {}),
    "converted PT2E": ({**quantized("weight"), "_frozen_param0": torch.ones(4, 8, dtype=torch.int8)}, {}),
    "compressed-tensors": (quantized("weight_packed", "weight_scale", "weight_shape"), {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "weight_block_size": [128, 128],
        "config_groups": {"group_0": {
            "targets": ["fc"], "weights": {"num_bits": 4, "block_structure": [128, 128]},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }},
    }}),
    "gptq": (quantized("qweight", "scales", "qzeros", "g_idx"), {"quantization_config": {
        "quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2",
    }}),
    "modelopt": (quantized("weight", "weight_quantizer._amax"), {"modelopt_state": {
        "modelopt_version": "0.47", "modelopt_state_dict": [
            ["quantize", {"config": {}, "metadata": {"quantizer_state": {"fc.weight_quantizer": QUANTIZER}}}],
        ],
    }}),
    "aimet": (quantized("weight", "bias"), {"aimet_encodings": {
        "file": "net.encodings", "version": "0.6.1",
        "activation_encodings": {"fc": {"output": {"0": [{"bitwidth": 8, "offset": 0, "scale": 1.0}]}}},
        "param_encodings": {"fc.weight": [
            {"bitwidth": 8, "is_symmetric": "True", "offset": -128, "scale": 0.1, "min": -12.8, "max": 12.7},
        ]},
    }}),
}  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "int8", "int99", "fc.weight", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "class", "fc"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def with_junk(value: Any, draw: Callable[[Any], Any]) -> Any:
    """The same document with something else at one place, or a part of it left out."""
    parts = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not parts or draw(st.integers(0, 5)) == 0:
        return draw(JUNK)
    place = draw(st.sampled_from(parts))
    changed = value.copy()
    if draw(st.integers(0, 5)) == 0:
        del changed[place]
    else:
        changed[place] = with_junk(value[place], draw)
    return changed


@pytest.mark.parametrize("name", BESIDE)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_junk_beside_the_weights_never_raises_anything_else(name: str, data: st.DataObject) -> None:
    tensors, beside = BESIDE[name]
    weights = OrderedDict(tensors)
    record, kept = RECORDS.get(name, {}), beside
    if record:
        record = with_junk(record, data.draw)
    else:
        kept = with_junk(beside, data.draw)
    weights._metadata = {"": {"qat_compat": record}}  # type: ignore[attr-defined]
    source = {"state_dict": weights, **(kept if isinstance(kept, dict) else {})}
    model = torch.nn.ModuleDict({"fc": torch.nn.utils.skip_init(torch.nn.Linear, 8, 4)})
    calls: list[Callable[[], object]] = [
        lambda: read_all(source),  # type: ignore[arg-type]
        lambda: dict(qc.to_float(source)),
        lambda: str(qc.plan_load(model, source)),
        lambda: qc.load_checkpoint(model, source),
    ]
    for call in calls:
        with suppress(CompatError):
            call()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dcp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": dict(TENSORS), "epoch": 3, "groups": [{"lr": 0.1}]}, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@fuzzing
@given(seed=st.integers(0, 2**32))
def test_changed_bytes_in_a_folder_of_shards(folder: Path, name: str, seed: int) -> None:
    rng = random.Random(seed)
    path = folder / name
    whole = path.read_bytes()
    data = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
    for _ in range(rng.choice((0, 1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    try:
        read_all(folder)
    except CompatError as error:
        assert str(folder) in str(error.file)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["own.pt", "own.safetensors"])
def test_no_single_changed_byte_passes_for_data(tmp_path: Path, samples: dict[str, bytes], name: str) -> None:
    """Our own files: a byte that was changed is found, or makes no difference (padding, dates)."""
    data, step = samples[name], 7
    for place in range(0, len(data), step):
        changed = bytearray(data)
        changed[place] ^= 0x41
        (tmp_path / "f").write_bytes(changed)
        try:
            found = read_all(tmp_path / "f")
        except CompatError:
            continue
        assert list(found) == list(TENSORS), place
        assert all(torch.equal(found[key], value) for key, value in TENSORS.items()), place


def test_no_changed_byte_of_the_directory_switches_the_checksums_off(tmp_path: Path, samples: dict[str, bytes]) -> None:
    data = bytearray(samples["own.pt"])
    data[data.index(TENSORS["a"].numpy().tobytes()) + 3] ^= 0x40
    for place in range(data.index(b"PK\1\2"), len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x01
        (tmp_path / "f").write_bytes(changed)
        with pytest.raises(CompatError):
            read_all(tmp_path / "f")


def test_verify_finds_a_changed_byte_of_a_foreign_file(tmp_path: Path) -> None:
    torch.save({"w": torch.full((9,), 7, dtype=torch.uint8)}, tmp_path / "f.pt")
    data = (tmp_path / "f.pt").read_bytes()
    (tmp_path / "f.pt").write_bytes(data.replace(b"\7" * 9, b"\7" * 8 + b"\6"))
    assert open_source(tmp_path / "f.pt")["w"][-1] == 6
    with pytest.raises(CheckpointError, match="differs from its checksum") as error:
        open_source(tmp_path / "f.pt", verify=True)
    assert error.value.key == "f/data/0"


@pytest.mark.parametrize("edit", ["truncated", "rewritten"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_changes_while_it_is_open(tmp_path: Path, suffix: str, edit: str) -> None:
    path = save({"w": torch.zeros(1 << 16)}, tmp_path / f"f{suffix}")
    checkpoint = open_source(path)
    if edit == "truncated":
        os.truncate(path, 64)
    else:
        data = path.read_bytes()
        path.write_bytes(data)
        os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match="changed while it was open"):
        checkpoint["w"]


@pytest.mark.parametrize("verify", [True, None])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_cut_while_its_checksums_are_compared(
    tmp_path: Path, suffix: str, verify: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever touches a page of a mapping that has been cut off is killed."""
    path = save({"w": torch.zeros(1 << 18)}, tmp_path / f"f{suffix}")
    real = zlib.crc32

    def cutting(data: Any, *start: int) -> int:
        os.truncate(path, 4096)
        return real(data, *start)

    monkeypatch.setattr(zlib, "crc32", cutting)
    with pytest.raises(CheckpointError, match="changed while it was open"):
        open_source(path, verify=verify)["w"]


def test_a_file_that_is_cut_while_a_record_is_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(0).randbytes(1 << 20)
    data = b"\x80\x02}X\x01\0\0\0w" + _tensor(b"J\0\0\4\0\x85", b"K\x01\x85", count=b"J\0\0\4\0") + b"s."
    path = archive(tmp_path / "f.pt", data, {"data/0": content}, compression=zipfile.ZIP_DEFLATED)
    checkpoint = open_source(path)

    class Cutting:
        eof = False
        engine = zlib.decompressobj(-15)

        def decompress(self, data: bytes, most: int) -> bytes:
            os.truncate(path, 4096)
            return self.engine.decompress(data, most)

    monkeypatch.setattr(zlib, "decompressobj", lambda _: Cutting())
    with pytest.raises(CheckpointError, match="changed while it was open"):
        checkpoint["w"]


def test_an_interrupt_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    path = save({"w": torch.zeros(3)}, tmp_path / "f.pt")
    monkeypatch.setattr("weakref.finalize", interrupted)
    free = os.open(path, os.O_RDONLY)
    os.close(free)
    with pytest.raises(KeyboardInterrupt):
        open_source(path)
    with path.open("rb") as stream:
        assert stream.fileno() == free


def test_a_file_that_is_replaced_while_it_is_open(tmp_path: Path) -> None:
    path = save({"w": torch.zeros(3)}, tmp_path / "f.pt")
    checkpoint = open_source(path)
    save({"w": torch.ones(3)}, path)
    assert checkpoint["w"].sum() == 0
    assert open_source(path)["w"].sum() == 3


def test_reading_imports_nothing_that_a_file_names(tmp_path: Path) -> None:
    (tmp_path / "never_imported.py").write_text("raise RuntimeError('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        data = b"\x80\x02}(X\x05\0\0\0model}X\x01\0\0\0w" + _tensor(b"K\x01\x85", b"K\x01\x85")
        data += b"sX\x01\0\0\0x" + call("never_imported", "Thing", b"K\x01") + b"u."
        checkpoint = open_source(archive(tmp_path / "f.pt", data, {"data/0": bytes(4)}))
    finally:
        sys.path.remove(str(tmp_path))
    assert checkpoint.metadata["x"] == {"class": "never_imported.Thing", "args": [1]}
    assert "never_imported" not in sys.modules


def test_opening_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    """256 MiB on disk; what Python allocates is counted, and the tensors are never touched."""
    with (tmp_path / "f.safetensors").open("wb") as stream:
        header = b'{"w":{"dtype":"U8","shape":[268435456],"data_offsets":[0,268435456]}}'
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + (256 << 20))
    tracemalloc.start()
    try:
        checkpoint = open_source(tmp_path / "f.safetensors")
        assert checkpoint.spec("w").shape == (256 << 20,)
        assert checkpoint["w"][12345] == 0
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_plain_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pickle.dump({"w": [1.0]}, buffer, protocol=2)
    (tmp_path / "f.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"plain pickle \(protocol 2\)"):
        open_source(tmp_path / "f.pt")
