"""The covering design of the matrix, held to what an enumeration of the whole cross product says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from itertools import combinations, product

import pytest
from declared import DECLARED, DEFECTS
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_compat.matrix.cases import AXES
from qat_compat.matrix.design import Axes, covering, pairs, singles
from qat_compat.matrix.planning import declared_reason, excluded, plan_matrix
from qat_compat.testing import QATModel

Pair = frozenset[tuple[str, str]]


def _models() -> list[QATModel]:  # at the top level it would be collected
    return list(DECLARED.values())


def possible_pairs(axes: Axes, forbidden: Callable[[Mapping[str, str]], object]) -> set[Pair]:
    """Every pair that some cell of the cross product holds."""
    found: set[Pair] = set()
    for values in product(*axes.values()):
        cell = dict(zip(axes, values, strict=True))
        if not forbidden(cell):
            found |= {frozenset(pair) for pair in combinations(cell.items(), 2)}
    return found


def test_full_covers_every_pair_that_can_occur_and_every_load(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = plan_matrix(_models(), "full")
    held = {frozenset(pair) for cell in matrix.design.cells for pair in combinations(cell.items(), 2)}
    possible = possible_pairs(matrix.design.axes, lambda cell: excluded(cell, DECLARED, matrix.flows))
    assert held == possible
    assert not any(excluded(cell, DECLARED, matrix.flows) for cell in matrix.design.cells)
    loads = {(cell.model, cell.flow) for cell in matrix.cells if cell.direction == "load"}
    assert loads >= {
        (model, flow)
        for model, flow in product(DECLARED, matrix.flows)
        if not excluded({"model": model, "flow": flow, "direction": "load"}, DECLARED, matrix.flows)
    }
    with capsys.disabled():
        print(f"\nfull: {len(matrix.cells)} cells, {len(possible):,} pairs, {matrix.design.product:,} combinations")


def test_small_has_every_flow_in_every_direction_and_every_value() -> None:
    matrix = plan_matrix(_models(), "small")
    axes = matrix.design.axes
    cells = [asdict(cell) for cell in matrix.cells]
    missing = {
        (flow, direction)
        for flow, direction in product(axes["flow"], axes["direction"])
        if not any(cell["flow"] == flow and cell["direction"] == direction for cell in cells)
    }
    assert missing == {(flow, "converted") for flow in axes["flow"] if matrix.flows[flow].convert is None}
    for axis, values in axes.items():
        assert {cell[axis] for cell in cells} == set(values), axis
    assert len(cells) < len(plan_matrix(_models(), "full").cells) / 3
    assert not any(excluded(cell, DECLARED, matrix.flows) for cell in cells)


def test_every_declared_refusal_is_tried() -> None:
    """But those that only say that no state can come from a flow which the model leaves out."""
    matrix = plan_matrix(_models(), "full")
    for model in DECLARED.values():
        flows = [flow for flow in matrix.flows if any(fnmatchcase(flow, glob) for glob in model.flows)]
        for glob in [*(model.refused or {}), *model.unsupported]:
            cells = [cell for cell in matrix.cells if cell.model == model.name]
            tried = any(declared_reason({glob: "x"}, c.flow, c.direction, c.granularity) for c in cells)
            assert tried or not any(fnmatchcase(flow, glob.partition("/")[0]) for flow in flows), (model.name, glob)


def test_every_known_defect_is_tried() -> None:
    names = [f"{cell.model}/{cell.id}" for cell in plan_matrix(_models(), "full").cells]
    assert [glob for glob in DEFECTS if not any(fnmatchcase(name, glob) for name in names)] == []


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Axes, set[Pair]]:
    """Some axes, and pairs of values that exclude each other."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    axes = {f"axis{i}": [f"{i}.{j}" for j in range(size)] for i, size in enumerate(sizes)}
    every = [frozenset(pair) for pair in pairs(axes)]
    return axes, set(draw(st.lists(st.sampled_from(every), max_size=6)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(space=spaces())
def test_any_space_is_covered(space: tuple[Axes, set[Pair]]) -> None:
    axes, forbidden = space

    def excludes(chosen: Mapping[str, str]) -> bool:
        return any(frozenset(pair) in forbidden for pair in combinations(chosen.items(), 2))

    design = covering(axes, [*pairs(axes), *singles(axes)], excludes)
    held = {frozenset(pair) for cell in design.cells for pair in combinations(cell.items(), 2)}
    assert held == possible_pairs(axes, excludes)
    assert design == covering(axes, [*pairs(axes), *singles(axes)], excludes)
    assert all(tuple(cell) == tuple(axes) for cell in design.cells)


def test_the_axes_of_a_cell_are_the_axes() -> None:
    assert tuple(asdict(plan_matrix(_models()[:1], "small").cells[0])) == AXES
