"""The plan: one step per target entry and one per source key that nothing takes.

A plan is data. It is made from two schemas and what :mod:`qat_compat.match` found, without reading a tensor, and it
can be printed, stored as JSON and compared. Whatever cannot be decided is a problem; all of them are collected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from qat_compat.errors import Problem, problem_lines
from qat_compat.text import collapse, printable, shorten

__all__ = ["Copy", "Derive", "Drop", "How", "Keep", "Plan", "Step", "Synthesize"]


class How(Enum):
    """Where a synthesized value comes from."""

    WEIGHTS = "weights"  # the tensor that the quantizer sees is one of the model's own
    CALIBRATION = "calibration"  # the calibration data
    RECORD = "saved calibration"


@dataclass(frozen=True, slots=True)
class Copy:
    """The source tensor as it is, cast where the dtype differs."""

    key: str
    source: str
    witness: str


@dataclass(frozen=True, slots=True)
class Derive:
    """Computed from source tensors, by whichever of three is given.

    Args:
        key: Of the target.
        sources: Keys of the checkpoint.
        how: The computation in words.
        value: Key of the source whose recipe gives it.
        terms: Keys of the source that hold a scale and zero point, or the ends of a range; the target's quantizer
            writes them down in its own way. With neither of the two, it works the value out of its other state.
    """

    key: str
    sources: tuple[str, ...]
    how: str
    value: str = ""
    terms: tuple[str, ...] = ()

    @property
    def is_read(self) -> bool:
        """Whether the tensors of the source alone give it."""
        return bool(self.value or self.terms)


@dataclass(frozen=True, slots=True)
class Synthesize:
    """Computed by the quantizer from the weights or from data."""

    key: str
    quantizer: str
    how: How
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Keep:
    """The target's own value stays."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drop:
    """A source key that nothing takes."""

    key: str
    reason: str


Step = Copy | Derive | Synthesize | Keep | Drop


@dataclass(frozen=True)
class Plan:
    """How a source becomes a target.

    Example:
        >>> plan = Plan((Copy("fc.weight", "module.fc.weight", "wrapper prefix"), Keep("head.weight", "keep=")))
        >>> plan.copied, plan.kept, plan.ok
        (1, 1, True)
        >>> print(plan)
        plan: <source> -> <target>
          copy          1  wrapper prefix: module.fc.weight -> fc.weight
                            fc.weight
          keep          1  keep=
                            head.weight

    Args:
        steps: In the order of the target, then of the source keys left over.
        problems: Why it cannot be carried out; empty if it can.
        warnings: What can be carried out and should be known.
        source: Name of the file or mapping.
        target: Class and framework of the model, or name of the layout.
    """

    steps: tuple[Step, ...]
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    source: str = "<source>"
    target: str = "<target>"

    @property
    def ok(self) -> bool:
        return not self.problems

    def count(self, kind: type[Step]) -> int:
        return sum(isinstance(step, kind) for step in self.steps)

    @property
    def copied(self) -> int:
        return self.count(Copy)

    @property
    def derived(self) -> int:
        return self.count(Derive)

    @property
    def synthesized(self) -> int:
        return self.count(Synthesize)

    @property
    def kept(self) -> int:
        return self.count(Keep)

    @property
    def dropped(self) -> int:
        return self.count(Drop)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and dicts."""
        return {
            "schema": 1,  # of this dictionary; it grows with each change that a reader has to know of
            "source": self.source,
            "target": self.target,
            "steps": [_step_dict(step) for step in self.steps],
            "problems": [{**asdict(problem), "kind": problem.kind.value} for problem in self.problems],
            "warnings": list(self.warnings),
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The plan as JSON; equal plans give equal text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        return "\n".join([f"plan: {self.source} -> {self.target}", *body(self)])


def _step_dict(step: Step) -> dict[str, Any]:
    fields = {name: getattr(step, name) for name in step.__slots__}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in fields.items()}
    return {"step": type(step).__name__.lower(), **plain}


def reason_of(step: Step) -> str:
    """The provenance of one step, in words."""
    match step:
        case Copy():
            return step.witness
        case Derive():
            return step.how
        case Synthesize():
            return f"from {step.how.value}" + (f": {step.reason}" if step.reason else "")
        case Keep() | Drop():
            return step.reason


def grouped(steps: Iterable[Step]) -> Mapping[tuple[str, str], list[str]]:
    """(step, reason) -> keys, in order of first appearance within each step."""
    order = {Copy: 0, Derive: 1, Synthesize: 2, Keep: 3, Drop: 4}
    found: dict[tuple[str, str], list[str]] = {}
    for step in sorted(steps, key=lambda s: order[type(s)]):
        found.setdefault((type(step).__name__.lower(), reason_of(step)), []).append(step.key)
    return found


def body(plan: Plan, *, lines_per_group: int = 8) -> list[str]:
    """The lines of a plan below its title: steps collapsed, warnings, problems."""
    lines: list[str] = []
    renamed = {
        ("copy", step.witness): f": {step.source} -> {step.key}"
        for step in reversed(plan.steps)
        if isinstance(step, Copy) and step.source != step.key
    }
    for (kind, reason), keys in grouped(plan.steps).items():
        example = renamed.get((kind, reason), "")
        lines.append(f"  {kind:<10} {len(keys):>4}  {reason}{example}")
        lines += [f"{'':<20}{name}" for name in shorten(collapse(keys), lines_per_group)]
    lines += [f"  warning: {text}" for text in shorten(plan.warnings, 12)]
    lines += [f"  {'' if text.startswith(' ') else 'problem: '}{text}" for text in problem_lines(plan.problems, 24)]
    return [printable(line) for line in lines]


def sorted_problems(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda p: (p.kind.value, p.key, p.detail)))
