"""What every key of a checkpoint or of a model means.

A :class:`Schema` is data: it is made by a framework file from a model or from the keys of a checkpoint, and it is all
that matching and planning ever see.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "UNKNOWN",
    "UNROUNDED",
    "Entry",
    "Fused",
    "Integers",
    "Recipe",
    "Role",
    "Rounding",
    "Schema",
    "Spec",
    "Stage",
]


UNKNOWN = (-1,)
"""The shape of a tensor of which only the name is known."""

UNROUNDED = "what its own quantizers make of it"
"""Of a weight that a prepared model does not round to integers that are known."""


class Spec(NamedTuple):
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Role(Enum):
    """What a tensor is for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # captured by a tracer from the program, or fixed by a quantizer's definition
    EXTRA = "extra_state"  # a module's own `get_extra_state`
    SCALE = "scale"
    ZERO_POINT = "zero_point"
    MIN = "min_val"
    MAX = "max_val"
    HISTOGRAM = "histogram"
    AMAX = "amax"
    SMOOTHING = "smoothing"  # a factor of the layer's input that the stored weight has been divided by
    EPS = "eps"
    ENABLED = "enabled"  # switches of a quantizer: observer, fake-quant, learning
    PACKED = "packed"  # a tensor that holds several others, or values of fewer bits than its dtype

    @property
    def is_float_entry(self) -> bool:
        """Whether the unprepared float model holds this tensor too."""
        return self in (Role.PARAMETER, Role.BUFFER, Role.EXTRA)

    @property
    def is_observed(self) -> bool:
        """Whether a quantizer learns this value from what it sees."""
        return self in (Role.SCALE, Role.ZERO_POINT, Role.MIN, Role.MAX, Role.HISTOGRAM, Role.AMAX)


class Stage(Enum):
    """How far along the way from float to integer a set of tensors is.

    It is read off the keys, unless :func:`qat_compat.save_checkpoint` wrote it down. Two stages leave no trace in the
    keys, so that only such a file, or the module itself, can tell them:

    * a model whose quantizers are all dynamic (torchao's `QATConfig` by default) has the keys of the float model: its
      bare state_dict is FLOAT;
    * where batch normalization was folded into the weights, a layer looks like one that never had any: FOLDED is only
      ever said of what this package folded.
    """

    FLOAT = "float"
    FOLDED = "folded"
    PREPARED = "prepared"
    CONVERTED = "converted"


class Entry(NamedTuple):
    """The meaning of one key.

    Args:
        site: Where the tensor belongs, in the float model's own words: `block.bn1.weight` for a parameter or buffer,
            `weight:block.conv1`, `input:fc` or `output:block.relu` for the state of a quantizer.
        role: What the tensor is.
        shape: Its shape.
        dtype: Its dtype.
        quantizer: Name of the quantizer that the tensor belongs to, or "".
        leaf: Name of the tensor within its quantizer, in today's words (`activation_post_process.min_val`).
        hidden: Whether it is an attribute that the model's state_dict does not hold.
        optional: Why a float checkpoint may lack it by design, or "".
    """

    site: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    quantizer: str = ""
    leaf: str = ""
    hidden: bool = False
    optional: str = ""

    @property
    def spec(self) -> Spec:
        return Spec(self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Fused:
    """A batch normalization that fusion moved under another module, so that its own name is not in its keys.

    Args:
        prefix: Where it is now (`conv1.bn`).
        host: The module that it was fused into, in the float model's words (`conv1`).
        channels: Its number of features.
        tensors: Names of what it holds (`weight`, `running_mean`, ...).
        record: Gives the candidates, when they are asked for: it may have to trace the model.
        witness: What the candidates rest on.
        certain: Whether it is known that fusion took place; from keys alone, `conv.0` and `conv.1` may be a fused
            pair that was not prepared, or a Sequential of the float model's own.
    """

    prefix: str
    host: str
    channels: int
    tensors: tuple[str, ...]
    record: Callable[[], tuple[str, ...]] = tuple
    witness: str = ""
    certain: bool = True

    @property
    def candidates(self) -> tuple[str, ...]:
        """Float module paths that the flow's own record allows; empty where the record is silent."""
        return self.record()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a tensor that a checkpoint does not hold as such is computed from those that it holds.

    Example:
        >>> import torch
        >>> recipe = Recipe(("fc.qweight", "fc.scale"), "integers times their scale", lambda q, scale: q * scale)
        >>> recipe.compute(torch.tensor([2, -1]), torch.tensor(0.5))
        tensor([ 1.0000, -0.5000])

    Args:
        sources: Keys of the checkpoint, in the order in which `compute` takes their tensors.
        how: The computation in words, for the report.
        compute: The computation.
    """

    sources: tuple[str, ...]
    how: str
    compute: Callable[..., Tensor]


class Integers(NamedTuple):
    """A weight as the integers that it was rounded to: it is `(values - zero_point) * scale`.

    Args:
        values: (rows, columns) int8.
        scale: (rows, groups); each is for `columns / groups` neighbours.
        zero_point: Like `scale`, of an integer dtype; None where all are 0.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True, slots=True)
