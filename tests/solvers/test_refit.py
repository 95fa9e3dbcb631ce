# SPDX-License-Identifier: Apache-2.0
"""The refit is numpy's least squares on the inputs, for any mask, in any batch."""

import numpy as np
import pytest
import torch

from featherweight.errors import NumericalError, OptionError
from featherweight.solvers import refit
from tests.solvers.problems import best_values, layer


def masks(rows: int, d: int) -> dict[str, torch.Tensor]:
    draw = torch.rand(rows, d, generator=torch.Generator().manual_seed(1))
    ragged = draw < torch.linspace(0, 1, rows)[:, None]
    return {
        "few": draw < 0.2,
        "half": draw < 0.5,
        "most": draw < 0.9,
        "from none to all": ragged,
        "columns": (draw[:1] < 0.6).expand(rows, -1),
        "pairs of rows": (draw < 0.6)[::2].repeat_interleave(2, 0)[:rows],
        "none": draw < 0,
        "all": draw < 2,
    }


@pytest.mark.parametrize("budget_bytes", [1, 1 << 30])
@pytest.mark.parametrize("name", masks(2, 2))
def test_the_refit_is_least_squares_on_the_inputs(name: str, budget_bytes: int) -> None:
    W, H, X = layer(9, 24)
    pruned = masks(9, 24)[name]
    V = refit(W, H, pruned, damping=0.0, budget_bytes=budget_bytes)
    expected = np.stack([best_values(w, X, ~p) for w, p in zip(W.numpy(), pruned.numpy(), strict=True)])
    assert np.allclose(V.numpy(), expected, rtol=1e-8, atol=1e-10)
    assert bool((V[pruned] == 0).all())


def test_damping_is_a_ridge_toward_the_weights_that_were() -> None:
    """Oracle: least squares with one more sample an input, sqrt(λ samples / 2), whose target is the old weights."""
    W, H, X = layer(4, 12, samples=8)
    pruned = masks(4, 12)["half"]
    ridge = 0.1 * float(H.diagonal().mean())
    more = np.hstack([X, np.sqrt(ridge * X.shape[1] / 2) * np.eye(12)])
    expected = np.stack([best_values(w, more, ~p) for w, p in zip(W.numpy(), pruned.numpy(), strict=True)])
    assert np.allclose(refit(W, H, pruned, damping=0.1).numpy(), expected, rtol=1e-7, atol=1e-9)


def test_float32_weights_come_back_as_float32_refitted_in_float64() -> None:
    W, H, _ = layer(4, 12)
    pruned = masks(4, 12)["half"]
    V = refit(W.float(), H.float(), pruned)
    assert V.dtype == torch.float32
    assert torch.allclose(V.double(), refit(W, H, pruned), rtol=1e-4, atol=1e-5)


def test_the_weights_that_were_given_are_not_changed() -> None:
    W, H, _ = layer(4, 12)
    before = W.clone()
    refit(W, H, masks(4, 12)["half"])
    assert torch.equal(W, before)


def test_misfits_are_refused_by_name() -> None:
    W, H, _ = layer(4, 12)
    with pytest.raises(OptionError, match="columns"):
        refit(W[:, :5], H, torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(OptionError, match="mask"):
        refit(W, H, torch.zeros(4, 12))
    with pytest.raises(NumericalError, match="NaN"):
        refit(W * torch.nan, H, torch.zeros(4, 12, dtype=torch.bool))
