# SPDX-License-Identifier: Apache-2.0
"""The refit is numpy's least squares on the inputs, for any mask, in any batch."""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from featherweight.errors import NumericalError, OptionError
from featherweight.solvers import damp, refit
from featherweight.solvers.deflation import Deflated
from featherweight.solvers.hessian import row_losses
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


@pytest.fixture
def large_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the least d that is refitted by products."""
    return lambda least: monkeypatch.setattr(importlib.import_module("featherweight.solvers.refit"), "_LEAST", least)


@pytest.mark.parametrize("damping", [1e-2, 1e-6])
@pytest.mark.parametrize("budget_bytes", [1, 1 << 30])
def test_rows_refitted_by_products_are_within_a_millionth_of_the_least_loss(
    large_is: Callable[[int], None], damping: float, budget_bytes: int
) -> None:
    """Oracle: a factorization for each row; rows of every share of zeros, none and all among them."""
    W, H, _ = layer(40, 160, samples=200)
    damped = damp(H, damping)
    draw = torch.rand(40, 160, generator=torch.Generator().manual_seed(1))
    pruned = draw < torch.linspace(0, 1, 40)[:, None]
    large_is(1000)
    exact = refit(W, H, pruned, damping, budget_bytes)
    large_is(1)
    V, done = importlib.import_module("featherweight.solvers.refit")._by_products(W, damped, pruned, budget_bytes)
    assert float(done.float().mean()) > (0.99 if damping > 1e-3 else 0.9), "nearly singular, some are left to factors"
    assert not V[pruned].any()
    least, found = (row_losses(W, one, damped.H) for one in (exact, V))
    energy = row_losses(W, torch.zeros_like(W), damped.H)
    assert bool((found <= least * (1 + 4e-6) + 1e-11 * energy)[done].all())
    assert float(found.sum()) >= float(least.sum()) * (1 - 1e-9)


def test_rows_that_products_do_not_bring_there_are_factorized(
    large_is: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    W, H, _ = layer(24, 256)
    pruned = torch.rand(24, 256, generator=torch.Generator().manual_seed(1)) < 0.5
    large_is(1000)
    exact = refit(W, H, pruned)
    large_is(1)
    calls = []
    by_products = Deflated.refit

    def halfway(self: Deflated, *problem: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        V, done = by_products(self, *problem)
        calls.append(len(V))
        V[::2], done[::2] = torch.nan, False
        return V, done

    monkeypatch.setattr(Deflated, "refit", halfway)
    monkeypatch.setattr(importlib.import_module("featherweight.solvers.refit"), "products_work", lambda rows, d: 0.0)
    V = refit(W, H, pruned)
    assert calls == [24]
    torch.testing.assert_close(V[::2], exact[::2])
    torch.testing.assert_close(V, exact, rtol=1e-2, atol=1e-3)


def test_products_serve_many_masks_of_many_weights_and_factors_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one mask share one factor, and few zeros or few weights make small ones."""
    module = importlib.import_module("featherweight.solvers.refit")
    taken = []
    monkeypatch.setattr(module, "_by_products", lambda W, *rest: (taken.append(True) or W, torch.ones(len(W)).bool()))
    W, H = torch.ones(600, 512, dtype=torch.float64), torch.eye(512, dtype=torch.float64)
    draw = torch.rand(600, 512, generator=torch.Generator().manual_seed(1))
    for pruned, expected in ((draw < 0.5, True), (draw < 0.1, False), (draw < 0.9, False), (draw[:1] < 0.5, False)):
        taken.clear()
        refit(W, H, pruned.expand(600, -1).contiguous())
        assert bool(taken) == expected


def test_misfits_are_refused_by_name() -> None:
    W, H, _ = layer(4, 12)
    with pytest.raises(OptionError, match="columns"):
        refit(W[:, :5], H, torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(OptionError, match="mask"):
        refit(W, H, torch.zeros(4, 12))
    with pytest.raises(NumericalError, match="NaN"):
        refit(W * torch.nan, H, torch.zeros(4, 12, dtype=torch.bool))