class Rounding:
    """The integers behind a weight, for those who write it in another form.

    Args:
        bits: Of each integer, which is signed.
        group: Number of neighbours in a row that share a scale.
        scale: dtype of the scales.
        inputs: What becomes of the layer's inputs: "" (nothing), "symmetric" or "asymmetric" (8 bits, computed anew
            for each token), or in other words whatever else it is.
        symmetric: Whether all zero points are 0; None where only the tensors tell.
        sources: Keys of the checkpoint, in the order in which `compute` takes their tensors.
        compute: The integers.
    """

    bits: int
    group: int
    scale: torch.dtype
    inputs: str
    symmetric: bool | None
    sources: tuple[str, ...]
    compute: Callable[..., Integers]


@dataclass(frozen=True)
class Schema(Mapping[str, Entry]):
    """Meaning of every key of one model or checkpoint, in its own order.

    Example:
        >>> import torch
        >>> schema = Schema({"fc.weight": Entry("fc.weight", Role.PARAMETER, (3, 4), torch.float32)})
        >>> schema["fc.weight"].role.value, schema.stage.value
        ('parameter', 'float')

    Args:
        entries: key -> :class:`Entry`. The sites of tensors under a :class:`Fused` prefix are provisional
            (`conv1.bn.weight`).
        framework: Name of the framework file that wrote it.
        stage: Float, folded, prepared or converted.
        fused: Batch normalizations whose float name is not in their keys.
        places: Modules that exist without tensors (an `nn.Identity` left behind by fusion, say), if that is known.
        non_persistent: Buffers of the model that its state_dict does not hold.
        recorded: Whether the sites were written down by a system that knew them, rather than read off the keys.
        recipes: Key -> how its tensor is computed; such a key stands for a tensor that the checkpoint holds in
            another form.
        grids: Quantizer name -> the grid of its integers (`-128..127 symmetric`), where that is known.
        roundings: Key of a weight -> the integers that it is rounded to, or what it is instead.
        unreadable: Name of a tensor -> why no recipe gives it, where a framework knows.
        folds: Whether its conversion folds normalizations into the layers before them.
        doubtful: Keys whose tensors may be out of use, which only the model that wrote them tells.
    """

    entries: Mapping[str, Entry]
    framework: str = "plain"
    stage: Stage = Stage.FLOAT
    fused: tuple[Fused, ...] = ()
    places: frozenset[str] = frozenset()
    non_persistent: frozenset[str] = frozenset()
    recorded: bool = False
    recipes: Mapping[str, Recipe] = field(default_factory=dict, repr=False)
    grids: Mapping[str, str] = field(default_factory=dict, repr=False)
    roundings: Mapping[str, Rounding | str] = field(default_factory=dict, repr=False)
    unreadable: Mapping[str, str] = field(default_factory=dict, repr=False)
    folds: bool = False
    doubtful: frozenset[str] = frozenset()

    def __getitem__(self, key: str) -> Entry:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def items(self) -> ItemsView[str, Entry]:
        return self.entries.items()  # not key by key, as a Mapping does

    def float_keys(self) -> Sequence[str]:
        """Keys whose tensors the unprepared float model holds too."""
        return self._float_keys

    @cached_property
    def _float_keys(self) -> Sequence[str]:
        return [key for key, entry in self.entries.items() if entry.role.is_float_entry]

    def by_quantizer(self) -> Mapping[str, list[str]]:
        """Quantizer name -> the keys of its state."""
        return self._by_quantizer

    @cached_property
    def _by_quantizer(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, entry in self.entries.items():
            if entry.quantizer:
                found.setdefault(entry.quantizer, []).append(key)
        return found

    def undecoded(self) -> list[str]:
        """Keys of integers from which no float tensor can be computed."""
        used = {key for recipe in self.recipes.values() for key in recipe.sources}
        return [key for key, entry in self.entries.items() if entry.role is Role.PACKED and key not in used]
