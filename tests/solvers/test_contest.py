# SPDX-License-Identifier: Apache-2.0
"""With a judge, what is delivered is what does best on samples that no solver saw, and never worse than the simple method."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from featherweight.errors import NumericalError
from featherweight.grids import GridSpec
from featherweight.solvers import Pruned, Quantized, prune, prune_and_quantize, quantize
from featherweight.solvers.contest import affordable
from tests.solvers.problems import layer, output_error

Result = Pruned | Quantized
Solve = Callable[..., Result]


def _prune(W: torch.Tensor, H: torch.Tensor, **options: object) -> Result:
    return prune(W, H, "weight", 0.6, **options)


def _quantize(W: torch.Tensor, H: torch.Tensor, **options: object) -> Result:
    return quantize(W, H, GridSpec(3), **options)


def _both(W: torch.Tensor, H: torch.Tensor, **options: object) -> Result:
    return prune_and_quantize(W, H, GridSpec(3), "2:4", **options)


ALL = [(_prune, "magnitude"), (_quantize, "nearest"), (_both, "magnitude, nearest")]


@pytest.mark.parametrize(("solve", "simple"), ALL)
def test_the_lowest_judged_loss_wins(solve: Solve, simple: str) -> None:
    W, H, _ = layer(8, 24)
    _, _, other = layer(8, 24, seed=0, samples=1000)
    seen: list[torch.Tensor] = []

    def judge(V: torch.Tensor) -> float:
        seen.append(V)
        return output_error(W, V, other)

    result = solve(W, H, judge=judge)
    assert result.judged[result.solver] == min(result.judged.values())
    assert result.judged[result.solver] == output_error(W, result.weights, other)
    assert set(result.judged) == set(result.losses) >= {simple}
    assert any(torch.equal(V, result.weights) for V in seen)
    assert not solve(W, H).judged


@pytest.mark.parametrize(("solve", "simple"), ALL)
def test_a_solver_that_the_held_out_samples_refute_gives_way_to_the_simple_method(solve: Solve, simple: str) -> None:
    """Oracle: H of six samples in 24 dimensions says nothing of white inputs, where the simple method is the best there is."""
    W, _, X = layer(8, 24, samples=6)
    H = torch.from_numpy(2 * X @ X.T / 6)
    result = solve(W, H, judge=lambda V: float((W - V).square().sum()), damping=1e-6)
    assert result.solver == simple
    assert simple in result.notes[-1] and "held-out" in result.notes[-1]
    assert solve(W, H, damping=1e-6).solver != simple


@pytest.mark.parametrize(
    ("solve", "named", "simple"), [(_prune, "exact_obs", "magnitude"), (_quantize, "obq", "nearest")]
)
def test_a_named_solver_too_has_to_be_better_than_the_simple_method(solve: Solve, named: str, simple: str) -> None:
    W, H, X = layer(8, 24)
    good = solve(W, H, solver=named, judge=lambda V: output_error(W, V, X))
    assert good.solver == named and set(good.judged) == {named, simple}
    bad = solve(W, H, solver=named, judge=lambda V: float((W - V).square().sum()))
    assert bad.solver == simple and bad.loss > good.loss
    assert set(solve(W, H, solver=simple, judge=lambda V: 1.0).judged) == {simple}


def test_where_no_held_out_sample_came_the_loss_decides() -> None:
    W, H, _ = layer(8, 24)
    assert _prune(W, H, judge=lambda V: 0.0).loss == _prune(W, H).loss


def test_a_judge_that_gives_nan_is_not_believed() -> None:
    W, H, _ = layer(8, 24)
    calls = []

    def once(V: torch.Tensor) -> float:
        calls.append(V)
        return 1.0 if len(calls) == 1 else math.nan

    assert _prune(W, H, judge=once).solver == "magnitude"
    with pytest.raises(NumericalError, match="held-out samples"):
        _prune(W, H, judge=lambda V: math.nan)


def test_the_dearest_that_the_budget_pays_for_is_taken_or_else_the_last() -> None:
    work = {"a": 10.0, "b": 4.0, "c": 1.0}
    chosen = [affordable(["a", "b", "c"], work.__getitem__, budget) for budget in (10.0, 9.0, 2.0, 0.0)]
    assert chosen == ["a", "b", "c", "c"]


def few_samples(count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """W, H of that many samples of 24 inputs, and 4000 other samples."""
    W, _, X = layer(8, 24, samples=4000 + count)
    return W, torch.from_numpy(2 * X[:, :count] @ X[:, :count].T / count), X[:, count:]


@pytest.mark.parametrize(("solve", "samples"), [(_prune, 60), (_quantize, 40)])
def test_where_samples_are_few_more_damping_is_tried_and_does_better(solve: Solve, samples: int) -> None:
    W, H, X = few_samples(samples)

    def judge(V: torch.Tensor) -> float:
        return output_error(W, V, X)

    alone, judged = solve(W, H), solve(W, H, judge=judge)
    assert judged.damping > alone.damping
    assert f"damping {judged.damping:g}" in judged.solver
    assert judge(judged.weights) < 0.97 * judge(alone.weights)
    assert judged.work > alone.work
    poor = solve(W, H, judge=judge, work=alone.work)
    assert not any("damping" in name for name in poor.judged)


def test_damping_climbs_no_further_than_the_judge_likes() -> None:
    W, H, X = layer(8, 24)
    result = _prune(W, H, judge=lambda V: output_error(W, V, X))
    tried = [name for name in result.judged if "damping" in name]
    assert len(tried) >= 1
    values = [result.judged[tried[0].split(",")[0]], *(result.judged[name] for name in tried)]
    assert all(after < before for before, after in itertools.pairwise(values[:-1]))
    assert values[-1] >= values[-2] or tried[-1].endswith("0.1")
