# SPDX-License-Identifier: Apache-2.0
"""Oracle: sorting in Python. Which units go, under holds, zeros, ties, limits and unequal sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.prune.choose import Problem, candidates_n_of_m, choose, choose_globally, most

SCORES = st.lists(
    st.tuples(st.integers(-3, 3), st.sampled_from(["held", "zero", "free"])), min_size=1, max_size=24
)  # small integers, so that ties are everywhere


def problem(cases: list[tuple[int, str]], size: int = 1) -> Problem:
    state = [kind for _, kind in cases]
    return Problem(
        torch.tensor([float(score) for score, _ in cases]),
        held=torch.tensor([kind == "held" for kind in state]),
        zero=torch.tensor([kind != "free" for kind in state]),
        size=size,
    )


def rank(cases: list[tuple[int, str]]) -> list[int]:
    """Held first, then zeros, then by score; equal ones by position."""
    order = {"held": 0, "zero": 1, "free": 2}

    def key(i: int) -> tuple[int, int, int]:
        score, kind = cases[i]
        return (order[kind], score if kind == "free" else 0, i)

    return sorted(range(len(cases)), key=key)


@given(SCORES, st.integers(0, 30))
def test_exactly_so_many_go_and_the_right_ones(cases: list[tuple[int, str]], count: int) -> None:
    held = sum(kind == "held" for _, kind in cases)
    expected = set(rank(cases)[: max(held, count)])
    assert set(choose(problem(cases), count).nonzero()[:, 0].tolist()) == expected


@given(st.lists(SCORES, min_size=1, max_size=4), st.floats(0, 1))
def test_global_choice_is_one_sort_over_all_layers(layers: list[list[tuple[int, str]]], sparsity: float) -> None:
    joined = [case for layer in layers for case in layer]
    held = sum(kind == "held" for _, kind in joined)
    expected = set(rank(joined)[: max(held, round(sparsity * len(joined)))])
    chosen = choose_globally([problem(layer) for layer in layers], [len(layer) for layer in layers], sparsity)
    assert [len(part) for part in chosen] == [len(layer) for layer in layers]
    assert set(torch.cat(chosen).nonzero()[:, 0].tolist()) == expected


@given(st.lists(SCORES, min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_a_layer_at_its_limit_leaves_the_rest_to_others(
    layers: list[list[tuple[int, str]]], sparsity: float, cap: float
) -> None:
    """Greedy: go through all units from the lowest; take each whose layer has room, until there are enough."""
    joined = [(layer, i) for layer, cases in enumerate(layers) for i in range(len(cases))]
    flat = [case for cases in layers for case in cases]
    limits = [max(int(cap * len(cases)), sum(kind == "held" for _, kind in cases)) for cases in layers]
    held = sum(kind == "held" for _, kind in flat)
    goal, taken = max(held, round(sparsity * len(flat))), [set() for _ in layers]
    for position in rank(flat):
        layer, i = joined[position]
        if sum(map(len, taken)) < goal and len(taken[layer]) < limits[layer]:
            taken[layer].add(i)
    chosen = choose_globally([problem(cases) for cases in layers], limits, sparsity)
    assert [set(part.nonzero()[:, 0].tolist()) for part in chosen] == taken


def test_units_of_unequal_size_meet_the_sum_of_weights_to_half_a_unit() -> None:
    layers = [problem([(i, "free") for i in range(10)], size=7), problem([(i, "free") for i in range(20)], size=3)]
    total = 10 * 7 + 20 * 3
    for sparsity in torch.linspace(0, 1, 23).tolist():
        chosen = choose_globally(layers, [10, 20], sparsity)
        gone = 7 * int(chosen[0].sum()) + 3 * int(chosen[1].sum())
        assert abs(gone - sparsity * total) <= 3.5
        # One threshold: all that went in one layer is no higher than all that stayed in the other, but for a tie.
        if all(part.any() and not part.all() for part in chosen):
            assert abs(int(chosen[0].sum()) - int(chosen[1].sum())) <= 1


@given(st.lists(SCORES.filter(lambda cases: len(cases) >= 4), min_size=1, max_size=3), st.integers(1, 3))
def test_n_of_m_candidates_are_the_lowest_of_each_group(groups: list[list[tuple[int, str]]], n: int) -> None:
    cases = [case for group in groups for case in group[:4]]
    p = problem(cases)
    found = candidates_n_of_m(p.scores, p.held, p.zero, n, 4)
    for start in range(0, len(cases), 4):
        expected = set(rank(cases[start : start + 4])[: 4 - n])
        assert set(found[start : start + 4].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize(
    ("units", "cap", "expected"), [(30, 0.1, 3), (10, 0.7, 7), (10, 1.0, 9), (10, 0.0, 0), (3, 0.5, 1)]
)
def test_caps_are_exact_and_one_unit_always_stays(units: int, cap: float, expected: int) -> None:
    assert most(problem([(i, "free") for i in range(units)]), cap) == expected


def test_what_is_held_goes_beyond_any_cap() -> None:
    assert most(problem([(0, "held")] * 3 + [(0, "free")]), cap=0.1) == 3
