"""torch's zip files; the oracle is torch.load."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat_compat.errors import CheckpointError, QParamError
from qat_compat.storage import open_source, save

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal in every bit, NaN and -0.0 included."""
    if (found.dtype, found.shape, found.stride()) != (expected.dtype, expected.shape, expected.stride()):
        return False
    if found.is_quantized:
        return torch.equal(found, expected) and found.qscheme() == expected.qscheme()
    found, expected = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    return torch.equal(found, expected)


def assert_like_torch(path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = open_source(path)
    assert list(checkpoint) == list(tensors)
    for key, expected in tensors.items():
        assert checkpoint.spec(key) == (tuple(expected.shape), expected.dtype)
        assert same(checkpoint[key], expected), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(48, dtype=torch.uint8) % 2 if dtype is torch.bool else torch.arange(48, dtype=torch.uint8)
    tensors = {"w": raw.view(dtype), "empty": torch.empty(0, 3, dtype=dtype), "scalar": raw.view(dtype)[0]}
    torch.save(tensors, tmp_path / "file")
    assert_like_torch(tmp_path / "file", torch.load(tmp_path / "file", weights_only=True))


@pytest.mark.parametrize("protocol", range(1, 6))
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    tensors = {"w": torch.randn(3, 4), "b": torch.arange(3)}
    torch.save(
        {"state_dict": tensors, "name": "a" * 300, "big": 2**80, "f": 0.1}, tmp_path / "f", pickle_protocol=protocol
    )
    assert_like_torch(tmp_path / "f", tensors)
    assert open_source(tmp_path / "f").metadata == {"name": "a" * 300, "big": 2**80, "f": 0.1}


def test_views_strides_and_flags(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "sliced": base[:, 1:, ::2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(3, 1).expand(3, 5),
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "neg": torch.randn(4, dtype=torch.complex64).conj().imag,
    }
    torch.save(tensors, tmp_path / "f.pt")
    for key, found in open_source(tmp_path / "f.pt").items():
        assert torch.equal(found, tensors[key]), key
        assert found.stride() == tensors[key].stride() or key == "neg", key  # a pending sign change is carried out


def test_tied_tensors_stay_one(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"embed": weight, "head": weight, "copy": weight.clone(), "part": weight[:2]}, tmp_path / "f.pt")
    checkpoint = open_source(tmp_path / "f.pt")
    assert checkpoint["embed"].data_ptr() == checkpoint["head"].data_ptr()
    assert checkpoint.alias("embed") == checkpoint.alias("head")
    assert len({checkpoint.alias(key) for key in checkpoint}) == 3


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
def test_quantized_dtypes(tmp_path: Path, dtype: torch.dtype, per_channel: bool) -> None:
    values = torch.randn(3, 4)
    if per_channel:
        tensor = torch.quantize_per_channel(values, torch.rand(3) + 0.1, torch.tensor([0, 1, 2]), 0, dtype)
    else:
        tensor = torch.quantize_per_tensor(values, 0.1, 3, dtype)
    torch.save({"w": tensor, "t": tensor.transpose(0, 1)} if not per_channel else {"w": tensor}, tmp_path / "f.pt")
    assert_like_torch(tmp_path / "f.pt", torch.load(tmp_path / "f.pt", weights_only=True))


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("view", ["row", "none", "end"])
def test_empty_views(tmp_path: Path, view: str, zip_file: bool) -> None:
    """Their offset may lie behind the end of the storage; nothing is there to be touched."""
    empty = {"row": torch.ones(3, 4)[3:, 2:], "none": torch.empty(3, 0)[1:], "end": torch.ones(4)[4:]}[view]
    torch.save({"w": torch.ones(2), "e": empty}, tmp_path / "f.pt", _use_new_zipfile_serialization=zip_file)
    assert_like_torch(tmp_path / "f.pt", torch.load(tmp_path / "f.pt", weights_only=True))
    save(open_source(tmp_path / "f.pt"), tmp_path / "own.pt")
    assert open_source(tmp_path / "own.pt")["e"].shape == empty.shape


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("shape", [(10, 12), (3, 5), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.quint4x2, torch.quint2x4], ids=str)
def test_several_values_in_a_byte(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int], zip_file: bool) -> None:
    """Of the embeddings of few bits; each row begins with a byte of its own."""
    tensor = torch._empty_per_channel_affine_quantized(
        shape, scales=torch.rand(shape[0]) + 1, zero_points=torch.rand(shape[0]), axis=0, dtype=dtype
    )
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    raw.copy_(torch.arange(raw.numel(), dtype=torch.uint8))
    torch.save({"w": tensor}, tmp_path / "f.pt", _use_new_zipfile_serialization=zip_file)
    save(open_source(tmp_path / "f.pt"), tmp_path / "own.pt")
    expected = torch.load(tmp_path / "f.pt", weights_only=True)["w"]
    for name in ("f.pt", "own.pt"):
        found = open_source(tmp_path / name)["w"]
        assert (found.dtype, found.shape, found.qscheme()) == (dtype, shape, expected.qscheme())
        bits = [torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()) for value in (found, expected)]
        assert torch.equal(bits[0][: raw.numel()], bits[1][: raw.numel()])


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("zero_points", [[181.98, -3.5, 0.25], [0.0, 0.0, 0.0]])
def test_zero_points_that_are_no_integers(tmp_path: Path, zero_points: list[float], zip_file: bool) -> None:
    """Of a quantized embedding; torch writes the word of the scheme for integers for them, too."""
    tensor = torch.quantize_per_channel(torch.randn(3, 4), torch.rand(3), torch.tensor(zero_points), 0, torch.quint8)
    torch.save({"w": tensor}, tmp_path / "f.pt", _use_new_zipfile_serialization=zip_file)
    expected = torch.load(tmp_path / "f.pt", weights_only=True)["w"]
    assert expected.qscheme() is torch.per_channel_affine_float_qparams
    found = open_source(tmp_path / "f.pt")["w"]
    assert same(found, expected)
    assert torch.equal(found.q_per_channel_zero_points(), tensor.q_per_channel_zero_points())
    assert torch.equal(found.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(("scale", "zero_point"), [(float("nan"), 0), (0.0, 0), (-1.0, 0), (1.0, 10**6)])
def test_impossible_qparams(tmp_path: Path, scale: float, zero_point: int) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.5, 7, torch.quint8)
    torch.save({"fc.weight": tensor}, tmp_path / "f.pt")
    # The file is edited, since torch itself makes no such tensor: G is BINFLOAT 0.5, K is BININT1 7.
    _edit(tmp_path / "f.pt", [
        (b"G" + np.array(0.5, ">f8").tobytes(), b"G" + np.array(scale, ">f8").tobytes()),
        (b"K\x07", b"J" + zero_point.to_bytes(4, "little")),
    ])  # fmt: skip
    with pytest.raises(QParamError) as error:
        open_source(tmp_path / "f.pt")["fc.weight"]
    assert error.value.key == "fc.weight"
    assert error.value.file == str(tmp_path / "f.pt")


