"""torchao's own safetensors: tensor subclasses in their flat form, as its `unflatten_tensor_state_dict` takes them.

An integer weight becomes an `Int8Tensor` where it has 8 bits, is symmetric and its inputs are symmetric or not
quantized; else an `IntxUnpackedToInt8Tensor`, which can have asymmetric inputs. Both compute `(q - zero_point) * scale`
in float32 and round to their dtype, which is what the weight is (torchao 0.18).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qat_compat.errors import PlanError, Problem, ProblemKind, SaveError
from qat_compat.schema import Integers, Spec
from qat_compat.storage import Checkpoint, save
from qat_compat.writers.job import Job, Layer

__all__ = ["write"]


def write(job: Job) -> None:
    """One `.safetensors` file; what each subclass is stands in its header."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    _check(job)
    layers = job.layers()
    _check_inputs(job, layers)
    # The header comes first and needs no data: the same tensors without any give it.
    outline = {
        name: _subclass(layers[name], _empty(layers[name])) if name in layers else _like(job.floats.spec(name))
        for name in job.floats
    }
    flat, header = flatten_tensor_state_dict(outline)
    owners = {key: name for name in layers for key in flatten_tensor_state_dict({name: outline[name]})[0]}

    def read(key: str) -> Tensor:
        if key not in owners:
            return job.floats[key]
        name = owners[key]
        tensors: Mapping[str, Tensor] = flatten_tensor_state_dict({name: _subclass(layers[name])})[0]
        return tensors[key]

    specs = {key: Spec(tuple(value.shape), value.dtype) for key, value in flat.items()}
    save(Checkpoint(specs, read, name=job.source.checkpoint.name), job.out, header=header)


def _check(job: Job) -> None:
    if job.out.suffix != ".safetensors":
        raise SaveError(
            "torchao's flat form is a safetensors file", file=job.out, expected="a name that ends in .safetensors",
            found=job.out.name, remedy="rename it",
        )  # fmt: skip
    bare = [name for name in job.floats if "." not in name]
    if bare:
        detail = "torchao's reader takes no tensor of the outermost module"
        raise PlanError([Problem(ProblemKind.MISMATCHED, name, detail) for name in bare], file=job.out)


def _check_inputs(job: Job, layers: Mapping[str, Layer]) -> None:
    odd = [layer for layer in layers.values() if layer.grid.inputs == "symmetric" and not _is_int8(layer)]
    if odd:
        detail = "torchao has no tensor for such weights with symmetric inputs"
        problems = [Problem(ProblemKind.LOSSY, layer.name, detail, "write it as float") for layer in odd]
        raise PlanError(problems, file=job.source.checkpoint.name)


def _is_int8(layer: Layer) -> bool:
    return layer.grid.bits == 8 and layer.symmetric and layer.grid.inputs != "asymmetric"


def _subclass(layer: Layer, integers: Integers | None = None) -> Any:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    values, scale, zero = integers if integers is not None else layer.integers()
    zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero.to(torch.int8)
    block = [1, layer.grid.group]
    if _is_int8(layer):
        kwargs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if layer.grid.inputs else None
        return Int8Tensor(values, scale, block, layer.dtype, zero, act_quant_kwargs=kwargs)
    inputs = "int8_asym_per_token" if layer.grid.inputs else None
    kind = getattr(torch, f"int{layer.grid.bits}")
    return IntxUnpackedToInt8Tensor(values, scale, zero, kind, block, layer.dtype, inputs)


def _empty(layer: Layer) -> Integers:
    scale = torch.empty(layer.shape[0], layer.groups, dtype=layer.grid.scale, device="meta")
    return Integers(torch.empty(layer.shape, dtype=torch.int8, device="meta"), scale, None)


def _like(spec: Spec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
