"""The one error family of the package.

Every failure that a caller can meet is a :class:`CompatError`. It carries data (`file`, `key`, `expected`, `found`,
`remedy`); the text is rendered from that data in one place, so that every message has the same shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qat_compat.text import collapse, counted, cut, printable, shorten

__all__ = [
    "MALFORMED",
    "CalibrationError",
    "CheckpointError",
    "CompatError",
    "LimitError",
    "PlanError",
    "Problem",
    "ProblemKind",
    "QParamError",
    "SaveError",
    "UnsafeCheckpointError",
    "problem_lines",
]

# What is raised where a file's word is taken for a number, a list or a mapping, and it is none.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

_SHOWN_PROBLEMS = 40
_LONGEST = 2000  # characters of one value in a message: a file can give its parts names of any length
_ALIKE = 3  # so many like problems, and more, are told as one
_SHOWN_NAMES = 8
# What varies in the text of like problems: what is quoted, shapes, sites, names and numbers.
_VARYING = re.compile(r"'[^']*'|\w+\[[^\]]*\]|\w+:\w+(?:\.\w+)*|\w+(?:\.\w+)+|\d+")


class CompatError(Exception):
    """Anything that keeps a checkpoint and a model from being joined.

    Example:
        >>> error = CompatError(
        ...     "shape differs", key="fc.weight", expected="(10, 4)", found="(5, 4)", remedy="pass keep='fc.*'"
        ... )
        >>> print(error)
        shape differs
          key:      fc.weight
          expected: (10, 4)
          found:    (5, 4)
          remedy:   pass keep='fc.*'

    Args:
        message: What is wrong, in one line.
        file: The file that was read or written.
        key: The state_dict key, record or option concerned.
        expected: What the right value would have looked like.
        found: What was there instead.
        remedy: The next step for the caller.
    """

    def __init__(
        self,
        message: str,
        *,
        file: object | None = None,
        key: str | None = None,
        expected: object | None = None,
        found: object | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.key = key
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.remedy = remedy

    def __str__(self) -> str:
        rows = [
            ("file", self.file and printable(self.file)),
            ("key", self.key and printable(self.key)),
            ("expected", self.expected),
            ("found", self.found),
            ("remedy", self.remedy),
        ]
        lines = [self.message]
        lines += [f"  {name + ':':<9} {cut(value, _LONGEST)}" for name, value in rows if value is not None]
        return "\n".join(printable(line) for text in lines for line in text.split("\n"))


class CheckpointError(CompatError):
    """The source is corrupt, truncated, or of a format that this package does not know."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the source as it stands would run code or leave its folder; it is not read."""


class LimitError(CheckpointError):
    """The source asks for more memory, depth or entries than its size can justify."""


class SaveError(CompatError):
    """A file could not be written; what stood at the destination is still there."""


class QParamError(CompatError):
    """A scale or zero_point that no quantizer can use."""


class CalibrationError(CompatError):
    """Ranges could not be taken from the calibration data, or there was none."""


class ProblemKind(Enum):
    """Why a plan cannot be carried out; the value is the word that the text uses."""

    MISSING = "missing"
    UNEXPECTED = "unexpected"
    AMBIGUOUS = "ambiguous"
    MISMATCHED = "mismatched"
    LOSSY = "lossy"
    INVALID = "invalid"
    STALE = "stale"
    UNCALIBRATED = "uncalibrated"


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a plan cannot be carried out.

    Example:
        >>> print(Problem(ProblemKind.MISSING, "fc.bias", "the file has no such tensor", "drop the bias or pass keep="))
        missing      fc.bias: the file has no such tensor; drop the bias or pass keep=
    """

    kind: ProblemKind
    key: str
    detail: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """What is wrong, and the next step."""
        return f"{self.detail}; {self.remedy}" if self.remedy else self.detail

    def __str__(self) -> str:
        return printable(f"{self.kind.value:<12} {self.key}: {self.text}")


class PlanError(CompatError):
    """Source and target cannot be joined; `problems` lists every reason, sorted.

    Example:
        >>> error = PlanError([Problem(ProblemKind.MISSING, "fc.bias", "not in the file")])
        >>> error.problems[0].key
        'fc.bias'
    """

    def __init__(self, problems: Iterable[Problem], *, file: object | None = None, summary: str | None = None) -> None:
        self.problems: tuple[Problem, ...] = tuple(sorted(problems, key=lambda p: (p.kind.value, p.key, p.detail)))
        number = counted(len(self.problems), "problem")
        super().__init__(summary or f"source and target cannot be joined: {number}", file=file)

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanError, (self.problems,), self.__dict__  # `args`, which Exception would hand over, is the message

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {line}" for line in problem_lines(self.problems))])


def problem_lines(problems: Sequence[Problem], limit: int = _SHOWN_PROBLEMS) -> list[str]:
    """Problems as text: those that differ only in names, shapes and numbers are told once, with all their keys.

    Example:
        >>> gone = [Problem(ProblemKind.MISSING, f"model.{i}.bn.weight", "not in the file") for i in range(8)]
        >>> print(*problem_lines([Problem(ProblemKind.MISMATCHED, "fc.bias", "of another size"), *gone]), sep="\\n")
        mismatched   fc.bias: of another size
        missing      8 keys, such as model.0.bn.weight: not in the file
                         model.{0...7}.bn.weight
    """
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for problem in problems:
        groups.setdefault(_form(problem), []).append(problem)
    told = [[one] for group in groups.values() if len(group) < _ALIKE for one in group]
    told += [group for group in groups.values() if len(group) >= _ALIKE]
    place = {id(problem): index for index, problem in enumerate(problems)}
    told.sort(key=lambda group: place[id(group[0])])
    lines: list[str] = []
    for group in told[:limit]:
        first = group[0]
        head = f"{counted(len(group), 'key')}, such as " if len(group) > 1 else ""
        text = f"{cut(first.key, _LONGEST)}: {cut(first.text, _LONGEST)}"
        lines.append(printable(f"{first.kind.value:<12} {head}{text}"))
        if len(group) > 1:
            lines += [
                f"{'':<17}{cut(name, _LONGEST)}" for name in shorten(collapse(one.key for one in group), _SHOWN_NAMES)
            ]
    if more := sum(map(len, told[limit:])):
        lines.append(f"... and {more} more, all in `.problems`")
    return lines


def _form(problem: Problem) -> tuple[object, ...]:
    """Equal for problems whose texts differ in names, shapes and numbers alone."""
    detail, remedy = (cut(text, _LONGEST) for text in (problem.detail, problem.remedy))
    return problem.kind, _VARYING.sub("", detail), _VARYING.sub("", remedy)
