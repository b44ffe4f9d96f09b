"""What the caller asks of a plan, and a plan in the making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qat_compat.errors import Problem, ProblemKind
from qat_compat.plan import Copy, Derive, Drop, Step
from qat_compat.schema import Schema

__all__ = ["Draft", "Goal"]


@dataclass(frozen=True)
class Goal:
    """What the caller asks of a plan.

    Args:
        keep: Globs over float entries of the target that may stay as they are.
        data: Where activation ranges may come from: "batches", "record", "defer" or "none".
        recorded: Target key -> shape of what a saved calibration holds.
    """

    keep: Sequence[str] = ()
    data: str = "none"
    recorded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Draft:
    """A plan in the making."""

    source: Schema
    target: Schema
    goal: Goal
    steps: dict[str, Step] = field(default_factory=dict)  # by target key
    dropped: dict[str, Drop] = field(default_factory=dict)  # by source key
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # source keys that a step reads
    quantizer_globs: set[str] = field(default_factory=set)  # of keep=, those that name no float entry
    observing: frozenset[str] = frozenset()  # quantizers that training gives a range, where that is asked for
    idle: list[str] = field(default_factory=list)  # quantizers that are deferred to a training that does not set them
    kept_modules: set[str] = field(default_factory=set)  # modules that keep their own values, by float and by own path

    def problem(self, kind: ProblemKind, key: str, detail: str, remedy: str = "") -> None:
        self.problems.append(Problem(kind, key, detail, remedy))

    def copy(self, key: str, source: str, witness: str) -> None:
        """Take a source tensor as it is, or as its recipe gives it."""
        recipe = self.source.recipes.get(source)
        if recipe is None:
            self.steps[key] = Copy(key, source, witness)
        else:
            self.steps[key] = Derive(key, recipe.sources, recipe.how, source)
            self.used.update(recipe.sources)
        self.used.add(source)
