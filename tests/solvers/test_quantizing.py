# SPDX-License-Identifier: Apache-2.0
"""`quantize` and `prune_and_quantize` deliver what they say, whatever the solver."""

import dataclasses

import pytest
import torch

from featherweight.errors import OptionError
from featherweight.grids import GridSpec, fit_grid
from featherweight.solvers import QUANTIZERS, damp, prune, prune_and_quantize, quantize
from featherweight.solvers.hessian import row_losses
from tests.solvers.problems import layer, output_error


@pytest.mark.parametrize("spec", [GridSpec(2), GridSpec(3, symmetric=True), GridSpec(4, chunk=8), GridSpec(8)], ids=str)
@pytest.mark.parametrize("solver", [*QUANTIZERS, "best"])
def test_weights_are_on_the_grid_zeros_stay_and_the_loss_is_true(solver: str, spec: GridSpec) -> None:
    W, H, X = layer(6, 20)
    W[torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) < 0.3] = 0.0
    result = quantize(W.float(), H, spec, solver=solver)
    chunk = torch.arange(20) // result.grid.chunk
    expected = result.grid.scale[:, chunk] * (result.integers - result.grid.zero_point[:, chunk]).float()
    assert torch.equal(result.weights, expected)
    assert result.integers.dtype == torch.int32
    assert int(result.integers.min()) >= -(2 ** (spec.bits - 1)) and int(result.integers.max()) < 2 ** (spec.bits - 1)
    assert torch.equal(result.pruned, W == 0) and bool((result.weights[W == 0] == 0).all())
    assert result.loss == pytest.approx(output_error(W.float(), result.weights, X), rel=1e-6)
    assert result.losses[result.solver] == result.loss


def test_zeros_are_free_to_move_if_nobody_keeps_them() -> None:
    W, H, _ = layer(8, 24)
    W[:, ::2] = 0.0
    kept, free = (quantize(W, H, GridSpec(3), solver="gptq", keep_zeros=keep) for keep in (True, False))
    assert bool((free.weights[:, ::2] != 0).any())
    assert free.loss < kept.loss


def test_a_given_grid_stays_as_it_is_if_asked() -> None:
    W, H, _ = layer(6, 20)
    grid = fit_grid(W, GridSpec(3))
    fixed = quantize(W, H, grid, solver="admm+polish", fit_scales=False)
    moved = quantize(W, H, grid, solver="admm+polish")
    assert torch.equal(fixed.grid.scale, grid.scale) and torch.equal(fixed.grid.zero_point, grid.zero_point)
    assert not torch.equal(moved.grid.scale, grid.scale) and torch.equal(moved.grid.zero_point, grid.zero_point)
    assert moved.loss < fixed.loss


def test_the_polish_never_raises_the_loss() -> None:
    W, H, _ = layer(12, 30)
    for solver in ("gptq", "obq", "admm"):
        plain, polished = (
            quantize(W, H, GridSpec(3), solver=name, damping=0.0).loss for name in (solver, f"{solver}+polish")
        )
        assert polished < plain, solver


def test_learned_scales_are_where_a_rows_loss_is_least_and_no_row_is_worse_than_rounded() -> None:
    """Oracle: the loss at scales a little larger and smaller, the integers held; and each row rounded to nearest."""
    W, H, _ = layer(12, 30)
    for spec in (GridSpec(2, symmetric=True), GridSpec(3), GridSpec(4, chunk=10)):
        nearest, learned = (quantize(W, H, spec, solver=name, damping=0.0) for name in ("nearest", "nearest+scales"))
        H_used = damp(H, 0.0).H
        before, after = (row_losses(W, one.grid.values(one.integers), H_used) for one in (nearest, learned))
        assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < 0.98 * float(before.sum())
        for factor in (0.999, 1.001):
            moved = dataclasses.replace(learned.grid, scale=learned.grid.scale * factor)
            assert bool((row_losses(W, moved.values(learned.integers), H_used) >= after * (1 - 1e-6)).all())
        still = quantize(W, H, spec, solver="nearest+scales", damping=0.0, fit_scales=False)
        assert torch.equal(still.integers, nearest.integers) and torch.equal(still.grid.scale, nearest.grid.scale)


