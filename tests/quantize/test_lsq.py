# SPDX-License-Identifier: Apache-2.0
"""The formulas of LSQ and LSQ+ against the papers', scalar by scalar, and against finite differences where they are smooth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featherweight.quantize.lsq import (
    LearnedGrid,
    gradient_scale,
    initial_step,
    levels,
    limits,
    offset_slope,
    step_slope,
)


def paper(v: float, s: float, bits: int) -> tuple[float, float, float]:
    """v̂, ∂v̂/∂s and ∂v̂/∂v of equations 1 to 3 and 5, for signed data."""
    q_n, q_p = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    x = v / s
    v_bar = float(np.round(min(max(x, -q_n), q_p)))
    if x <= -q_n:
        return v_bar * s, -q_n, 0.0
    if x >= q_p:
        return v_bar * s, q_p, 0.0
    return v_bar * s, -x + float(np.round(x)), 1.0


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_values_and_gradients_are_those_of_the_paper(bits: int) -> None:
    s = 0.37
    v = torch.linspace(-1.7, 1.9, 997, dtype=torch.float64) * 2 ** (bits - 1) * s
    k, ratio, inside = levels(v, torch.tensor(s, dtype=torch.float64), bits)
    value, by_step, by_value = np.array([paper(float(one), s, bits) for one in v]).T
    assert np.allclose((k * s).numpy(), value, rtol=1e-12)
    assert np.allclose(step_slope(k, ratio, inside).numpy(), by_step, atol=1e-12)
    assert np.array_equal(inside.numpy(), by_value == 1)
    assert {float(one) for one in k} >= {float(one) for one in limits(bits)}


def test_slopes_are_finite_differences_with_what_rounding_adds_held_still() -> None:
    """Straight through: v/s + c is what round gives, c being taken for constant; outside of the range nothing is rounded."""
    v, s, h = torch.linspace(-3.3, 3.1, 401, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), 1e-6
    k, ratio, inside = levels(v, s, bits=3)
    c = k - ratio

    def surrogate(step: torch.Tensor) -> torch.Tensor:
        low, high = limits(3)
        return torch.where(inside, (v / step + c) * step, torch.where(ratio > 0, high * step, low * step))

    difference = (surrogate(s + h) - surrogate(s - h)) / (2 * h)
    assert torch.allclose(step_slope(k, ratio, inside), difference, atol=1e-8)


def test_the_offsets_slope_is_lsq_plus_by_its_beta() -> None:
    """LSQ+ has v̂ = s·q + β with ∂v̂/∂β = 1 outside of the range and 0 within; z = -β / s."""
    s, z = torch.tensor(0.25), torch.tensor(3.0)
    v = torch.tensor([-5.0, 0.1, 4.0])
    _, _, inside = levels(v, s, 4, z)
    assert inside.tolist() == [False, True, False]
    h = 1e-2

    def value(beta: float) -> torch.Tensor:  # outside of the range the bound moves with β
        low, high = limits(4)
        return torch.where(v > 0, high * s, low * s) + beta

    by_beta = torch.where(inside, 0.0, (value(h) - value(-h)) / (2 * h))
    assert torch.allclose(offset_slope(s, inside), by_beta * -s, atol=1e-5)


def test_initial_step_and_scale_are_those_of_section_2() -> None:
    values = torch.randn(3, 50, dtype=torch.float64)
    for row, step in zip(values.numpy(), initial_step(values, high=7), strict=True):
        assert float(step) == pytest.approx(2 * np.abs(row).mean() / math.sqrt(7))
    assert gradient_scale(250, high=7) == pytest.approx(1 / math.sqrt(250 * 7))


@pytest.mark.parametrize("shifts", [True, False])
def test_a_learned_input_gets_the_papers_gradients_whatever_its_step_began_with(shifts: bool) -> None:
    """`factor` moves so that with SGD s moves by rate · g · ∂L/∂s; the gradient to y passes as it is."""
    x = torch.linspace(-2, 3, 60).reshape(4, 15)
    start, factor, shift = torch.tensor([0.2]), torch.tensor([1.5], requires_grad=True), torch.zeros(1)
    shift.requires_grad_(shifts)
    scale, zero_point = start * factor.detach(), torch.tensor([-3], dtype=torch.int32)
    y = torch.zeros_like(x).requires_grad_()
    upstream, strength = torch.randn_like(x), 0.3
    grid = (scale, zero_point, start, 4, strength)
    out = LearnedGrid.apply(y, x, factor, shift if shifts else None, grid)
    out.backward(upstream)
    assert torch.equal(y.grad, upstream)

    of_step, of_beta, s, z = 0.0, 0.0, 0.3, -3
    for v, g in zip(x.flatten().tolist(), upstream.flatten().tolist(), strict=True):
        t = v / s
        if -8 - z <= t <= 7 - z:
            of_step += g * (float(np.round(t)) - t)
        else:
            of_step += g * (7 - z if t > 0 else -8 - z)
            of_beta += g
    rate = 0.01
    moved = float(start) * rate * float(factor.grad)
    assert moved == pytest.approx(rate * strength * of_step, rel=1e-4)
    if shifts:
        beta_moved = -s * 15 * rate * float(shift.grad)  # z moves by 15 levels for a whole shift; β = -s z
        assert beta_moved == pytest.approx(rate * strength * of_beta, rel=1e-4)
    else:
        assert shift.grad is None
