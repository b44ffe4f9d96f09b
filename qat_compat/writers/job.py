"""What is to be written: the float side of a source, and the integers behind its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qat_compat.errors import PlanError, Problem, ProblemKind
from qat_compat.floating import Like
from qat_compat.schema import UNROUNDED, Integers, Rounding, Stage
from qat_compat.source import Source
from qat_compat.state import join_path
from qat_compat.storage import Checkpoint

__all__ = ["Job", "Layer"]

_INPUTS = ("", "symmetric", "asymmetric")
_MOST_BITS = 8


@dataclass(frozen=True)
class Layer:
    """A weight that is written as integers.

    Args:
        name: Its float name.
        shape: Rows and columns.
        dtype: That of the float weight.
        grid: The integers behind it.
        symmetric: Whether all zero points are 0.
        source: Where the integers come from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    grid: Rounding
    symmetric: bool
    source: Source

    @property
    def groups(self) -> int:
        return self.shape[1] // self.grid.group

    def integers(self) -> Integers:
        """They are what the layer says of itself, or it is an error: a file's words and tensors may differ."""
        return self.source.computed(self.name, self.grid.sources, self._checked)

    def _checked(self, *tensors: Tensor) -> Integers:
        found = self.grid.compute(*tensors)
        values, scale, zero = found if not self.symmetric else found._replace(zero_point=None)
        groups = (self.shape[0], self.groups)
        if values.shape != self.shape or scale.shape != groups or (zero is not None and zero.shape != groups):
            raise ValueError(f"{list(values.shape)} integers with {list(scale.shape)} scales")
        limit = 1 << (self.grid.bits - 1)
        for part in (values, zero):
            if part is not None and part.numel() and not (-limit <= int(part.min()) and int(part.max()) < limit):
                raise ValueError(f"an integer of more than {self.grid.bits} bits")
        return Integers(values, scale, zero)


@dataclass(frozen=True)
class Job:
    """One conversion.

    Args:
        source: What is read.
        floats: The same as float tensors under the original names.
        out: Where to.
        target: Its form, in the words of `convert_checkpoint`.
        like: The float layout that was asked for.
    """

    source: Source
    floats: Checkpoint
    out: Path
    target: str
    like: Like | None = None

    def layers(self) -> dict[str, Layer]:
        """Float name -> every weight that is written as integers.

        Raises:
            PlanError: A weight is rounded to something else than integers of one scale per group, or the source does
                not tell.
        """
        problems: list[Problem] = []
        grids = self._grids()
        for key, grid in grids.items():
            if key not in self.source.schema:
                detail = "the layer computes it in every forward (pruning, a weight norm, a parametrization)"
                remedy = "make it permanent: prune.remove, remove_weight_norm or remove_parametrizations"
                problems.append(Problem(ProblemKind.MISMATCHED, key, detail, remedy))
            elif isinstance(grid, str):
                detail = f"it is {grid}, for which {self.target} has no exact form here"
                problems.append(Problem(ProblemKind.LOSSY, key, detail, "write it as float"))
            elif grid.inputs not in _INPUTS:
                detail = f"the inputs of its layer are quantized in another way ({grid.inputs}) than anew per token"
                problems.append(Problem(ProblemKind.LOSSY, key, detail, "write it as float"))
            elif not _is_sound(grid, self.floats.spec(key).shape):
                detail = f"it is said to be {grid.bits}-bit integers in groups of {grid.group}, which its shape belies"
                problems.append(Problem(ProblemKind.INVALID, key, detail, "convert the model again"))
        if not grids:
            detail = "nothing says to which integers its weights are rounded"
            remedy = "pass the prepared module, a file of it by save_checkpoint, or a converted checkpoint"
            problems.append(Problem(ProblemKind.MISSING, self.source.checkpoint.name, detail, remedy))
        if problems:
            summary = f"{self.target} cannot hold this source exactly"
            raise PlanError(problems, file=self.source.checkpoint.name, summary=summary)
        schema = self.source.schema
        found = (self._layer(schema[key].site, grid) for key, grid in grids.items() if isinstance(grid, Rounding))
        return {layer.name: layer for layer in found}

    def _grids(self) -> Mapping[str, Rounding | str]:
        """Key of every weight that is not float -> the integers behind it, or what it is instead."""
        schema, description = self.source.schema, self.source.description
        if description is None:
            decoded = schema.recipes if schema.stage is Stage.CONVERTED else {}
            return {key: recipe.how for key, recipe in decoded.items()} | dict(schema.roundings)
        found: dict[str, Rounding | str] = {}
        for quantizer in description.quantizers:
            host = join_path(quantizer.site.partition(":")[2], "weight")
            for key in (host, *quantizer.quantized_parameters()):
                if key in schema:
                    found.setdefault(key, UNROUNDED)
            found |= quantizer.roundings()
        return found

    def _layer(self, name: str, grid: Rounding) -> Layer:
        shape, dtype = self.floats.spec(name)
        symmetric = grid.symmetric
        if symmetric is None:
            zero_point = self.source.computed(name, grid.sources, grid.compute).zero_point
            symmetric = zero_point is None or not bool(zero_point.any())
        return Layer(name, shape, dtype, grid, symmetric, self.source)


def _is_sound(grid: Rounding, shape: tuple[int, ...]) -> bool:
    fits = len(shape) == 2 and grid.group > 0 and shape[1] % grid.group == 0
    return fits and 1 <= grid.bits <= _MOST_BITS and grid.scale.is_floating_point
