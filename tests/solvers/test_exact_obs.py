# SPDX-License-Identifier: Apache-2.0
"""Lazy, compacted, batched elimination goes in the order of brute force, at brute force's losses."""

import numpy as np
import pytest
import torch

from featherweight.solvers import prune, refit
from featherweight.solvers.downdate import batches
from featherweight.solvers.exact_obs import Elimination, eliminate
from featherweight.solvers.hessian import damp
from featherweight.solvers.units import units_of
from tests.solvers.problems import greedy, layer

PATTERNS = {
    "weight": ("weight", 20, None),
    "1:4": ("1:4", 16, None),
    "2:4": ("2:4", 16, None),
    "3:4": ("3:4", 16, None),
    "4:8": ("4:8", 16, None),
    "2:4, short groups at the end of each tap": ("2:4", 21, 7),
    "1x4": ("1x4", 24, None),
    "1x4, short tiles at the end of each tap": ("1x4", 20, 10),
    "2x3": ("2x3", 18, None),
    "column": ("column", 12, None),
    "column over taps": ("column", 12, 4),
    "column sets of different sizes": ([[0, 5], [1], [2, 3, 4], [7, 9]], 10, None),
    "wide column sets": ([list(range(0, 36, 2)), list(range(1, 36, 2))], 36, None),
}


@pytest.mark.parametrize("budget_bytes", [1, 1 << 30])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_order_and_the_losses_are_those_of_brute_force(name: str, budget_bytes: int) -> None:
    pattern, d, run = PATTERNS[name]
    rows = 5
    W, H, _ = layer(rows, d)
    damped = damp(H, 1e-3)
    units = units_of(pattern, rows, d, run)
    found = eliminate(W, damped.inverse, units, budget_bytes=budget_bytes)
    columns = [[c for c in unit if c >= 0] for unit in units.columns.tolist()]
    groups = None if units.group is None else units.group.tolist()
    quota = None if units.quota is None else units.quota.tolist()
    for i in range(len(found.order)):
        own = W[i * units.rows : (i + 1) * units.rows].numpy()
        order, losses = greedy(own, damped.H.numpy(), columns, groups, quota)
        assert found.order[i].tolist() == order
        assert np.allclose(found.losses[i].numpy(), losses, rtol=1e-7)


def test_many_lazy_steps_and_compactions_change_nothing() -> None:
    """Long enough for several full buffers; oracle: H⁻¹ of what remains inverted anew at every step."""
    W, H, _ = layer(2, 150)
    damped = damp(H, 1e-3)
    found = eliminate(W, damped.inverse, units_of("weight", 2, 150))
    for i, w in enumerate(W.numpy().copy()):
        left = np.arange(150)
        for step in range(149):
            inverse = np.linalg.inv(damped.H.numpy()[np.ix_(left, left)])
            scores = w[left] ** 2 / np.diag(inverse)
            j = int(scores.argmin())
            assert found.order[i, step] == left[j]
            assert found.losses[i, step].item() == pytest.approx(scores[j] / 2, rel=1e-8)
            w[left] -= inverse[j] * w[left[j]] / inverse[j, j]
            left = np.delete(left, j)


def test_steps_stop_where_they_are_told() -> None:
    W, H, _ = layer(3, 20)
    inverse = damp(H).inverse
    whole = eliminate(W, inverse, units_of("weight", 3, 20))
    part = eliminate(W, inverse, units_of("weight", 3, 20), steps=7)
    assert torch.equal(part.order, whole.order[:, :7])


@pytest.mark.parametrize(("pattern", "sparsity"), [("weight", 0.3), ("weight", 0.9), ("1x4", 0.5), ("column", 0.25)])
def test_what_was_stored_as_small_integers_and_floats_gives_every_sparsity(pattern: str, sparsity: float) -> None:
    """Oracle: `prune` at that sparsity, from the start."""
    W, H, _ = layer(6, 40)
    units = units_of(pattern, 6, 40, run=20)
    found = eliminate(W, damp(H).inverse, units)
    stored = Elimination(found.order.to(torch.int16), found.losses.float(), units)
    mask = units.mask(stored.chosen(stored.counts(round(sparsity * 240), rows=6)), rows=6, d=40)
    alone = prune(W, H, pattern, sparsity, run=20, solver="exact_obs")
    assert torch.equal(mask, alone.pruned)
    assert torch.allclose(refit(W, H, mask), alone.weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_that_are_there_go_first_and_cost_nothing(dtype: torch.dtype) -> None:
    W, H, _ = layer(4, 12)
    W[:, ::3] = 0.0
    found = eliminate(W.to(dtype), damp(H).inverse.to(dtype), units_of("weight", 4, 12))
    assert found.order[:, :4].sort(dim=1).values.tolist() == [[0, 3, 6, 9]] * 4
    assert bool((found.losses[:, :4] == 0).all())
    assert bool((found.losses[:, 4:] > 0).all())


@pytest.mark.parametrize(("count", "each", "budget"), [(10, 3, 7), (10, 3, 1), (10, 3, 1000), (1, 5, 5), (7, 1, 3)])
def test_batches_cover_everything_within_the_budget(count: int, each: int, budget: int) -> None:
    found = list(batches(count, each, budget))
    assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(count))
    sizes = [piece.stop - piece.start for piece in found]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) * each <= max(budget, each)
