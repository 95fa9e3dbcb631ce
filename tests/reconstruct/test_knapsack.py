# SPDX-License-Identifier: Apache-2.0
"""The program chooses what brute force and an integer program choose, never overshoots, and says what it has proved."""

import itertools

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

from featherweight.reconstruct.knapsack import cheapest, pick


def brute(costs: list[np.ndarray], losses: list[np.ndarray], budget: float) -> float | None:
    """The least loss over all combinations."""
    indices = itertools.product(*(range(len(cost)) for cost in costs))
    fits = [
        sum(loss[i] for loss, i in zip(losses, choice, strict=True))
        for choice in indices
        if sum(cost[i] for cost, i in zip(costs, choice, strict=True)) <= budget
    ]
    return min(fits, default=None)


def solved_by_milp(costs: list[np.ndarray], losses: list[np.ndarray], budget: float) -> float:
    n = sum(len(cost) for cost in costs)
    one_each, start = np.zeros((len(costs), n)), 0
    for i, cost in enumerate(costs):
        one_each[i, start : start + len(cost)] = 1
        start += len(cost)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(np.concatenate(costs)[None], -np.inf, budget)]
    found = milp(
        np.concatenate(losses), constraints=limits, integrality=np.ones(n), bounds=(0, 1), options={"mip_rel_gap": 0}
    )
    return float(found.fun)


def network(layers: int, seed: int, levels: int = 45) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Costs and losses as a database has them: densities that fall by a tenth, losses that rise ever more steeply."""
    rng = np.random.default_rng(seed)
    density = 0.9 ** np.arange(levels)
    costs = [size * density for size in rng.lognormal(size=layers)]
    losses = [
        scale * (density**-power - 1) * np.linspace(1, 1.1, levels) ** rng.standard_normal()
        for scale, power in zip(rng.lognormal(size=layers), rng.uniform(0.3, 1.5, layers), strict=True)
    ]
    return costs, losses


@pytest.mark.parametrize("seed", range(60))
def test_small_problems_are_solved_as_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, rng.integers(1, 6))
    # Costs of zero, entries that cost more and lose more, gains instead of losses: all may be there.
    costs = [rng.random(n) * (rng.random(n) < 0.8) for n in lengths]
    losses = [rng.standard_normal(n) for n in lengths]
    budget = rng.random() * len(lengths) * 0.7
    expected, found = brute(costs, losses, budget), pick(costs, losses, budget)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.loss == pytest.approx(expected, abs=1e-9) and found.bound == found.loss
        assert found.cost == pytest.approx(sum(cost[i] for cost, i in zip(costs, found.indices, strict=True)))
        assert found.cost <= budget * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.5, 0.33, 0.25])
def test_networks_are_solved_as_by_an_integer_program(share: float) -> None:
    costs, losses = network(12, seed=1)
    budget = share * sum(cost[0] for cost in costs)
    found = pick(costs, losses, budget)
    assert found is not None
    assert found.loss == pytest.approx(solved_by_milp(costs, losses, budget), rel=1e-6)


@pytest.mark.parametrize("states", [1, 7, 100])
@pytest.mark.parametrize("seed", range(5))
def test_few_states_cost_optimality_and_never_the_budget(states: int, seed: int) -> None:
    costs, losses = network(30, seed)
    budget = 0.4 * sum(cost[0] for cost in costs)
    best, few = pick(costs, losses, budget), pick(costs, losses, budget, states=states)
    assert best is not None and few is not None
    assert best.bound == best.loss
    assert few.cost <= budget * (1 + 1e-9)
    assert few.bound <= best.loss <= few.loss * (1 + 1e-12)
    assert few.loss <= best.loss * 1.05


@pytest.mark.parametrize("seed", range(5))
def test_it_is_no_worse_than_any_price_of_lagrange(seed: int) -> None:
    costs, losses = network(40, seed)
    budget = 0.3 * sum(cost[0] for cost in costs)
    found = pick(costs, losses, budget, states=50)
    assert found is not None
    for price in np.geomspace(1e-4, 1e4, 400):
        at = [int((loss + price * cost).argmin()) for cost, loss in zip(costs, losses, strict=True)]
        if sum(cost[i] for cost, i in zip(costs, at, strict=True)) <= budget:
            assert found.loss <= sum(loss[i] for loss, i in zip(losses, at, strict=True)) * (1 + 1e-12)


def test_bounds_hold_for_many_layers() -> None:
    costs, losses = network(200, seed=3)
    found = pick(costs, losses, 0.25 * sum(cost[0] for cost in costs))
    assert found is not None
    assert found.bound <= found.loss <= found.bound * (1 + 1e-4)


def test_a_budget_met_to_the_last_bit_is_met() -> None:
    costs, losses = [[0.1], [0.2], [0.3]], [[1.0], [1.0], [1.0]]
    assert pick(costs, losses, 0.6) is not None  # 0.1 + 0.2 + 0.3 is more than 0.6 in floats
    assert pick(costs, losses, 0.59) is None


def test_no_classes_need_no_budget() -> None:
    found = pick([], [], 0.0)
    assert found is not None and found.indices == () and found.loss == 0.0


def test_the_cheapest_is_the_least_loss_among_the_equally_cheap() -> None:
    found = cheapest([[3.0, 0.0, 0.0], [2.0, 5.0]], [[0.0, 2.0, 1.0], [7.0, 0.0]])
    assert found.indices == (2, 0) and found.cost == 2.0 and found.loss == 8.0
