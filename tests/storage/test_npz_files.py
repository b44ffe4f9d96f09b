"""numpy's archives; the oracle is numpy.load."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qat_compat.errors import CheckpointError, LimitError, UnsafeCheckpointError
from qat_compat.storage import open_source


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_like_numpy(tmp_path: Path, write: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "f": rng.normal(size=(3, 4)),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4)).astype("f4")),
        "big": rng.integers(0, 100, 5).astype(">i4"),
        "flags": np.array([True, False]),
        "half": np.ones((2, 1), "f2"),
        "complex": np.array([1 + 2j], "c8"),
        "scalar": np.array(3, "u2"),
        "empty": np.zeros((0, 2), "i8"),
    }
    write(tmp_path / "f.npz", **arrays)
    checkpoint = open_source(tmp_path / "f.npz")
    assert list(checkpoint) == list(arrays)
    for key, expected in np.load(tmp_path / "f.npz").items():
        assert checkpoint.spec(key).shape == expected.shape
        np.testing.assert_array_equal(checkpoint[key].numpy(), expected)
        assert checkpoint[key].numpy().dtype == expected.dtype.newbyteorder("=")


def test_arrays_of_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", w=np.array([{}], dtype=object))
    with pytest.raises(UnsafeCheckpointError, match="pickled") as error:
        open_source(tmp_path / "f.npz")
    assert error.value.key == "w.npy"


def test_a_dtype_that_torch_has_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", w=np.array(["a"]))
    with pytest.raises(CheckpointError, match="dtype"):
        open_source(tmp_path / "f.npz")


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", w=np.full(100, 7, "u1"))
    data = (tmp_path / "f.npz").read_bytes()
    (tmp_path / "f.npz").write_bytes(data.replace(b"\x07" * 100, b"\x07" * 99 + b"\x06"))
    checkpoint = open_source(tmp_path / "f.npz")
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint["w"]
    assert open_source(tmp_path / "f.npz", verify=False)["w"][-1] == 6


def test_a_record_that_inflates_without_end(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", bytes(64 << 20))
    assert (tmp_path / "f.npz").stat().st_size < 1 << 17
    with pytest.raises(LimitError, match="inflate"):
        open_source(tmp_path / "f.npz")
