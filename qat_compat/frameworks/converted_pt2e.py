"""PT2E after `convert_pt2e`: integers beside the float tensors that they were rounded from.

What is known here, and what it rests on (torchao 0.18):

* `_frozen_param0` is an int8 weight; `_scale_0` and `_zero_point_0` are its qparams where there is one per channel. One
  pair for a whole tensor is a number in the graph, which no state_dict holds.
* The float weight stays under its own name, with the normalization folded into it; a convolution without a bias got a
  parameter of its own for the folded one, `conv.weight_bias`. The integers are exactly this weight, rounded, and that
  is what tells which integers are whose: the numbers follow the order of the graph.
* The folded normalization stays in the state_dict too, out of use. Only the graph tells whether one is still called,
  so that is written beside the weights when such a model is saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor

from qat_compat.errors import QParamError
from qat_compat.frameworks.base import KeyView, ModelView, plain_entry
from qat_compat.frameworks.key_tables import Decoded, KeyedFramework, Place, decode_each
from qat_compat.schema import Recipe, Role, Schema, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["ConvertedPT2E"]

_FROZEN = re.compile(r"(?:.+\.)?_frozen_param\d+$")
_CONSTANT = re.compile(r"(?:.+\.)?_(?:scale|zero_point)_\d+$")
_NEW_BIAS = "weight_bias"
# the class token of a transformer, say, expanded to the batch and then rounded
_COMPUTED = "what the graph computes from float tensors of the file, rounded"
FOLDED = "a normalization that is folded into a convolution, and out of use"


class ConvertedPT2E(KeyedFramework):
    """torchao's export flow after `convert_pt2e`."""

    name = "pt2e"
    live_stage = Stage.CONVERTED
    folds = True

    def owns_model(self, view: ModelView) -> bool:
        return any(slot.tensor.dtype is torch.int8 and _FROZEN.match(key) for key, slot in view.slots.items())

    def owns_keys(self, view: KeyView) -> bool:
        return any(spec.dtype is torch.int8 and _FROZEN.match(key) is not None for key, spec in view.kinds)

    def stage(self, view: KeyView) -> Stage:
        return Stage.CONVERTED

    def place(self, key: str, spec: Spec) -> Place | None:
        if _FROZEN.match(key) is not None:
            return Place(key, f"constant:{key}", "", Role.PACKED)
        if _CONSTANT.match(key) is not None:
            return Place(key, f"constant:{key}", "", Role.SCALE if "_scale_" in key else Role.ZERO_POINT)
        return None

    def describe_keys(self, view: KeyView) -> Schema:
        schema = super().describe_keys(view)
        folded = view.record.get("folded")
        used = {key for recipe in schema.recipes.values() for key in recipe.sources}
        entries = dict(schema.entries)
        for key, entry in schema.entries.items():
            parent, leaf = split_path(key)
            if leaf == _NEW_BIAS:
                entries[key] = plain_entry(join_path(parent, "bias"), entry.spec)
            elif isinstance(folded, Sequence) and parent in folded:
                entries[key] = entry._replace(role=Role.CONSTANT, optional=FOLDED)
            elif entry.role is Role.PACKED and key not in used:
                entries[key] = entry._replace(role=Role.CONSTANT, optional=_COMPUTED)
        norms = {split_path(key)[0] for key in entries if folded is None and split_path(key)[1] == "running_mean"}
        doubtful = frozenset(key for key in entries if split_path(key)[0] in norms)
        return replace(schema, entries=entries, recorded=folded is not None, doubtful=doubtful)

    def decoded(self, view: KeyView) -> Mapping[str, Decoded | str]:
        recorded = view.record.get("integers")
        if isinstance(recorded, Mapping):
            names = [weight for weight in recorded if weight in view.specs]
            return decode_each(names, view, lambda name: _recorded(name, recorded[name], view))
        integers: dict[tuple[int, ...], list[str]] = {}
        weights: dict[tuple[int, ...], list[str]] = {}
        scales = [key for key in view.specs if _CONSTANT.match(key) and "_scale_" in key]
        for key, spec in view.specs.items():
            if _FROZEN.match(key) is not None:
                integers.setdefault(spec.shape, []).append(key)
            elif spec.dtype.is_floating_point and not _CONSTANT.match(key):
                weights.setdefault(spec.shape, []).append(key)
        found: dict[str, Decoded | str] = {}
        for shape, frozen in integers.items():
            fitting = [key for key in scales if view.specs[key].shape[:1] and view.specs[key].shape[0] in shape]
            others = [*fitting, *(key.replace("_scale_", "_zero_point_") for key in fitting)]
            group = _Group(tuple(weights.get(shape, ())), len(frozen), len(fitting))
            for index, key in enumerate(group.weights):
                recipe = Recipe(
                    (*group.weights, *frozen, *others),
                    "the integers that are this weight, rounded",
                    partial(group.value, index),
                )
                found[key] = Decoded(plain_entry(key, view.specs[key]), recipe)
        return found

    def record(self, view: ModelView) -> Mapping[str, Any]:
        """Whose integers are whose, and which normalizations are out of use: what only the graph tells."""
        used = {
            str(node.target)
            for root in view.modules.values()
            if isinstance(root, torch.fx.GraphModule)
            for node in root.graph.nodes
            if node.op == "get_attr"
        }
        norms = {split_path(key)[0] for key in view.slots if split_path(key)[1] == "running_mean"}
        folded = sorted(norm for norm in norms if join_path(norm, "running_mean") not in used)
        return {"folded": folded, "integers": _integers(view)}


