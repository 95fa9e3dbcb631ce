# SPDX-License-Identifier: Apache-2.0
"""One problem solved, against the closed form of what it minimises and against outputs computed from X and Y."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featherweight.grids import GridSpec
from featherweight.layers import Problem, Statistics, problems
from featherweight.reconstruct.answer import Want, corrected, error_of, solve

ROWS, D, TOKENS = 6, 12, 400


def layer() -> Problem:
    torch.manual_seed(0)
    return problems(nn.Linear(D, ROWS, bias=False))[0][0]


def drawn(seed: int, shift: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs of the dense layer and of the same layer behind others that were compressed, (d, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    X = mixing @ torch.randn(D, TOKENS, generator=generator, dtype=torch.float64)
    return X, X + shift * X.roll(1, 0)


def statistics(W: Tensor, X: Tensor, seen: Tensor | None = None) -> Statistics:
    X_now = X if seen is None else seen
    H = 2 * X_now @ X_now.T / TOKENS
    Y = W.double() @ X
    T = None if seen is None else 2 * Y @ X_now.T / TOKENS
    return Statistics(H, T, 0.0 if seen is None else 2 * float(Y.square().sum()) / TOKENS, TOKENS, TOKENS)


def test_the_error_is_that_of_the_outputs() -> None:
    W = layer().matrix()
    V = W + 0.1 * torch.randn_like(W)
    X, seen = drawn(1)
    for given, x in ((None, X), (seen, seen)):
        loss, energy = error_of(V, W, statistics(W, X, given))
        Y = W.double() @ X
        torch.testing.assert_close(loss, float((Y - V.double() @ x).square().sum()) / TOKENS)
        torch.testing.assert_close(energy, float(Y.square().sum()) / TOKENS)


def test_the_corrected_target_is_the_least_squares_answer_to_the_dense_outputs() -> None:
    W = layer().matrix().double()
    (X, seen), (X2, seen2) = drawn(1), drawn(2)
    judge = statistics(W, X2, seen2)
    target, ridge = corrected(W, statistics(W, X, seen), judge)
    mean = float(statistics(W, X, seen).H.diagonal().mean())
    # The ridge as more equations of a least-squares problem: ||Y - V X||² + ½ tokens λ mean ||V - W||².
    assert ridge is not None
    root = (ridge * mean * TOKENS / 2) ** 0.5
    rows = torch.cat([seen.T, root * torch.eye(D, dtype=torch.float64)])
    answers = torch.cat([(W @ X).T, root * W.T])
    torch.testing.assert_close(target, torch.linalg.lstsq(rows, answers).solution.T)
    assert error_of(target, W, judge)[0] < 1e-2 * error_of(W, W, judge)[0]


def test_a_layer_that_lacks_nothing_but_rounding_is_answered_by_its_own_weights() -> None:
    W = layer().matrix().double()
    X, seen = drawn(1)
    same, judge = statistics(W, X, X), statistics(W, X, seen)
    target, ridge = corrected(W, same, judge)
    assert ridge is None
    assert target is W
    a_little = statistics(W, X, X + 1e-4 * (seen - X))
    assert corrected(W, a_little, a_little)[1] is not None


def test_held_out_samples_hold_a_target_back_that_fits_noise() -> None:
    """Eight tokens for twelve inputs: the least-squares target is nowhere near W on other tokens."""
    W = layer().matrix().double()
    X, seen = (part[:, :8] for part in drawn(1, shift=0.01))
    H, T = 2 * seen @ seen.T / 8, 2 * W @ X @ seen.T / 8
    fit = Statistics(H, T, 2 * float((W @ X).square().sum()) / 8, 8, 8)
    X2, seen2 = drawn(2, shift=0.01)
    target, _ = corrected(W, fit, statistics(W, X2, seen2))
    loose = torch.linalg.lstsq(seen.T, (W @ X).T).solution.T
    judge = statistics(W, X2, seen2)
    assert error_of(target, W, judge)[0] <= error_of(W, W, judge)[0] < 0.5 * error_of(loose, W, judge)[0]


def test_without_a_reference_the_target_is_the_weight_itself() -> None:
    W = layer().matrix().double()
    assert corrected(W, statistics(W, drawn(1)[0]), None) == (W, None)


@pytest.mark.parametrize(
    "want",
    [
        Want(sparsity=0.5),
        Want(pattern="2:4"),
        Want(pattern="1x4", sparsity=0.5),
        Want(grid=GridSpec(3)),
        Want(sparsity=0.5, grid=GridSpec(4)),
        Want(),
        Want(sparsity=0.5, solver="wanda"),
    ],
    ids=str,
)
@pytest.mark.parametrize("paired", [False, True])
def test_zeros_that_stand_stay_and_the_simple_method_is_never_better(want: Want, paired: bool) -> None:
    problem = layer()
    W = problem.matrix()
    zeros = torch.zeros_like(W, dtype=torch.bool)
    zeros[:, ::5] = True
    (X, seen), (X2, seen2) = drawn(1), drawn(2)
    fit, judge = (statistics(W, x, s if paired else None) for x, s in ((X, seen), (X2, seen2)))
    answer = solve(problem, W, fit, judge, want, zeros)
    assert not answer.weights[zeros].any()
    assert answer.held_out is not None
    assert answer.held_out == pytest.approx(error_of(answer.weights, W, judge))
    assert answer.held_out[0] <= answer.simple + 1e-12
    if want.sparsity is not None:
        assert int((answer.weights == 0).sum()) >= round(want.sparsity * W.numel())
    if want.grid is not None:
        assert all(len(row.unique()) <= 2**want.grid.bits for row in answer.weights)


def test_where_no_solver_beats_the_simple_method_that_is_delivered() -> None:
    """The judge's samples say that only column 0 matters; calibration, that all but column 0 do."""
    problem = layer()
    W = problem.matrix()
    W[:, 0] = 1.0
    H, other = torch.eye(D).double(), torch.zeros(D, D).double()
    H[0, 0] = 1e-3
    other[0, 0] = 1.0
    answer = solve(problem, W, Statistics(H, None, 0.0, 9, 9), Statistics(other, None, 0.0, 9, 9), Want(sparsity=0.5))
    assert answer.solver == "magnitude"
    assert answer.held_out is not None
    assert answer.held_out[0] == answer.simple


def test_an_embedding_keeps_the_rows_that_are_looked_up_most() -> None:
    problem = problems(nn.Embedding(4, 8))[0][0]
    W = torch.ones(4, 8)
    scale = torch.tensor([0.0, 0.1, 0.3, 0.9]).sqrt()
    answer = solve(
        problem, W, Statistics(2 * torch.eye(8).double(), None, 0.0, 50, 50, scale), None, Want(sparsity=0.5)
    )
    kept = (answer.weights != 0).sum(1)
    assert kept.tolist() == [0, 0, 8, 8]
    torch.testing.assert_close(answer.weights[3], W[3])
