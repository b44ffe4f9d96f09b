"""Covering designs: few cells that between them hold every combination that was asked for.

The cross product of the matrix has hundreds of thousands of cells. Faults of this kind of software come from one value
of one axis, or from two values that meet, so `full` is a pairwise design: every pair of values of two axes that can
occur at all is in at least one cell. The generator is greedy and deterministic, after Cohen, Dalal, Fredman and Patton,
"The AETG System: An Approach to Testing Based on Combinatorial Design" (IEEE TSE 23(7), 1997), with the first candidate
taken in place of the best of many, so that every machine makes the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

__all__ = ["Axes", "Design", "Target", "covering", "pairs", "singles"]

Axes = Mapping[str, Sequence[str]]
Chosen = Mapping[str, str]
Target = tuple[tuple[str, str], ...]  # (axis, value) pairs, in the order of the axes


@dataclass(frozen=True)
class Design:
    """A set of cells, and what it was made to cover.

    Args:
        axes: The axes with their values.
        cells: Axis -> value, one mapping per cell.
        covered: The targets that the cells hold, all that can occur.
        impossible: The targets that no cell can hold.
    """

    axes: Axes
    cells: tuple[Chosen, ...]
    covered: tuple[Target, ...]
    impossible: tuple[Target, ...]

    @property
    def product(self) -> int:
        """The size of the cross product that the cells stand for."""
        size = 1
        for values in self.axes.values():
            size *= len(values)
        return size


def singles(axes: Axes) -> Iterator[Target]:
    """Every value of every axis."""
    for axis, values in axes.items():
        for value in values:
            yield ((axis, value),)


def pairs(axes: Axes, names: Sequence[str] | None = None) -> Iterator[Target]:
    """Every pair of values of two axes; with `names`, of these axes only.

    Example:
        >>> list(pairs({"flow": ["fx"], "dtype": ["fp32", "bf16"]}))
        [(('flow', 'fx'), ('dtype', 'fp32')), (('flow', 'fx'), ('dtype', 'bf16'))]
    """
    for first, second in combinations(names or list(axes), 2):
        for one, other in product(axes[first], axes[second]):
            yield ((first, one), (second, other))


def covering(axes: Axes, targets: Iterable[Target], excluded: Callable[[Chosen], object]) -> Design:
    """Few cells that hold every target that can occur.

    Example:
        >>> axes = {"a": ["1", "2"], "b": ["1", "2"], "c": ["1", "2"]}
        >>> design = covering(axes, pairs(axes), lambda chosen: chosen.get("a") == chosen.get("b") == "2")
        >>> len(design.cells), len(design.covered), design.impossible
        (5, 11, ((('a', '2'), ('b', '2')),))

    Args:
        axes: The axes with their values.
        targets: What is to be covered.
        excluded: Whether a choice of values, of some axes or of all, cannot occur. What is excluded for some axes must
            be excluded for whatever else is chosen.
    """
    wanted = list(dict.fromkeys(targets))
    open_targets = dict.fromkeys(wanted)
    sizes = sorted({len(target) for target in wanted})
    uses = dict.fromkeys((one for target in singles(axes) for one in target), 0)
    cells: list[Chosen] = []
    impossible: list[Target] = []
    for target in wanted:
        if target not in open_targets:
            continue
        cell = _completed(dict(target), axes, open_targets, uses, excluded)
        if cell is None:
            impossible.append(target)
            del open_targets[target]
            continue
        cell = {axis: cell[axis] for axis in axes}
        cells.append(cell)
        for value in cell.items():
            uses[value] += 1
        for size in sizes:
            for held in combinations(cell.items(), size):
                open_targets.pop(held, None)
    gone = set(impossible)
    return Design(axes, tuple(cells), tuple(t for t in wanted if t not in gone), tuple(impossible))


def _completed(
    chosen: dict[str, str],
    axes: Axes,
    open_targets: Mapping[Target, None],
    uses: Mapping[tuple[str, str], int],
    excluded: Callable[[Chosen], object],
) -> dict[str, str] | None:
    """The choice with a value for every axis, each the one that covers most; None if there is no such cell."""
    if excluded(chosen):
        return None
    axis = next((name for name in axes if name not in chosen), None)
    if axis is None:
        return chosen

    def merit(value: str) -> tuple[int, int]:
        new = (axis, value)
        order = {name: index for index, name in enumerate(axes)}
        met = [tuple(sorted((new, old), key=lambda one: order[one[0]])) for old in chosen.items()]
        return -sum(target in open_targets for target in [(new,), *met]), uses[new]

    for value in sorted(axes[axis], key=merit):
        found = _completed({**chosen, axis: value}, axes, open_targets, uses, excluded)
        if found is not None:
            return found
    return None
