"""A compressed-tensors folder: `model.safetensors`, and `config.json` with its `quantization_config`.

8 bits with quantized inputs are written as `int-quantized`, all else as `pack-quantized`; layers are named one by one,
since a class cannot be told from a key. compressed-tensors 0.20 decompresses to `(q - zero_point) * scale`, in the
dtype of the scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_compat import packing
from qat_compat.errors import CheckpointError
from qat_compat.schema import Spec
from qat_compat.state import split_path
from qat_compat.storage import Checkpoint, new_folder, save
from qat_compat.storage.beside import is_there, json_beside
from qat_compat.writers.job import Job, Layer

__all__ = ["write"]

_MOST = 16 << 20  # bytes of a config.json
_INTEGERS, _WORDS = "int-quantized", "pack-quantized"


def write(job: Job) -> None:
    """The folder; the `config.json` of the source's own folder is kept beside what is added to it."""
    layers = job.layers()
    places = {key: (name, part) for name, layer in layers.items() for key, part, _ in _parts(layer)}
    specs: dict[str, Spec] = {}
    for name in job.floats:
        if name in layers:
            specs |= {key: spec for key, _, spec in _parts(layers[name])}
        else:
            specs[name] = job.floats.spec(name)

    def read(key: str) -> Tensor:
        if key not in places:
            return job.floats[key]
        name, part = places[key]
        return _tensor(layers[name], part)

    config = {**_config_of(job), "quantization_config": _quantization_config(layers.values())}
    with new_folder(job.out) as folder:
        save(Checkpoint(specs, read, name=job.source.checkpoint.name), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _format(layer: Layer) -> str:
    return _INTEGERS if layer.grid.bits == 8 and layer.grid.inputs else _WORDS


def _parts(layer: Layer) -> Iterator[tuple[str, str, Spec]]:
    """Key, part and spec of each tensor of a layer."""
    rows, columns = layer.shape
    bits = layer.grid.bits
    packed = _format(layer) == _WORDS
    if packed:
        yield f"{layer.name}_packed", "packed", Spec((rows, packing.packed_size(columns, bits)), torch.int32)
        yield f"{layer.name}_shape", "shape", Spec((2,), torch.int64)
    else:
        yield layer.name, "values", Spec(layer.shape, torch.int8)
    yield f"{layer.name}_scale", "scale", Spec((rows, layer.groups), layer.grid.scale)
    if not layer.symmetric:
        shape = (packing.packed_size(rows, bits) if packed else rows, layer.groups)
        yield f"{layer.name}_zero_point", "zero_point", Spec(shape, torch.int32 if packed else torch.int8)


def _tensor(layer: Layer, part: str) -> Tensor:
    if part == "shape":
        return torch.tensor(layer.shape, device="cpu")
    values, scale, zero = layer.integers()
    if part == "scale":
        return scale
    if part == "zero_point":
        assert zero is not None
        small = zero.to(torch.int8)
        return packing.pack(small.t(), layer.grid.bits).t() if _format(layer) == _WORDS else small
    return packing.pack(values, layer.grid.bits) if part == "packed" else values


def _quantization_config(layers: Iterable[Layer]) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    for layer in layers:
        scheme = _scheme(layer)
        known = next((group for group in groups if {**group, "targets": []} == scheme), None)
        if known is None:
            groups.append(known := scheme)
        known["targets"].append(split_path(layer.name)[0])
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": [],
    }


def _scheme(layer: Layer) -> dict[str, Any]:
    grouped = layer.groups > 1
    weights: Mapping[str, Any] = {
        "num_bits": layer.grid.bits,
        "type": "int",
        "symmetric": layer.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": layer.grid.group if grouped else None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    inputs["symmetric"] = layer.grid.inputs == "symmetric"
    return {
        "targets": [],
        "weights": weights,
        "input_activations": inputs if layer.grid.inputs else None,
        "output_activations": None,
        "format": _format(layer),
    }


def _config_of(job: Job) -> dict[str, Any]:
    """The rest of the `config.json`: of the model itself, or beside the file that is read."""
    description = job.source.description
    if description is not None:
        config: Any = getattr(description.view.model, "config", None)
        return dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    place = Path(job.source.checkpoint.name)
    path = (place if place.is_dir() else place.parent) / "config.json"
    found, note = json_beside(path, _MOST) if is_there(place) else (None, "")
    if note:
        raise CheckpointError(note, file=path, remedy="mend it, or remove it to have a config.json without it")
    return dict(found) if isinstance(found, dict) else {}
