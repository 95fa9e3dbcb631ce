# SPDX-License-Identifier: Apache-2.0
"""H is checked, dead inputs are found before damping hides them, and damping that grows is said."""

import numpy as np
import pytest
import torch

from featherweight.errors import NumericalError, OptionError
from featherweight.solvers import damp, layer_loss
from tests.solvers.problems import layer, output_error


def test_the_loss_is_the_output_error_per_sample() -> None:
    W, H, X = layer(5, 7)
    V = W * (torch.arange(7) % 2)
    assert layer_loss(W, V, H) == pytest.approx(output_error(W, V, X), rel=1e-12)


def test_damping_is_relative_to_the_mean_of_the_live_diagonal() -> None:
    _, H, _ = layer(1, 6)
    H[2] = H[:, 2] = 0.0
    damped = damp(H, 0.01)
    live = [0, 1, 3, 4, 5]
    expected = H[live][:, live] + 0.01 * H.diagonal()[live].mean() * torch.eye(5)
    assert torch.allclose(damped.H[live][:, live], expected, rtol=1e-12)
    assert damped.dead.tolist() == [False, False, True, False, False, False]
    assert damped.damping == damped.asked == 0.01
    assert "1 of 6 inputs were zero" in " ".join(damped.notes)


def test_a_dead_input_is_coupled_to_nothing() -> None:
    _, H, _ = layer(1, 6)
    H[2] = H[:, 2] = 0.0
    inverse = damp(H, 0.0).inverse
    assert inverse[2].nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_too_few_samples_raise_the_damping_and_the_note_says_so(dtype: torch.dtype) -> None:
    _, H, _ = layer(1, 40, samples=10)
    damped = damp(H.to(dtype), 0.0)
    assert damped.damping > damped.asked == 0.0
    assert "more calibration samples" in damped.notes[0]
    assert torch.allclose(damped.H @ damped.inverse, torch.eye(40, dtype=torch.float64), atol=1e-3)


def test_the_inverse_is_numpys() -> None:
    _, H, _ = layer(1, 30)
    damped = damp(H, 1e-3)
    assert np.allclose(damped.inverse.numpy(), np.linalg.inv(damped.H.numpy()), rtol=1e-8)


def test_the_hessian_that_was_given_is_not_changed() -> None:
    _, H, _ = layer(1, 5)
    before = H.clone()
    damp(H, 0.1)
    assert torch.equal(H, before)


@pytest.mark.parametrize(
    ("H", "error"),
    [
        (torch.ones(2, 3), OptionError),
        (torch.ones(2), OptionError),
        (torch.zeros(0, 0), OptionError),
        (torch.ones(2, 2, dtype=torch.int64), OptionError),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), NumericalError),
        (torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]), NumericalError),
        (torch.tensor([[1.0, 0.9], [-0.9, 1.0]]), NumericalError),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), NumericalError),
        (torch.tensor([[1.0, 50.0], [50.0, 1.0]]), NumericalError),
    ],
)
def test_what_is_no_gram_matrix_is_refused(H: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        damp(H)


def test_a_hessian_of_dead_inputs_alone_can_be_damped() -> None:
    damped = damp(torch.zeros(3, 3))
    assert bool(damped.dead.all())
    assert bool((damped.H.diagonal() > 0).all())
