"""AIMET's JSON of quantization encodings as numbers: versions up to 0.6.1, 1.0.0, and 2.0.0 and 2.1.0.

What is known here, and what it rests on (AIMET's encoding specification; aimet-torch 2.42):

* Up to 0.6.1 an encoding is a dict per channel, with `bitwidth`, `is_symmetric` as text, `scale`, `offset`; in 1.0.0
  one dict with lists, `bw`, `is_sym`, `enc_type`. A value is `scale * (q + offset)`, with q from 0.
* From 2.0.0 on it is ONNX's: `y_scale`, `y_zero_point` on the grid of `output_dtype`, for parameters and activations
  in one list. A value is `y_scale * (q - y_zero_point)`.
* Parameters have the names of the float model's. Activations are named by ONNX, but in `_torch.encodings` by their
  module: `{"conv1": {"input": {"0": ...}, "output": {"0": ...}}}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat_compat.conventions import Grid

__all__ = ["Numbers", "Tensor", "grid_of", "named", "numbers"]

_DTYPE = re.compile(r"(u?)int(\d+)$")


class Tensor(NamedTuple):
    """A tensor that has an encoding: "param", "input" or "output" of a module, or "graph" for one that ONNX named."""

    kind: str
    name: str
    port: str
    raw: Any


class Numbers(NamedTuple):
    """One encoding: `scale * (q + offset)` with q from 0 to `2**bits - 1`, one number per channel or block."""

    bits: int
    symmetric: bool
    scale: list[float]
    offset: list[int]


def named(data: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor that has an encoding.

    Example:
        >>> found = named({"activation_encodings": {"fc": {"output": {"0": {}}}}, "param_encodings": {"fc.weight": []}})
        >>> [tensor[:3] for tensor in found]
        [('param', 'fc.weight', ''), ('output', 'fc', '0')]
    """
    for name, raw in _pairs(data.get("param_encodings")):
        yield Tensor("param", name, "", raw)
    for name, raw in _pairs(data.get("activation_encodings")):
        sides = raw.keys() & {"input", "output"} if isinstance(raw, Mapping) else ()
        if not sides:
            yield Tensor("graph", name, "", raw)
        for side in sorted(sides):
            for index, one in _pairs(raw[side]):
                yield Tensor(side, name, index, one)
    for name, raw in _pairs(data.get("encodings")):
        yield Tensor("", name, "", raw)  # only the names of the parameters tell them apart


def _pairs(section: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(section, Mapping):
        yield from ((str(name), raw) for name, raw in section.items())
    elif isinstance(section, list):
        yield from ((str(raw["name"]), raw) for raw in section if isinstance(raw, Mapping) and "name" in raw)


def numbers(raw: Any) -> Numbers | str | None:
    """An encoding, or why it is not read; None for floating point, which has no range.

    Example:
        >>> numbers([{"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "offset": -128, "scale": 0.5}])
        Numbers(bits=8, symmetric=True, scale=[0.5], offset=[-128])
        >>> numbers({"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 41})
        Numbers(bits=8, symmetric=False, scale=[0.5], offset=[-41])
    """
    rows = raw if isinstance(raw, list) else [raw]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        return "it is no encoding"
    first = rows[0]
    if str(first.get("dtype", "int")).lower() == "float" or str(first.get("output_dtype", "")).startswith("float1"):
        return None
    try:
        found = _of_onnx(first) if "output_dtype" in first else _of_lists(first) if "bw" in first else _of_rows(rows)
    except KeyError as error:
        return f"it has no {error.args[0]}"
    except (TypeError, ValueError) as error:
        return f"it is malformed: {error}"
    return found if isinstance(found, str) else _obstacle(found) or found


def _of_rows(rows: list[Mapping[str, Any]]) -> Numbers | str:
    about = {(int(row["bitwidth"]), str(row["is_symmetric"]).lower() == "true") for row in rows}
    if len(about) != 1:
        return "its channels differ in their bits"
    return Numbers(*about.pop(), _floats([row["scale"] for row in rows]), _integers([row["offset"] for row in rows]))


def _of_lists(row: Mapping[str, Any]) -> Numbers | str:
    if row.get("enc_type") == "LPBQ" or any(_floats(row.get("zero_point_shift", []))):
        return "LPBQ and shifted zero points are not read"
    return Numbers(int(row["bw"]), bool(row["is_sym"]), _floats(row["scale"]), _integers(row["offset"]))


def _of_onnx(row: Mapping[str, Any]) -> Numbers | str:
    dtype = _DTYPE.match(str(row["output_dtype"]))
    if dtype is None:
        return f"its dtype {row['output_dtype']} is not of integers"
    if "per_block_int_scale" in row or isinstance(row.get("y_scale"), Mapping):
        return "a scale that is quantized itself is not read"
    if row.get("block_size") and row.get("axis") not in (1, -1):
        return "its blocks do not lie along the rows"
    scale = _floats(row["y_scale"])
    bits = int(dtype[2])
    middle = 1 << (bits - 1)
    # from the integers of its dtype to those from 0
    zero = [value + (0 if dtype[1] else middle) for value in _integers(row.get("y_zero_point", [0] * len(scale)))]
    return Numbers(bits, all(value == middle for value in zero), scale, [-value for value in zero])


def _flat(value: Any) -> list[Any]:
    return [one for item in value for one in _flat(item)] if isinstance(value, list) else [value]


def _floats(value: Any) -> list[float]:
    return [float(one) for one in _flat(value)]


def _integers(value: Any) -> list[int]:
    found = _floats(value)
    if not all(one.is_integer() for one in found):
        raise ValueError("a zero point is not an integer")
    return [int(one) for one in found]


def _obstacle(one: Numbers) -> str:
    if not one.scale or len(one.scale) != len(one.offset):
        return f"it has {len(one.scale)} scales and {len(one.offset)} offsets"
    if not 2 <= one.bits <= 32 or not all(math.isfinite(scale) and scale > 0 for scale in one.scale):
        return "its scales are not finite and positive, or its bits not 2 to 32"
    if not all(-(1 << one.bits) < offset <= 0 for offset in one.offset):
        return "its offset is not on the grid"
    return ""


def grid_of(one: Numbers) -> tuple[Grid, bool]:
    """Its integers, and whether they are affine: a symmetric encoding has zero in the middle, or at the lower end.

    Example:
        >>> grid, affine = grid_of(Numbers(8, True, [0.5], [-127]))
        >>> grid.low, grid.high, affine
        (-127, 127, False)
    """
    middle = 1 << (one.bits - 1)
    centred = {-middle: Grid(one.bits), 1 - middle: Grid(one.bits, narrow=True), 0: Grid(one.bits, signed=False)}
    offsets = set(one.offset)
    if one.symmetric and len(offsets) == 1 and (grid := centred.get(offsets.pop())) is not None:
        return grid, False
    return Grid(one.bits, signed=False), True