def _edit(path: Path, replacements: list[tuple[bytes, bytes]]) -> None:
    """Rewrite the pickle of a torch file."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    for old, new in replacements:
        assert old in records[name]
        records[name] = records[name].replace(old, new, 1)
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data)


def test_versions_come_from_the_state_dict(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    torch.save({"model": model.state_dict()}, tmp_path / "f.pt")
    assert open_source(tmp_path / "f.pt").versions == model.state_dict()._metadata


def test_training_state_is_plain_data(tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(2)},
        "loss": np.float64(0.25),
        "history": np.arange(3),
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.99), path=Path("runs/a")),
        "tags": {"a"},
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
        "groups": collections.defaultdict(list, {1: [2]}),
        "raw": bytearray(b"xy"),
        "qconfig": torch.ao.quantization.get_default_qat_qconfig("x86"),
        "best": torch.tensor([1.0, 2.0]),
    }
    torch.save(state, tmp_path / "f.pt")
    found = open_source(tmp_path / "f.pt").metadata
    assert found["loss"] == 0.25
    assert found["history"].tolist() == [0, 1, 2]
    assert found["args"] == {"lr": 0.1, "betas": [0.9, 0.99], "path": "runs/a"}
    assert (found["tags"], found["size"], found["device"], found["dtype"]) == (["a"], [1, 2], "cuda:1", torch.float16)
    assert (found["groups"], found["raw"]) == ({1: [2]}, b"xy")
    assert found["qconfig"]["class"] == "torch.ao.quantization.qconfig.QConfig"
    assert found["best"].spec == ((2,), torch.float32)
    assert found["best"].read().tolist() == [1.0, 2.0]


class Loss:
    """Stands for a class of a package that is not installed where the file is read."""

    def __init__(self) -> None:
        self.gain, self.owner = 2.0, self


def forget(name: str, *classes: type) -> types.ModuleType:
    """A module `name` that holds the classes; take it out of `sys.modules` to make it unknown."""
    module = types.ModuleType(name)
    for cls in classes:
        cls.__module__ = name
        setattr(module, cls.__name__, cls)
    sys.modules[name] = module
    return module


def test_objects_of_unknown_classes_stand_beside_the_weights(tmp_path: Path) -> None:
    forget("ghost_package", Loss)
    torch.save({"model": {"w": torch.ones(2)}, "criterion": Loss()}, tmp_path / "f.pt")
    del sys.modules["ghost_package"]
    checkpoint = open_source(tmp_path / "f.pt")
    assert checkpoint["w"].tolist() == [1.0, 1.0]
    assert checkpoint.metadata["criterion"] == {
        "class": "ghost_package.Loss",
        "gain": 2.0,
        "owner": {"class": "ghost_package.Loss"},
    }
    assert "ghost_package" not in sys.modules


def test_classes_and_functions_beside_the_weights_are_their_names(tmp_path: Path) -> None:
    about = {"activation": nn.functional.relu, "norm": nn.BatchNorm2d, "storage": torch.FloatStorage}
    torch.save({"model": {"w": torch.ones(2)}, **about}, tmp_path / "f.pt")
    assert open_source(tmp_path / "f.pt").metadata == {
        "activation": "torch.nn.functional.relu",
        "norm": "torch.nn.modules.batchnorm.BatchNorm2d",
        "storage": "<float32 storage>",
    }


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1, bias=False)
        self.register_buffer("anchors", torch.arange(4.0))
        self.register_buffer("grid", torch.zeros(2), persistent=False)
        self.act = nn.SiLU()
        self.skip = None


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.model = nn.Sequential(Block(), nn.BatchNorm2d(3))
        self.criterion = None


def test_pickled_modules_give_their_state_dict(tmp_path: Path) -> None:
    """The form of Ultralytics: half-precision modules pickled whole, the live one None, and no package to read them."""
    forget("ghost_detection", Block, Detector)
    model = Detector().half()
    torch.save(
        {"epoch": -1, "model": None, "ema": model, "updates": 7, "train_args": {"lr0": 0.01}}, tmp_path / "best.pt"
    )
    expected = model.state_dict()
    del sys.modules["ghost_detection"]
    checkpoint = open_source(tmp_path / "best.pt")
    assert list(checkpoint) == list(expected)
    assert "model.0.grid" not in checkpoint
    for key, value in expected.items():
        assert same(checkpoint[key], value), key
    assert checkpoint.metadata["updates"] == 7
    assert "ghost_detection" not in sys.modules
    assert list(open_source(tmp_path / "best.pt", select="ema")) == list(expected)


def test_a_module_saved_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(model, tmp_path / "f.pt")
    assert_like_torch(tmp_path / "f.pt", dict(model.state_dict()))


def test_modelopt_ranges_join_the_pickled_module(tmp_path: Path) -> None:
    ranges = {"0.input_quantizer._amax": torch.tensor(3.0), "0.weight_quantizer._amax": torch.ones(3, 1)}
    file = {"model": None, "ema": nn.Sequential(nn.Linear(2, 3)), "train_args": {}, "modelopt": {"ranges": ranges}}
    torch.save(file, tmp_path / "f.pt")
    assert list(open_source(tmp_path / "f.pt")) == ["0.weight", "0.bias", *ranges]


def test_packed_parameters_of_a_converted_layer(tmp_path: Path) -> None:
    weight = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    state = {"fc.scale": torch.tensor(0.1), "fc._packed_params.dtype": torch.qint8}
    torch.save({**state, "fc._packed_params._packed_params": (weight, None)}, tmp_path / "f.pt")
    checkpoint = open_source(tmp_path / "f.pt")
    assert list(checkpoint) == ["fc.scale", "fc._packed_params._packed_params.0"]
    assert torch.equal(checkpoint["fc._packed_params._packed_params.0"], weight)
    assert checkpoint.metadata["extra_state"] == {"fc._packed_params.dtype": torch.qint8}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse_csr(), "sparse"),
    ],
    ids=["coo", "meta", "csr"],
)
def test_tensors_without_a_plain_form(tmp_path: Path, value: Tensor, word: str) -> None:
    torch.save({"fc.weight": value}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=word) as error:
        open_source(tmp_path / "f.pt")["fc.weight"]
    assert error.value.key == "fc.weight"
    assert error.value.remedy


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr()], ids=["coo", "csr"])
def test_tensors_in_memory_without_a_plain_form(value: Tensor) -> None:
    with pytest.raises(CheckpointError, match="sparse") as error:
        open_source({"fc.weight": value, "fc.bias": torch.ones(2)})
    assert error.value.key == "fc.weight"


def test_files_of_the_other_byte_order(tmp_path: Path) -> None:
    tensors = {"f": torch.randn(3), "i": torch.arange(4, dtype=torch.int16), "c": torch.randn(2, dtype=torch.complex64)}
    torch.save(tensors, tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    widths = {"f/data/0": 4, "f/data/1": 2, "f/data/2": 4}
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        for name, data in records.items():
            if name in widths:
                data = np.frombuffer(data, f"<u{widths[name]}").byteswap().tobytes()
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    for key, found in open_source(tmp_path / "big.pt").items():
        assert torch.equal(found, tensors[key]), key


def test_compressed_archives_read_too(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "f.pt")
    with (
        zipfile.ZipFile(tmp_path / "f.pt") as old,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert torch.equal(open_source(tmp_path / "z.pt")["w"], torch.arange(1000.0))


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_compat.storage.mapped import MappedFile

    torch.save({f"{i}.w": torch.zeros(1000) for i in range(100)}, tmp_path / "f.pt")
    read: list[int] = []
    whole = MappedFile.tensor

    def counted(self: MappedFile, start: int, length: int) -> Tensor:
        read.append(length)
        return whole(self, start, length)

    monkeypatch.setattr(MappedFile, "tensor", counted)
    checkpoint = open_source(tmp_path / "f.pt")
    assert checkpoint.spec("7.w") == ((1000,), torch.float32)
    assert read == []
    assert checkpoint["7.w"].shape == (1000,)
    assert read == [4000]


def test_time_to_open_is_linear_in_the_number_of_keys(tmp_path: Path) -> None:
    """Counted in operations of the pickle machine, which no busy machine can change."""
    from qat_compat.storage import opcodes

    counts = []
    for keys in (100, 200, 400):
        torch.save({f"{i}.w": torch.zeros(1) for i in range(keys)}, tmp_path / "f.pt")
        steps = 0
        original = dict(opcodes.OPERATIONS)

        def counting(operation):  # type: ignore[no-untyped-def]
            def run(machine: object) -> None:
                nonlocal steps
                steps += 1
                operation(machine)

            return run

        try:
            opcodes.OPERATIONS.update({code: counting(operation) for code, operation in original.items()})
            open_source(tmp_path / "f.pt")
        finally:
            opcodes.OPERATIONS.update(original)
        counts.append(steps)
    assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0]), rel=0.05)


def test_numpy_arrays_as_weights(tmp_path: Path) -> None:
    """detectron2's model zoo stores arrays."""
    arrays = {"stem.conv.weight": np.random.default_rng(0).normal(size=(2, 3)), "stem.n": np.array([1], ">i4")}
    torch.save({"model": arrays, "iteration": 3}, tmp_path / "f.pth")
    checkpoint = open_source(tmp_path / "f.pth")
    assert torch.equal(checkpoint["stem.conv.weight"], torch.from_numpy(arrays["stem.conv.weight"]))
    assert checkpoint["stem.n"].tolist() == [1]


def test_a_stream_of_bytes_is_no_source() -> None:
    with pytest.raises(CheckpointError, match="no source"):
        open_source(io.BytesIO(pickle.dumps({})))  # type: ignore[arg-type]
