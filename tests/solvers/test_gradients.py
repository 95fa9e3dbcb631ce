# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients against the exact refit, with H behind a function and through a convolution that never makes it."""

import itertools

import pytest
import torch
from torch.nn import functional

from featherweight.errors import NumericalError, OptionError
from featherweight.solvers import refit
from featherweight.solvers.gradients import refit_by_gradients
from tests.solvers.problems import layer


def masked(rows: int, d: int, share: float = 0.6) -> torch.Tensor:
    return torch.rand(rows, d, generator=torch.Generator().manual_seed(3)) < share


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_it_ends_at_the_exact_refit(share: float, preconditioned: bool) -> None:
    W, H, _ = layer(7, 30)
    W[3] *= 1e4
    pruned = masked(7, 30, share)
    diagonal = H.diagonal() if preconditioned else None
    found = refit_by_gradients(lambda V: V @ H, W @ H, W, pruned, 200, 1e-12, diagonal)
    assert torch.allclose(found, refit(W, H, pruned, damping=0.0), rtol=1e-7, atol=1e-9)
    assert bool((found[pruned] == 0).all())


def test_as_many_iterations_as_free_weights_are_exact() -> None:
    """A property of conjugate gradients that steepest descent, or steps shared between rows, would not have."""
    W, H, _ = layer(6, 40)
    pruned = torch.ones(6, 40, dtype=torch.bool)
    for row in range(6):
        pruned[row, row : row + 5] = False
    found = refit_by_gradients(lambda V: V @ H, W @ H, W, pruned, 5, 0.0, H.diagonal())
    assert torch.allclose(found, refit(W, H, pruned, damping=0.0), rtol=1e-8)


def test_the_loss_falls_in_every_iteration_and_rows_do_not_touch_each_other() -> None:
    W, H, _ = layer(5, 40)
    pruned = masked(5, 40)

    def loss(V: torch.Tensor) -> torch.Tensor:
        return (((W - V) @ H) * (W - V)).sum(1)

    found = [refit_by_gradients(lambda V: V @ H, W @ H, W, pruned, n, 0.0, H.diagonal()) for n in range(12)]
    for before, after in itertools.pairwise(found):
        assert bool((loss(after) <= loss(before) * (1 + 1e-12)).all())
    alone = refit_by_gradients(lambda V: V @ H, W[2:3] @ H, W[2:3], pruned[2:3], 11, 0.0, H.diagonal())
    assert torch.allclose(alone, found[-1][2:3], rtol=1e-10)


def test_the_preconditioner_pays_where_inputs_differ_in_size() -> None:
    W, H, _ = layer(6, 40)
    size = torch.logspace(-2, 2, 40, dtype=torch.float64)
    H, W = H * size * size[:, None], W / size
    pruned, exact = masked(6, 40), refit(W, H, masked(6, 40), damping=0.0)
    least = float((((W - exact) @ H) * (W - exact)).sum())
    losses = []
    for diagonal in (None, H.diagonal()):
        V = refit_by_gradients(lambda V: V @ H, W @ H, W, pruned, 20, 0.0, diagonal)
        losses.append(float((((W - V) @ H) * (W - V)).sum()))
    assert losses[1] < 1.01 * least < losses[0]


def test_rows_rest_at_the_tolerance_and_apply_is_called_no_more() -> None:
    W, H, _ = layer(6, 40)
    calls = []

    def apply(V: torch.Tensor) -> torch.Tensor:
        calls.append(V)
        return V @ H

    pruned = masked(6, 40)
    rough = refit_by_gradients(apply, W @ H, W, pruned, 100, 1e-2, H.diagonal())
    first = len(calls)
    refit_by_gradients(apply, W @ H, W, pruned, 100, 1e-6, H.diagonal())
    assert 2 < first < len(calls) - first < 101
    exact = refit(W, H, pruned, damping=0.0)
    again = refit_by_gradients(apply, W @ H, exact, pruned, 100, 1e-6, H.diagonal())
    assert torch.allclose(again, exact)
    assert not torch.allclose(rough, exact, rtol=1e-6)


def test_through_a_convolution_and_its_transpose() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 9, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    pruned = masked(4, 27)
    tokens = 6 * 5 * 5

    def apply(V: torch.Tensor) -> torch.Tensor:
        answer = functional.conv2d(images, V.view(4, 3, 3, 3), stride=2, padding=1)
        back = torch.nn.grad.conv2d_weight(images, (4, 3, 3, 3), answer, stride=2, padding=1)
        return 2 * back.flatten(1) / tokens

    W = weight.flatten(1)
    X = functional.unfold(images, 3, stride=2, padding=1).transpose(0, 1).flatten(1)
    H = 2 * X @ X.T / tokens
    found = refit_by_gradients(apply, apply(W), W, pruned, 60, 1e-12, H.diagonal())
    assert torch.allclose(found, refit(W, H, pruned, damping=0.0), rtol=1e-7, atol=1e-10)


def test_dead_inputs_and_float32_do_no_harm() -> None:
    W, H, _ = layer(6, 40)
    H[:, 5] = H[5] = 0.0
    pruned = masked(6, 40)
    single = refit_by_gradients(lambda V: V @ H.float(), (W @ H).float(), W.float(), pruned, 60, 1e-6, H.diagonal())
    assert single.dtype == torch.float32
    exact = refit(W, H, pruned, damping=1e-9)
    least, ours = (float((((W - V.double()) @ H) * (W - V.double())).sum()) for V in (exact, single))
    assert ours < least * (1 + 1e-4)


def test_what_is_no_gram_operator_is_refused() -> None:
    W, H, _ = layer(4, 12)
    pruned = masked(4, 12)
    with pytest.raises(NumericalError, match="curvature"):
        refit_by_gradients(lambda V: -V @ H, W @ H, W, pruned)
    with pytest.raises(NumericalError, match="NaN"):
        refit_by_gradients(lambda V: V @ H * torch.nan, W @ H, W, pruned)
    with pytest.raises(OptionError, match="one shape"):
        refit_by_gradients(lambda V: V @ H, W @ H, W, pruned[:2])
