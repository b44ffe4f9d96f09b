"""The values of float tensors: the latent weights, or what their quantizers make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from qat_compat import packing
from qat_compat.casting import same_values
from qat_compat.errors import CompatError, PlanError, Problem, ProblemKind
from qat_compat.schema import Rounding, Stage
from qat_compat.source import Source
from qat_compat.text import collapse, shorten

__all__ = ["check_ties", "reader"]


def reader(source: Source, weights: str) -> Callable[[str], Tensor]:
    if weights == "latent":
        return source.read
    if weights != "quantized":
        raise CompatError("unknown option", key="weights", expected="'latent' or 'quantized'", found=repr(weights))
    quantized = _quantized_weights(source)
    return lambda key: quantized[key]() if key in quantized else source.read(key)


def _quantized_weights(source: Source) -> Mapping[str, Callable[[], Tensor]]:
    """Parameter key -> what its weight quantizer makes of it, in the units of the parameter itself."""
    found: dict[str, Callable[[], Tensor]] = {}
    if source.description is not None:
        for quantizer in source.description.quantizers:
            found.update(quantizer.quantized_parameters())
        if made := [key for key in found if key not in source.schema]:
            raise CompatError(
                "quantized layers compute their weights in every forward (pruning, a weight norm, a parametrization)",
                file=source.checkpoint.name,
                key=", ".join(shorten(collapse(made), 8)),
                expected="weights that are tensors of the model",
                remedy="make them permanent first (prune.remove, remove_weight_norm, remove_parametrizations), or take"
                " the latent tensors",
            )
        return found
    recorded = source.schema.roundings if source.schema.stage is Stage.PREPARED else {}
    if not recorded or any(isinstance(grid, str) for grid in recorded.values()):
        raise CompatError(
            "what a quantizer sees cannot be computed from tensors alone: the file does not hold its bit width",
            file=source.checkpoint.name,
            key="weights",
            remedy="load the file into the prepared model, and pass the model",
        )
    return {key: partial(_rounded, source, key, grid) for key, grid in recorded.items() if isinstance(grid, Rounding)}


def _rounded(source: Source, key: str, grid: Rounding) -> Tensor:
    values, scale, zero_point = source.computed(key, grid.sources, grid.compute)
    return packing.dequantize(values, scale, zero_point).to(source.spec(key).dtype)


def check_ties(
    source: Source,
    names: Mapping[str, str | None],
    ties: Mapping[str, list[str]],
    fetch: Callable[[str], Tensor],
    weights: str,
) -> None:
    """A tensor of several names has one value: of two, a model that is loaded with them would keep the latter.

    Args:
        source: Where the values come from.
        names: Float name -> source key.
        ties: Float name -> every float name of the same tensor.
        fetch: The value of a float name.
        weights: Which values these are, in the words of `to_float`.

    Raises:
        PlanError: The source has two.
    """
    # quantizers may make two things of one tensor
    alias = source.alias if weights == "latent" else _unknown
    problems: list[Problem] = []
    for name, tied in ties.items():
        first, own = names.get(tied[0]), names.get(name)
        if first is None or own is None or first == own or (alias(own) is not None and alias(own) == alias(first)):
            continue
        if not same_values(fetch(tied[0]), fetch(name)):
            detail = (
                f"{tied[0]} and {name} are one tensor in like=, so one value is expected; the source has two: "
                f"{_origin(source, first)}, and {_origin(source, own)}"
            )
            remedy = "pass a like= that does not tie them (tie_word_embeddings=False in transformers), or like=None"
            problems.append(Problem(ProblemKind.MISMATCHED, name, detail, remedy))
    if problems:
        raise PlanError(problems, file=source.checkpoint.name)


def _unknown(key: str) -> None:
    return None


def _origin(source: Source, key: str) -> str:
    recipe = source.schema.recipes.get(key)
    return f"{key} is {recipe.how}" if recipe else f"{key} is {source.spec(key)} as it is held"