def _integers(view: ModelView) -> dict[str, dict[str, Any]]:
    """Float weight -> where its integers and their qparams are."""
    weights = {k: s.tensor for k, s in view.slots.items() if s.tensor.is_floating_point() and not _CONSTANT.match(k)}
    by_shape: dict[torch.Size, list[str]] = {}
    for key, tensor in weights.items():
        by_shape.setdefault(tensor.shape, []).append(key)
    found: dict[str, dict[str, Any]] = {}
    for path, root in view.modules.items():
        if not isinstance(root, torch.fx.GraphModule):
            continue
        for node in root.graph.nodes:
            source = node.args[0] if node.args else None
            if "dequantize_per_" not in str(node.target) or not _is_frozen(source):
                continue
            assert isinstance(source, torch.fx.Node)
            one = _qparams(path, node)
            integers = view.slots[one["integers"]].tensor
            scale, zero_point = (
                view.slots[value].tensor if isinstance(value, str) else _number(value)
                for value in (one["scale"], one["zero_point"])
            )
            for key in by_shape.get(integers.shape, ()):
                if key not in found and _is_rounded(weights[key], integers, scale, zero_point, one["axis"]):
                    found[key] = one
                    break
    return found


def _is_frozen(node: object) -> bool:
    return isinstance(node, torch.fx.Node) and node.op == "get_attr" and bool(_FROZEN.match(str(node.target)))


def _qparams(path: str, node: torch.fx.Node) -> dict[str, Any]:
    values = [join_path(path, str(value.target)) if isinstance(value, torch.fx.Node) else value for value in node.args]
    axis = values[3] if "per_channel" in str(node.target) else None
    return {"integers": values[0], "scale": values[1], "zero_point": values[2], "axis": axis}


def _recorded(weight: str, how: Mapping[str, Any], view: KeyView) -> Decoded:
    tensors = [how[name] for name in ("integers", "scale", "zero_point") if isinstance(how[name], str)]

    spec = view.specs[weight]

    def compute(integers: Tensor, *qparams: Tensor) -> Tensor:
        scale, zero_point = qparams or (_number(how["scale"]), _number(how["zero_point"]))
        return _dequantized(integers, scale, zero_point, how["axis"], spec.dtype)

    return Decoded(plain_entry(weight, spec), Recipe(tuple(tensors), "integers times their scale", compute))


