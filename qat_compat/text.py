"""Names and numbers for people: repeated layers collapse into one line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["collapse", "counted", "cut", "printable", "shorten"]

_FOLDED = 300  # lines; folding by part takes time with the square of them
_LISTED = 32  # names in one pair of braces; of more, the first few stand for all
_FIRST = 8
_DIGITS = 18  # of a number; more are a hash, or a date and time
_PART = re.compile(r"(?:[^.{]|\{[^{}]*\})+")  # of a dotted name; what stands in braces is one part

_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])|\d+$|(?<=[A-Za-z_])\d+(?=\.|$)")


def collapse(names: Iterable[str]) -> list[str]:
    """Fold names that differ in their last part, in one layer number, then in any one part.

    Example:
        >>> collapse(f"encoder.layer.{i}.fc.{leaf}" for i in range(12) for leaf in ("weight", "bias"))
        ['encoder.layer.{0...11}.fc.{weight,bias}']
        >>> collapse(["conv1.weight", "conv2.weight", "conv4.weight"])
        ['conv{1,2,4}.weight']
        >>> collapse(f"attention.{part}.{leaf}" for part in ("query", "key") for leaf in ("weight", "bias"))
        ['attention.{query,key}.{weight,bias}']
    """
    folded = _fold_leaves(list(dict.fromkeys(map(printable, names))))
    while True:
        smaller = _fold_numbers(folded)
        if len(smaller) == len(folded):
            return _fold_parts(smaller)
        folded = smaller


def _fold_leaves(names: Sequence[str]) -> list[str]:
    by_parent: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, []).append(leaf)
    return [
        f"{parent}.{leaves[0]}" if parent and len(leaves) == 1 else _braced(parent, leaves)
        for parent, leaves in by_parent.items()
    ]


def _braced(parent: str, leaves: Sequence[str]) -> str:
    text = leaves[0] if len(leaves) == 1 else _listed(leaves, _LISTED)
    return f"{parent}.{text}" if parent else text


def _listed(parts: Sequence[str], most: int) -> str:
    return "{" + ",".join(parts if len(parts) <= most else [*parts[:_FIRST], "..."]) + "}"


_Form = tuple[str, str]  # what stands before a number in a name, and behind it


def _fold_numbers(names: Sequence[str]) -> list[str]:
    """Fold the leftmost number position in which several names, otherwise equal, differ."""
    forms = {name: list(_forms(name)) for name in names}
    counts = Counter(form for found in forms.values() for form in found)
    values: dict[_Form, set[int]] = {}
    lines: dict[str | _Form, None] = {}  # a form stands for all names that have it, at the place of the first
    for name, found in forms.items():
        best = max(found, key=counts.__getitem__, default=None)
        if best is None or counts[best] < 2:
            lines[name] = None
            continue
        values.setdefault(best, set()).add(int(name[len(best[0]) : len(name) - len(best[1])]))
        lines[best] = None
    return [x if isinstance(x, str) else f"{x[0]}{_numbers(sorted(values[x]))}{x[1]}" for x in lines]


def _forms(name: str) -> Iterator[_Form]:
    for found in _NUMBER.finditer(name):
        text = found.group()
        if len(text) <= _DIGITS and (text == "0" or text[0] != "0"):  # 01 is another name than 1
            yield name[: found.start()], name[found.end() :]


def _fold_parts(names: Sequence[str]) -> list[str]:
    """Fold names that are equal but for one part, the part with the most variants first."""
    if len(names) > _FOLDED:
        return list(names)
    lines = [tuple(_PART.findall(name)) for name in names]
    lines = [line if ".".join(line) == name else (name,) for line, name in zip(lines, names, strict=True)]
    while True:
        forms: dict[tuple[tuple[str, ...], int], list[str]] = {}
        for line in lines:
            for index, part in enumerate(line):
                if len(line) > 1 and "{" not in part:
                    forms.setdefault(((*line[:index], "", *line[index + 1 :]), index), []).append(part)
        (form, index), parts = max(forms.items(), key=lambda item: len(item[1]), default=(((), 0), []))
        if len(parts) < 2:
            return list(map(".".join, lines))
        gone = [(*form[:index], part, *form[index + 1 :]) for part in parts]
        place = lines.index(gone[0])
        lines[place] = (*form[:index], _listed(parts, _LISTED), *form[index + 1 :])
        lines = [line for line in lines if line not in gone]


def _numbers(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:  # they are sorted, and no two are alike
        return f"{{{values[0]}...{values[-1]}}}"
    return _listed([str(value) for value in values], _FIRST)


def printable(text: str) -> str:
    """The text with what a terminal would obey, or could not show, written as an escape.

    Example:
        >>> print(printable("\\x1b[31mconv\\n.weight"))
        \\x1b[31mconv\\n.weight
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cut(text: str, limit: int) -> str:
    """The text, or its two ends where it is longer than the limit.

    Example:
        >>> cut("x" * 3 + "y" * 1000 + "z" * 3, 8), cut("short", 8)
        ('xxxy...yzzz (1,006 characters)', 'short')
    """
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]} ({len(text):,} characters)"


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "key"), counted(1200, "key"), counted(0, "batch"), counted(2, "entry")
        ('1 key', '1,200 keys', '0 batches', '2 entries')
    """
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def shorten(lines: Sequence[str], limit: int) -> list[str]:
    """At most `limit` lines; the last one says how many more there are.

    Example:
        >>> shorten(["a", "b", "c"], 2)
        ['a', '... and 2 more']
    """
    if len(lines) <= limit:
        return list(lines)
    return [*lines[: limit - 1], f"... and {len(lines) - limit + 1} more"]
