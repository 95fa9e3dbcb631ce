# SPDX-License-Identifier: Apache-2.0
"""Oracle: the paper's equation, written out in rational arithmetic, and its limits."""

import itertools
from fractions import Fraction

import pytest

from featherweight.prune.schedule import SCHEDULES, sparsity_at, updates_at


@pytest.mark.parametrize(("begin", "end"), [(0, 100), (7, 19), (1000, 9000)])
@pytest.mark.parametrize(("initial", "final"), [(0, Fraction(9, 10)), (Fraction(1, 2), Fraction(7, 8))])
def test_cubic_is_equation_1_of_the_paper(begin: int, end: int, initial: Fraction, final: Fraction) -> None:
    for t in range(begin, end + 1, max(1, (end - begin) // 7)):
        exact = final + (initial - final) * (1 - Fraction(t - begin, end - begin)) ** 3
        assert sparsity_at(t, begin, end, float(initial), float(final)) == pytest.approx(float(exact), abs=1e-12)


def test_linear_rises_by_equal_steps_and_constant_is_there_at_once() -> None:
    linear = [sparsity_at(t, 10, 14, 0.2, 0.6, "linear") for t in range(10, 15)]
    assert linear == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    for schedule in ("constant", "one_shot"):
        assert [sparsity_at(t, 10, 14, 0.2, 0.6, schedule) for t in (9, 10, 12, 14)] == [0.2, 0.6, 0.6, 0.6]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sparsity_never_falls_and_is_exact_outside_the_ramp(schedule: str) -> None:
    curve = [sparsity_at(t, 5, 55, 0.1, 0.7, schedule) for t in range(80)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(curve))
    assert set(curve[:5]) == {0.1}
    assert set(curve[55:]) == {0.7}


def test_begin_and_end_may_be_one_step() -> None:
    assert sparsity_at(3, 3, 3, 0.0, 0.5) == 0.5
    assert sparsity_at(2, 3, 3, 0.0, 0.5) == 0.0


@pytest.mark.parametrize(
    ("begin", "end", "every", "expected"),
    [
        (0, 10, 5, [0, 5, 10]),
        (2, 10, 3, [2, 5, 8, 10]),  # the last comes at end, though 8 + 3 is past it
        (4, 4, 7, [4]),
        (1, 3, 100, [1, 3]),
    ],
)
def test_masks_are_chosen_every_so_often_and_once_more_at_the_end(
    begin: int, end: int, every: int, expected: list[int]
) -> None:
    assert [t for t in range(30) if updates_at(t, begin, end, every)] == expected


def test_one_shot_is_one_update() -> None:
    assert [t for t in range(30) if updates_at(t, 4, 20, 5, "one_shot")] == [4]