def test_each_row_of_the_search_is_at_least_as_good_as_gptq_polished_or_not() -> None:
    """H of few samples: where ADMM does not come to rest, GPTQ's rows are better."""
    W, H, _ = layer(32, 64, samples=70)
    search, gptq = (quantize(W, H, GridSpec(3), solver=name) for name in ("admm+polish", "gptq"))
    losses = [row_losses(W, result.weights, damp(H).H) for result in (search, gptq)]
    assert bool((losses[0] <= losses[1]).all())


def test_best_is_the_least_of_what_its_budget_paid_for() -> None:
    W, H, _ = layer(8, 24)
    rich, poor = quantize(W, H, GridSpec(3)), quantize(W, H, GridSpec(3), work=0.0)
    assert set(rich.losses) == {"nearest", "gptq", "admm+polish"}
    assert set(poor.losses) == {"nearest", "gptq", "gptq+polish"}
    assert not rich.notes and "gptq+polish only" in poor.notes[0]
    for result in (rich, poor):
        assert result.loss == min(result.losses.values())


def test_bad_grids_and_solvers_are_refused() -> None:
    W, H, _ = layer(6, 20)
    with pytest.raises(OptionError, match="rows and chunks"):
        quantize(W, H, fit_grid(W[:3], GridSpec(3)))
    with pytest.raises(OptionError, match="rows and chunks"):
        quantize(W, H, dataclasses.replace(fit_grid(W, GridSpec(3)), chunk=7))
    with pytest.raises(OptionError, match="1 bit has no zero"):
        quantize(torch.ones(2, 3), torch.eye(3), GridSpec(bits=1))
    with pytest.raises(OptionError, match="1 bit has no zero"):
        prune_and_quantize(torch.ones(2, 4), torch.eye(4), GridSpec(bits=1), "2:4")
    with pytest.raises(OptionError, match="gptq"):
        quantize(W, H, GridSpec(3), solver="gptqq")


PATTERNS = [("weight", 0.5), ("2:4", None), ("1x4", 0.5), ("column", 0.25)]


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_zeros_and_grid_come_together(pattern: str, sparsity: float | None) -> None:
    W, H, X = layer(8, 24)
    result = prune_and_quantize(W, H, GridSpec(3), pattern, sparsity)
    alone = prune(W, H, pattern, sparsity)
    assert int(result.pruned.sum()) == int(alone.pruned.sum())
    if pattern == "2:4":
        assert bool((result.pruned.view(8, 6, 4).sum(2) == 2).all())
    if pattern == "1x4":
        assert bool((result.pruned.view(8, 6, 4).sum(2) % 4 == 0).all())
    assert bool((result.weights[result.pruned] == 0).all())
    assert torch.equal(result.weights, result.grid.values(result.integers))
    assert result.loss == pytest.approx(output_error(W, result.weights, X), rel=1e-6)
    assert result.loss == min(result.losses.values())


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_together_is_better_than_one_after_the_other_without_refit(pattern: str, sparsity: float | None) -> None:
    W, H, _ = layer(16, 48)
    zeros = prune(W, H, pattern, sparsity, solver="exact_obs").pruned
    for solver in ("nearest", "obq"):
        after = quantize(W.masked_fill(zeros, 0.0), H, GridSpec(3), solver=solver).weights
        assert prune_and_quantize(W, H, GridSpec(3), pattern, sparsity).loss < output_loss(W, after, H)


def output_loss(W: torch.Tensor, V: torch.Tensor, H: torch.Tensor) -> float:
    return float(torch.trace((W - V) @ H @ (W - V).T)) / 2