def _number(value: float) -> Tensor:
    """A literal of the graph, in the precision that it has there."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


class _Group:
    """Float weights and integers of one shape, of which the values alone tell which belong together.

    They are paired when the first weight is asked for: in the order of the graph, which nearly always is that of the
    keys, so that the first pair that is tried fits.

    Args:
        weights: Keys of all weights of the shape.
        integers: Number of integer tensors of the shape.
        scales: Number of per-channel scales that may be theirs.
    """

    def __init__(self, weights: tuple[str, ...], integers: int, scales: int) -> None:
        self.weights, self.integers, self.scales = weights, integers, scales
        self._pairs: dict[int, tuple[int, int, int]] | None = None  # weight -> integers, scale, axis
        self._are_explained = False  # whether all integers are some weight

    def value(self, index: int, *tensors: Tensor) -> Tensor:
        """The float values of a weight's integers, or the weight itself where every integer tensor is another's."""
        weights, rest = tensors[: len(self.weights)], tensors[len(self.weights) :]
        integers, rest = rest[: self.integers], rest[self.integers :]
        qparams = list(zip(rest[: self.scales], rest[self.scales :], strict=True))
        if self._pairs is None:
            self._pairs = self._paired(weights, integers, qparams)
            self._are_explained = len({which for which, *_ in self._pairs.values()}) == len(integers)
        if index not in self._pairs:
            if not self._are_explained:
                name = self.weights[index]
                raise QParamError(
                    f"integers of the shape of {name} are no weight of the file, rounded with one of its scales",
                    key=name,
                    expected="every integer tensor beside its scale and the float weight that it was rounded from",
                    found="perhaps one scale for the whole tensor, which is a number in the graph and in no file",
                    remedy="pass the converted module, or the file that save_checkpoint writes of it",
                )
            return weights[index]
        which, scale, axis = self._pairs[index]
        return _dequantized(integers[which], *qparams[scale], axis, weights[index].dtype)

    def _paired(
        self, weights: Sequence[Tensor], integers: Sequence[Tensor], qparams: Sequence[tuple[Tensor, Tensor]]
    ) -> dict[int, tuple[int, int, int]]:
        found: dict[int, tuple[int, int, int]] = {}
        left, free = dict(enumerate(integers)), dict(enumerate(qparams))
        for index, weight in enumerate(weights):
            one = _find(weight, left, free) or _find(weight, dict(enumerate(integers)), dict(enumerate(qparams)))
            if one is not None:
                found[index] = one
                left.pop(one[0], None)
                free.pop(one[1], None)
        return found


def _find(
    weight: Tensor, integers: Mapping[int, Tensor], qparams: Mapping[int, tuple[Tensor, Tensor]]
) -> tuple[int, int, int] | None:
    """Which integers are `weight`, rounded, with which scale along which axis."""
    for which, candidate in integers.items():
        for number, (scale, zero_point) in qparams.items():
            for axis in (axis for axis, size in enumerate(weight.shape) if size == len(scale)):
                if _is_rounded(weight, candidate, scale, zero_point, axis):
                    return which, number, axis
    return None


def _shaped(value: Tensor, axis: int | None, dims: int) -> Tensor:
    return value if axis is None else value.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def _is_rounded(weight: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> bool:
    """Whether the integers are the weight on this grid; one row is enough to tell most that are not."""
    if axis is not None and scale.numel() != weight.shape[axis]:
        return False
    by, zero = _shaped(scale, axis, weight.dim()), _shaped(zero_point, axis, weight.dim())
    for part in (slice(0, 1), slice(None)):
        by_row, zero_row = (value[part] if axis == 0 else value for value in (by, zero))
        grid = torch.round(weight[part] * (1.0 / by_row)) + zero_row
        if not torch.equal(grid.clamp(-128, 127).to(torch.int8), integers[part]):
            return False
    return True


def _dequantized(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """`(integers - zero_point) * scale`, as `quantized_decomposed.dequantize_per_channel` computes it."""
    by, zero = _shaped(scale, axis, integers.dim()), _shaped(zero_point, axis, integers.dim())
    return ((integers.to(torch.int32) - zero) * by).to(dtype)
