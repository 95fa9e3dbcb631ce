# SPDX-License-Identifier: Apache-2.0
"""ADMM and swaps against exhaustive search where that is possible, and against ExactOBS where it is not."""

import itertools

import numpy as np
import pytest
import torch

from featherweight.errors import OptionError
from featherweight.solvers import prune
from featherweight.solvers.admm import _Threshold, admm_mask
from featherweight.solvers.problem import pruning
from featherweight.solvers.swap import swap
from tests.solvers.problems import layer, least_loss


def exhaustive(W: np.ndarray, H: np.ndarray, zeros: int) -> float:
    """The least loss of any mask with that many zeros: best subsets of each row, then the best counts over rows."""
    best = {0: 0.0}
    for w in W:
        row = [
            min(least_loss(w, H, list(removed)) for removed in itertools.combinations(range(len(w)), count))
            for count in range(len(w) + 1)
        ]
        best = {
            total: min(best[total - k] + row[k] for k in range(len(row)) if total - k in best)
            for total in range(max(best) + len(row))
        }
    return best[zeros]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_search_and_swaps_come_near_the_best_mask_there_is(sparsity: float) -> None:
    found, least = 1.0, 1.0
    for seed in range(4):
        W, H, _ = layer(3, 9, seed=seed)
        problem = pruning(W, H, "weight", sparsity)
        result = prune(W, problem.damped.H, "weight", sparsity, solver="admm+swap", damping=0.0)
        optimum = exhaustive(W.numpy(), problem.damped.H.numpy(), problem.zeros)
        assert result.loss >= optimum * (1 - 1e-9)
        found, least = found * result.loss, least * optimum
    assert (found / least) ** (1 / 4) < 1.04


@pytest.mark.parametrize(("pattern", "sparsity", "most"), [("weight", 0.5, 1), ("weight", 0.9, 1), ("2:4", None, 0.95)])
def test_search_beats_exact_obs(pattern: str, sparsity: float | None, most: float) -> None:
    ratio = []
    for seed in range(3):
        W, H, _ = layer(16, 48, seed=seed)
        losses = [prune(W, H, pattern, sparsity, solver=name).loss for name in ("admm", "exact_obs")]
        ratio.append(losses[0] / losses[1])
    assert np.exp(np.log(ratio).mean()) < most


@pytest.mark.parametrize(("pattern", "sparsity"), [("weight", 0.5), ("weight", 0.9), ("2:4", None), ("1:4", None)])
def test_after_the_polish_no_swap_is_left_that_helps(pattern: str, sparsity: float | None) -> None:
    """Oracle: every swap of a kept and a removed weight (of one group, for N:M), each solved from the start."""
    W, H, _ = layer(6, 16)
    problem = pruning(W, H, pattern, sparsity, damping=1e-3)
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(6, 16, generator=generator)
    if sparsity is None:
        quota = int(problem.units.quota[0])
        chosen = start.view(6, 4, 4).argsort(2).argsort(2).lt(quota).view(6, 16)
    else:
        chosen = start.flatten().argsort().argsort().lt(problem.zeros).view(6, 16)
    polished = swap(problem, chosen)
    H = problem.damped.H.numpy()
    for w, before, after in zip(W.numpy(), chosen.numpy(), polished.numpy(), strict=True):
        assert before.sum() == after.sum()
        now = least_loss(w, H, after.nonzero()[0].tolist())
        assert now <= least_loss(w, H, before.nonzero()[0].tolist()) * (1 + 1e-9)
        for out, into in itertools.product((~after).nonzero()[0], after.nonzero()[0]):
            if sparsity is None and out // 4 != into // 4:
                continue
            other = after.copy()
            other[[out, into]] = True, False
            assert least_loss(w, H, other.nonzero()[0].tolist()) >= now * (1 - 1e-6)


def test_small_batches_polish_as_large_ones() -> None:
    W, H, _ = layer(9, 24)
    problem = pruning(W, H, "weight", 0.6)
    alone = pruning(W, H, "weight", 0.6, budget_bytes=1)
    chosen = admm_mask(problem, stages=1, each=1)
    assert not torch.equal(swap(problem, chosen), chosen)
    assert torch.equal(swap(problem, chosen), swap(alone, chosen))


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_there_is_nothing_to_search_at_the_ends(sparsity: float) -> None:
    W, H, _ = layer(4, 8)
    problem = pruning(W, H, "weight", sparsity)
    chosen = admm_mask(problem)
    assert torch.equal(chosen, torch.full((4, 8), sparsity == 1.0))
    assert torch.equal(swap(problem, chosen), chosen)


def test_swaps_refuse_tiles() -> None:
    W, H, _ = layer(4, 8)
    problem = pruning(W, H, "1x4", 0.5)
    with pytest.raises(OptionError, match="single weights"):
        swap(problem, admm_mask(problem))


def test_the_moving_threshold_marks_the_smallest_values_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    select = _Threshold(300)
    values = torch.rand(20, 50, generator=generator)
    for step in (0.0, 0.01, 0.01, 10.0, 0.01):  # a jump, which leaves the last threshold behind
        values = values + step * torch.rand(20, 50, generator=generator)
        marked = select(values)
        assert int(marked.sum()) == 300
        assert float(values[marked].max()) < float(values[~marked].min())
