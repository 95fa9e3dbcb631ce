# SPDX-License-Identifier: Apache-2.0
"""The choice over rows is the cheapest there is when losses ascend, and pooling is isotonic regression."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression

from featherweight.solvers.allocate import allocate, ascending, cheapest
from featherweight.solvers.exact_obs import eliminate_again, eliminate_with_traces
from featherweight.solvers.hessian import damp, layer_loss
from featherweight.solvers.refit import refit_rows
from featherweight.solvers.units import Units, units_of
from tests.solvers.problems import layer


def test_pooling_is_isotonic_regression() -> None:
    rng = np.random.default_rng(0)
    losses, sizes = rng.random((6, 40)) + np.linspace(0, 1, 40), rng.integers(1, 5, (6, 40)).astype(float)
    expected = [isotonic_regression(loss / size, weights=size).x for loss, size in zip(losses, sizes, strict=True)]
    assert np.allclose(ascending(torch.from_numpy(losses), torch.from_numpy(sizes)).numpy(), expected)
    expected = [isotonic_regression(loss).x for loss in losses]
    assert np.allclose(ascending(torch.from_numpy(losses)).numpy(), expected)


@pytest.mark.parametrize("count", range(9))
def test_no_other_counts_are_cheaper(count: int) -> None:
    losses = ascending(torch.rand(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    running = np.hstack([np.zeros((3, 1)), losses.numpy().cumsum(1)])
    least = min(
        sum(running[i, k] for i, k in enumerate(counts))
        for counts in itertools.product(range(4), repeat=3)
        if sum(counts) == count
    )
    counts = allocate(losses, count)
    assert int(counts.sum()) == count
    assert sum(running[i, int(k)] for i, k in enumerate(counts)) == pytest.approx(least)


def test_steps_of_different_sizes_stop_at_the_first_that_reaches_the_count() -> None:
    prices = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    sizes = torch.tensor([[4, 4], [3, 4]])
    assert [allocate(prices, n, sizes).tolist() for n in (4, 5, 7, 8)] == [[1, 0], [1, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize("pattern", ["weight", "1x4", "2x2"])
def test_traces_a_second_run_and_a_refit_give_the_same_weights(pattern: str) -> None:
    W, H, _ = layer(6, 24)
    damped = damp(H, 1e-3)
    units = units_of(pattern, 6, 24)
    found, traces = eliminate_with_traces(W, damped.inverse, units)
    counts = found.counts(zeros=72, rows=6)
    assert len(counts.unique()) > 1  # or the choice over rows is not exercised
    traced = traces[torch.arange(len(counts)), counts].flatten(0, 1)[:6]
    again = eliminate_again(W, damped.inverse, units, counts, budget_bytes=1 << 14)
    pruned = units.mask(found.chosen(counts), 6, 24)
    assert int(pruned.sum()) == 72
    refitted = refit_rows(W, damped, pruned)
    assert torch.allclose(traced, refitted, atol=1e-10)
    assert torch.allclose(again, refitted, atol=1e-10)
    taken = torch.arange(found.losses.shape[1]) < counts[:, None]
    assert float(found.losses[taken].sum()) == pytest.approx(layer_loss(W, refitted, damped.H), rel=1e-9)


@pytest.mark.parametrize("pattern", ["weight", "1x2"])
@pytest.mark.parametrize("zeros", [0, 1, 37, 59, 60])
def test_of_equal_scores_the_first_go_as_in_a_stable_sort(pattern: str, zeros: int) -> None:
    units = units_of(pattern, rows=6, d=10)
    scores = torch.randint(0, 4, (6, len(units.columns)), generator=torch.Generator().manual_seed(0)).double()
    size = 60 // scores.numel()
    chosen = cheapest(scores, units, rows=6, zeros=zeros)
    expected = np.argsort(scores.flatten().numpy(), kind="stable")[: -(-zeros // size)]
    assert chosen.flatten().nonzero()[:, 0].tolist() == sorted(expected.tolist())


def test_the_lowest_scores_go_by_weight_by_row_and_by_group() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    single = Units(torch.arange(4)[:, None])
    assert cheapest(scores, single, rows=2, zeros=5).tolist() == [[True] * 4, [False, False, False, True]]
    assert cheapest(scores, single, rows=2, zeros=4, per_row=True).tolist() == [
        [False, True, False, True],
        [False, False, True, True],
    ]
    pairs = Units(torch.arange(4)[:, None], group=torch.tensor([0, 1, 0, 1]), quota=torch.tensor([1, 2]))
    assert cheapest(scores, pairs, rows=2, zeros=0).tolist() == [[False, True, True, True], [False, True, True, True]]
    tiles = Units(torch.tensor([[0, 1, 2], [3, -1, -1]]))
    assert cheapest(torch.tensor([[4.5, 2.0]]), tiles, rows=1, zeros=1).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("pattern", "d", "run"), [("2:4", 24, None), ("3:8", 24, None), ("2:4", 22, 11), ("1:20", 40, None)]
)
def test_of_each_group_the_lowest_go_and_of_equals_the_first(pattern: str, d: int, run: int | None) -> None:
    """Oracle: Python's stable sort, group by group; runs of 11 make groups of 4, 4 and 3."""
    scores = torch.randint(0, 4, (9, d), generator=torch.Generator().manual_seed(0)).double()
    units = units_of(pattern, 9, d, run)
    chosen = cheapest(scores, units, rows=9, zeros=0)
    for row in range(9):
        for group, quota in enumerate(units.quota.tolist()):
            columns = (units.group == group).nonzero()[:, 0].tolist()
            lowest = sorted(columns, key=scores[row].__getitem__)[:quota]
            assert [c for c in columns if chosen[row, c]] == sorted(lowest)
