"""What is to be written: the float side of a source, and the integers behind its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qat_compat.errors import PlanError, Problem, ProblemKind
from qat_compat.floating import Like
from qat_compat.schema import Integers, Rounding, Stage
from qat_compat.source import Source
from qat_compat.state import join_path
from qat_compat.storage import Checkpoint

__all__ = ["Job", "Layer"]

_INPUTS = ("", "symmetric", "asymmetric")


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
        found = self.source.computed(self.name, self.grid.sources, self.grid.compute)
        return found._replace(zero_point=None) if self.symmetric else found


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
        schema, problems = self.source.schema, []
        grids, quantized = self._grids()
        for key in quantized:
            if key not in grids:
                how = schema.recipes[key].how if key in schema.recipes else "what its own quantizers make of it"
                detail = f"it is {how}, for which {self.target} has no exact form here"
                problems.append(Problem(ProblemKind.LOSSY, key, detail, "write it as float"))
            elif grids[key].inputs not in _INPUTS:
                detail = (
                    f"the inputs of its layer are quantized in another way ({grids[key].inputs}) than anew per token"
                )
                problems.append(Problem(ProblemKind.LOSSY, key, detail, "write it as float"))
        if not quantized:
            detail = "nothing says to which integers its weights are rounded"
            remedy = "pass the prepared module with its quantizers, or a converted checkpoint"
            problems.append(Problem(ProblemKind.MISSING, self.source.checkpoint.name, detail, remedy))
        if problems:
            summary = f"{self.target} cannot hold this source exactly"
            raise PlanError(problems, file=self.source.checkpoint.name, summary=summary)
        found = (self._layer(schema[key].site, grid) for key, grid in grids.items())
        return {layer.name: layer for layer in found}

    def _grids(self) -> tuple[Mapping[str, Rounding], list[str]]:
        """The grids, and every weight that ought to have one."""
        schema, description = self.source.schema, self.source.description
        if description is None:
            return schema.roundings, list(schema.recipes) if schema.stage is Stage.CONVERTED else []
        grids = {key: grid for quantizer in description.quantizers for key, grid in quantizer.roundings().items()}
        weights = [key for quantizer in description.quantizers for key in quantizer.quantized_parameters()]
        hosts = {quantizer.site.partition(":")[2] for quantizer in description.quantizers}
        alone = [key for key in (join_path(host, "weight") for host in sorted(hosts)) if key not in weights]
        return grids, weights + alone

    def _layer(self, name: str, grid: Rounding) -> Layer:
        shape, dtype = self.floats.spec(name)
        symmetric = grid.symmetric
        if symmetric is None:
            zero_point = self.source.computed(name, grid.sources, grid.compute).zero_point
            symmetric = zero_point is None or not bool(zero_point.any())
        return Layer(name, shape, dtype, grid, symmetric, self.source)
