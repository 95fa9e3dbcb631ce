# SPDX-License-Identifier: Apache-2.0
"""OBQ, GPTQ, the descents and the scales against numpy restatements and exhaustive search."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from featherweight.grids import GridSpec, fit_grid
from featherweight.solvers import descent, quantize
from featherweight.solvers import gptq as gptq_room
from featherweight.solvers.descent import coordinate_descent, set_descent
from featherweight.solvers.gptq import gptq, upper_factor
from featherweight.solvers.hessian import damp, row_losses
from featherweight.solvers.obq import obq
from featherweight.solvers.problem import Quantization
from featherweight.solvers.scales import least_squares_scales
from tests.solvers.problems import layer

SPECS = [GridSpec(bits=2), GridSpec(bits=3, symmetric=True), GridSpec(bits=4, chunk=7)]


def problem(rows: int, d: int, spec: GridSpec, zeros: float = 0.0, seed: int = 0, **options: object) -> Quantization:
    W, H, _ = layer(rows, d, seed=seed)
    held = (
        torch.rand(rows, d, generator=torch.Generator().manual_seed(seed)) < zeros * torch.linspace(0, 2, rows)[:, None]
    )
    grid = fit_grid(W.masked_fill(held, 0.0), spec)
    return dataclasses.replace(Quantization(W, damp(H, 1e-3), grid, held, True, 1 << 30), **options)


def losses(p: Quantization, integers: torch.Tensor) -> torch.Tensor:
    return row_losses(p.W, p.grid.values(integers), p.damped.H)


def on_grid(p: Quantization, row: int, column: int, value: float) -> tuple[int, float]:
    chunk = column // p.grid.chunk
    scale, zero = float(p.grid.scale[row, chunk]), int(p.grid.zero_point[row, chunk])
    q = int(np.clip(np.round(value / scale + zero), p.grid.low, p.grid.high))
    return q, scale * (q - zero)


def step_of(p: Quantization, row: int, column: int) -> float:
    return float(p.grid.scale[row, column // p.grid.chunk])


def obq_by_inversion(p: Quantization, outliers_first: bool) -> np.ndarray:
    """OBQ with the inverse of what is left taken anew at each step; what is held goes first, at no choice."""
    H = p.damped.H.numpy()
    integers = p.grid.integers(torch.zeros_like(p.W)).numpy().copy()
    for i, w in enumerate(p.W.numpy().copy()):
        free = np.flatnonzero(~p.held[i].numpy())
        gone = np.flatnonzero(p.held[i].numpy())
        if len(free) == 0:
            continue
        w[free] += np.linalg.solve(H[np.ix_(free, free)], H[np.ix_(free, gone)] @ w[gone])
        while len(free):
            inverse = np.linalg.inv(H[np.ix_(free, free)])
            targets = [on_grid(p, i, c, w[c]) for c in free]
            errors = np.array([value - w[c] for c, (_, value) in zip(free, targets, strict=True)])
            relative = np.abs(errors) / [step_of(p, i, c) for c in free]
            j = int((errors**2 / np.diag(inverse)).argmin())
            if outliers_first and relative.max() > 0.5 + 1e-7:
                j = int(relative.argmax())
            integers[i, free[j]] = targets[j][0]
            w[free] += inverse[j] * errors[j] / inverse[j, j]
            free = np.delete(free, j)
    return integers


@pytest.mark.parametrize("outliers_first", [True, False])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_obq_goes_as_with_inverses_taken_anew(spec: GridSpec, zeros: float, outliers_first: bool) -> None:
    p = problem(5, 20, spec, zeros)
    found = obq(p, outliers_first)
    assert np.array_equal(found.numpy(), obq_by_inversion(p, outliers_first))
    assert torch.equal(obq(dataclasses.replace(p, budget_bytes=1), outliers_first), found)


def test_outliers_first_is_what_saves_two_bits() -> None:
    p = problem(16, 40, GridSpec(bits=2))
    assert float(losses(p, obq(p)).sum()) < 0.7 * float(losses(p, obq(p, outliers_first=False)).sum())


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_goes_as_with_inverses_taken_anew(
    monkeypatch: pytest.MonkeyPatch, spec: GridSpec, zeros: float, activation_order: bool
) -> None:
    monkeypatch.setattr(gptq_room, "_BLOCK", 6)
    p = problem(5, 20, spec, zeros)
    H = p.damped.H.numpy()
    order = np.argsort(-np.diag(H), kind="stable") if activation_order else np.arange(20)
    W, expected = p.W.numpy().copy(), np.empty((5, 20), int)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        for i, w in enumerate(W):
            q, value = on_grid(p, i, column, 0.0 if p.held[i, column] else w[column])
            expected[i, column] = q
            w[left] -= inverse[0] * (w[column] - value) / inverse[0, 0]
    assert np.array_equal(gptq(p, activation_order).numpy(), expected)


def test_the_upper_factor_is_numpys_of_the_inverse() -> None:
    H = problem(1, 12, SPECS[0]).damped.H
    expected = np.linalg.cholesky(np.linalg.inv(H.numpy())).T
    assert np.allclose(upper_factor(H).numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_after_the_descent_no_single_change_helps(
    monkeypatch: pytest.MonkeyPatch, spec: GridSpec, zeros: float
) -> None:
    """Oracle: every other integer at every place, its loss computed outright."""
    monkeypatch.setattr(descent, "_BLOCK", 5)
    p = problem(4, 14, spec, zeros)
    start = p.grid.integers(p.W.masked_fill(p.held, 0.0))
    found = coordinate_descent(p, start, sweeps=50)
    now = losses(p, found)
    assert bool((now <= losses(p, start) * (1 + 1e-12)).all()) and float(now.sum()) < float(losses(p, start).sum())
    assert torch.equal(found[p.held], start[p.held])
    for column, q in itertools.product(range(14), range(p.grid.low, p.grid.high + 1)):
        other = found.clone()
        other[:, column] = torch.where(p.held[:, column], other[:, column], q)
        assert bool((losses(p, other) >= now * (1 - 1e-9)).all())


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_freed_sets_only_ever_lower_the_loss_of_a_row(spec: GridSpec, zeros: float) -> None:
    p = problem(12, 40, spec, zeros)
    start = coordinate_descent(p, gptq(p))
    found = set_descent(p, start, passes=2, width=8)
    assert bool((losses(p, found) <= losses(p, start) * (1 + 1e-12)).all())
    assert float(losses(p, found).sum()) < float(losses(p, start).sum())
    assert torch.equal(found[p.held], start[p.held])
    assert int(found.min()) >= p.grid.low and int(found.max()) <= p.grid.high
    assert torch.equal(set_descent(p, start, passes=2, width=8), found)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("budget_bytes", [1, 1 << 30])
def test_scales_are_least_squares_on_the_outputs(chunk: int | None, budget_bytes: int) -> None:
    W, H, X = layer(6, 14)
    p = Quantization(W, damp(H, 0.0), fit_grid(W, GridSpec(bits=3, chunk=chunk)), W > 9, True, budget_bytes)
    integers = p.grid.integers(W)
    found = least_squares_scales(p, integers)
    for i in range(6):
        levels = (integers[i] - p.grid.zero_point[i, torch.arange(14) // p.grid.chunk]).double().numpy()
        parts = [levels * (np.arange(14) // p.grid.chunk == k) for k in range(p.grid.scale.shape[1])]
        best = np.linalg.lstsq(np.stack([part @ X for part in parts], 1), W[i].numpy() @ X, rcond=None)[0]
        assert np.allclose(found.scale[i].numpy(), best, rtol=1e-5)


def test_scales_that_would_turn_negative_or_have_no_say_stay() -> None:
    W, H, _ = layer(2, 10)
    grid = fit_grid(W, GridSpec(bits=3, chunk=5))
    p = Quantization(W, damp(H, 0.0), grid, W > 9, True, 1 << 30)
    integers = grid.integers(W)
    integers[0] = 2 * grid.zero_point[0, torch.arange(10) // 5] - integers[0]  # the first row's weights, negated
    integers[1, :5] = grid.zero_point[1, 0]  # the second row's first chunk, all at zero
    found = least_squares_scales(p, integers)
    assert torch.equal(found.scale[0], grid.scale[0])
    assert found.scale[1, 0] == grid.scale[1, 0] and found.scale[1, 1] != grid.scale[1, 1]


def test_the_search_comes_near_the_best_integers_there_are() -> None:
    found, least = 0.0, 0.0
    for seed in range(4):
        p = problem(3, 6, GridSpec(bits=2), seed=seed)
        found += np.log(quantize(p.W, p.damped.H, p.grid, solver="admm+polish", fit_scales=False, damping=0.0).loss)
        levels = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)))
        least += np.log(
            sum(
                float(row_losses(p.W[i], p.grid.scale[i].double() * (levels - p.grid.zero_point[i]), p.damped.H).min())
                for i in range(3)
            )
        )
    assert -1e-9 <= found - least < 4 * np.log(1.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_beats_obq(bits: int) -> None:
    ratio = 0.0
    for seed in range(3):
        W, H, _ = layer(16, 48, seed=seed)
        ratio += np.log(quantize(W, H, GridSpec(bits), solver="admm+polish").loss)
        ratio -= np.log(quantize(W, H, GridSpec(bits), solver="obq").loss)
    assert np.exp(ratio / 3) < 0.97
