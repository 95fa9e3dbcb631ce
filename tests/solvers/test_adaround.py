# SPDX-License-Identifier: Apache-2.0
"""Learned rounding against every way of rounding up or down, where those can be counted."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from featherweight.grids import Grid, GridSpec, fit_grid
from featherweight.solvers import quantize
from featherweight.solvers.adaround import adaround
from featherweight.solvers.hessian import damp, row_losses
from featherweight.solvers.problem import Quantization
from tests.solvers.problems import layer


def problem(rows: int, d: int, spec: GridSpec, seed: int) -> Quantization:
    W, H, _ = layer(rows, d, seed=seed)
    return Quantization(W, damp(H, 1e-3), fit_grid(W, spec), torch.zeros_like(W, dtype=torch.bool), True, 1 << 30)


def exhaustive(p: Quantization) -> np.ndarray:
    """The least loss of each row over all 2^d choices of up or down; beyond the grid, of its last two values."""
    H, columns = p.damped.H.numpy(), torch.arange(p.d)
    step, zero = (t.numpy() for t in p.grid.at(columns))
    least = np.empty(p.rows)
    for i, w in enumerate(p.W.numpy()):
        below = np.floor((w / step[i] + zero[i]).clip(p.grid.low, p.grid.high - 1))
        choices = np.array(list(itertools.product((0, 1), repeat=p.d)))
        change = step[i] * (below + choices - zero[i]) - w
        least[i] = (((change @ H) * change).sum(1) / 2).min()
    return least


def losses(p: Quantization, integers: torch.Tensor) -> np.ndarray:
    return row_losses(p.W, p.grid.values(integers), p.damped.H).numpy()


@pytest.mark.parametrize("spec", [GridSpec(2), GridSpec(3, chunk=4), GridSpec(4, symmetric=True)], ids=str)
def test_it_comes_near_the_best_of_all_roundings_up_or_down(spec: GridSpec) -> None:
    ratio, nearest = [], []
    for seed in range(4):
        p = problem(6, 10, spec, seed)
        integers, least = adaround(p), exhaustive(p)
        exact = p.grid.integers(p.W)
        assert int((integers - exact).abs().max()) == 1
        found = losses(p, integers)
        assert bool((found >= least * (1 - 1e-9)).all())
        ratio += list(found / least)
        nearest += list(losses(p, exact) / least)
    assert np.log(ratio).mean() < min(0.2, 0.7 * np.log(nearest).mean())


@pytest.mark.parametrize("steps", [0, 1, 1000])
def test_no_row_is_worse_than_rounded_to_nearest(steps: int) -> None:
    p = problem(8, 12, GridSpec(3), seed=5)
    assert bool((losses(p, adaround(p, steps)) <= losses(p, p.grid.integers(p.W))).all())


def test_the_size_of_the_layer_does_not_matter() -> None:
    p = problem(8, 12, GridSpec(3), seed=1)
    grid = dataclasses.replace(p.grid, scale=p.grid.scale * 1024)
    larger = dataclasses.replace(p, W=p.W * 1024, damped=damp(p.damped.H / 4096, 0.0), grid=grid)
    assert torch.equal(adaround(p), adaround(larger))


def test_the_sum_is_rounded_where_inputs_are_alike_and_beyond_the_grid_the_other_makes_up() -> None:
    H = torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64)
    grid = Grid(torch.tensor([[1.0]]), torch.tensor([[0]], dtype=torch.int32), bits=3, chunk=2)
    for weights, integers in (([0.6, 0.8], [0, 1]), ([9.0, 0.2], [3, 1]), ([2.0, -0.4], [2, 0])):
        W = torch.tensor([weights], dtype=torch.float64)
        assert quantize(W, H, grid, solver="adaround", damping=0.0).integers[0].tolist() == integers


def test_zeros_stay() -> None:
    W, H, _ = layer(6, 20)
    W[:, ::2] = 0.0
    result = quantize(W, H, GridSpec(3), solver="adaround")
    assert bool((result.weights[:, ::2] == 0).all())
    assert result.loss < quantize(W, H, GridSpec(3), solver="nearest").loss
