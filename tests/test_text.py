"""Names for people: short, and nothing lost."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_compat.text import collapse, shorten


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["fc.weight"], ["fc.weight"]),
        (["weight", "bias"], ["{weight,bias}"]),
        ([f"encoder.layer.{i}.fc.weight" for i in range(12)], ["encoder.layer.{0...11}.fc.weight"]),
        ([f"layer.{i}.w" for i in (0, 1)], ["layer.{0,1}.w"]),
        ([f"layer.{i}.w" for i in (0, 2, 5)], ["layer.{0,2,5}.w"]),
        ([f"layer.{i}.w" for i in range(0, 40, 2)], ["layer.{0,2,4,6,8,10,12,14,...}.w"]),
        (["conv1.weight", "conv2.weight"], ["conv{1,2}.weight"]),
        (["a.w", "b.w"], ["{a,b}.w"]),
        (
            ["activation_post_process_0.scale", "activation_post_process_1.scale"],
            ["activation_post_process_{0,1}.scale"],
        ),
        (["fc.w", "fc.w"], ["fc.w"]),
        # a number is not counted out, nor rounded off
        ([f"h.{i}.w" for i in (20240101, 20250101, 1700000000)], ["h.{20240101,20250101,1700000000}.w"]),
        ([f"h.{i}.w" for i in ("9" * 20, "1" * 5000)], ["h.{" + "9" * 20 + "," + "1" * 5000 + "}.w"]),
        (["m.01.w", "m.1.w"], ["m.{01,1}.w"]),
        ([f"b.{i:02}.w" for i in range(3)], ["b.{00,01,02}.w"]),
        # of a great many names the first stand for all
        ([f"{'x' * i}.w" for i in range(1, 40)], ["{" + ",".join("x" * i for i in range(1, 9)) + ",...}.w"]),
        (["fc." + "x" * i for i in range(1, 40)], ["fc.{" + ",".join("x" * i for i in range(1, 9)) + ",...}"]),
        # what a terminal would obey is shown
        (["\0a.1", "\0a.2"], ["\\x00a.{1,2}"]),
        (["a\x1b[31m\n.w", "\udc80"], ["a\\x1b[31m\\n.w", "\\udc80"]),
    ],
)
def test_collapse(names: list[str], expected: list[str]) -> None:
    assert collapse(names) == expected


def test_two_numbers_that_vary_fold_into_one_line() -> None:
    names = [f"stage.{i}.block.{j}.{leaf}" for i in range(3) for j in range(4) for leaf in ("weight", "bias")]
    assert collapse(names) == ["stage.{0...2}.block.{0...3}.{weight,bias}"]


def _expand(line: str) -> set[str]:
    """Every name that a line stands for, by a reading of its own."""
    parts: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", line):
        found = re.fullmatch(r"\{(\d+)\.\.\.(\d+)\}", part)
        if found:
            parts.append([str(i) for i in range(int(found[1]), int(found[2]) + 1)])
        elif part.startswith("{"):
            parts.append(part[1:-1].split(","))
        else:
            parts.append([part])
    return {"".join(choice) for choice in itertools.product(*parts)}


_PART = st.sampled_from(["layer", "conv", "0", "1", "2", "3", "conv1", "conv2", "bn_1", "x3d"])
_NAMES = st.lists(st.lists(_PART, min_size=1, max_size=4).map(".".join), max_size=8, unique=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(names=_NAMES)
def test_the_lines_stand_for_the_names_and_for_nothing_else(names: list[str]) -> None:
    lines = collapse(names)
    assert set().union(*map(_expand, lines)) == set(names)
    assert len(lines) <= len(names)


def test_collapsing_many_names_is_quick_and_short() -> None:
    names = [f"blocks.{i}.attn.{name}.{leaf}" for i in range(800) for name in "qkvo" for leaf in ("weight", "bias")]
    lines = collapse(names)
    assert lines == ["blocks.{0...799}.attn.{q,k,v,o}.{weight,bias}"]


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(3, 3, ["0", "1", "2"]), (4, 3, ["0", "1", "... and 2 more"]), (0, 2, []), (2, 1, ["... and 2 more"])],
)
def test_shorten(count: int, limit: int, expected: list[str]) -> None:
    assert shorten([str(i) for i in range(count)], limit) == expected
