"""numpy's values in a pickle, rebuilt from their bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qat_compat.storage.standins import NumpyArray, NumpyDtype, Opaque

__all__ = ["make_array", "numpy_dtype", "numpy_from_buffer", "numpy_scalar"]


def numpy_dtype(code: Any, *_: Any) -> NumpyDtype:
    if not isinstance(code, str):
        raise TypeError(f"a numpy dtype in a {type(code).__name__}")
    return NumpyDtype(code)


def numpy_scalar(dtype: NumpyDtype, data: Any = None) -> Any:
    made = dtype.make()
    if made is None or not isinstance(data, bytes):
        return Opaque("numpy.scalar", (dtype.code,))
    if len(data) != made.itemsize:
        raise ValueError(f"{len(data)} bytes for a numpy scalar of {made.itemsize}")
    return np.frombuffer(data, made)[0].item()


def make_array(data: Any, dtype: NumpyDtype, shape: Any, order: str) -> np.ndarray[Any, Any] | None:
    made = dtype.make()
    if made is None or not isinstance(data, bytes):
        return None  # an array of Python objects
    shape = tuple(shape)
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * made.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for a numpy array of shape {shape}")
    values = np.frombuffer(data, made)
    return values.reshape(shape, order="F" if order == "F" else "C")


def numpy_from_buffer(data: Any, dtype: NumpyDtype, shape: Any, order: str, *_: Any) -> NumpyArray:
    if not isinstance(data, (bytes, bytearray, memoryview)):  # `bytes(2**40)` would be that many zeros
        raise TypeError(f"the bytes of a numpy array in a {type(data).__name__}")
    made = NumpyArray()
    made.array = make_array(bytes(data), dtype, shape, order)
    return made
