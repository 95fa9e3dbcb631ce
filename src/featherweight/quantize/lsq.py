# SPDX-License-Identifier: Apache-2.0
"""Learned step sizes (LSQ, Esser et al. 2020, arXiv 1902.08153) and offsets (LSQ+, arXiv 2004.09576): formulas alone.

A value v goes to s · (q - z) with q = clamp(round(v / s) + z, low, high). Rounding has no useful derivative, so it is
taken for the identity ("straight through"): a value within the range passes its gradient on, one outside does not. The
step's derivative then keeps what matters, how far v lies from the nearest transition: that is what sets LSQ apart from
gradients that are zero inside of the range.

A step is learned as a factor of where it began, s = start · factor, and the factor's gradient is divided by `start`
instead of multiplied. With SGD that is LSQ to the letter, since what is linear in the step stays so; with Adam, which
moves everything by about its rate whatever its size, steps of 0.001 and of 10 then move by the same share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["LearnedGrid", "gradient_scale", "initial_step", "levels", "limits", "offset_slope", "step_slope"]


def limits(bits: int) -> tuple[int, int]:
    """The least and the greatest integer of `bits` bits.

    >>> limits(4)
    (-8, 7)
    """
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def initial_step(values: Tensor, high: int) -> Tensor:
    """2 mean|v| / √Qp over the last axis (section 2.1 of LSQ); `high` is Qp, the greatest multiple of the step.

    >>> initial_step(torch.tensor([[1.0, -3.0]]), high=4)
    tensor([2.])
    """
    return 2 * values.abs().mean(-1) / math.sqrt(high)


def gradient_scale(count: int, high: int) -> float:
    """1 / √(N · Qp) (section 2.2 of LSQ), for a step that N values share: updates of steps and weights then balance.

    >>> gradient_scale(100, high=4)
    0.05
    """
    return 1 / math.sqrt(count * high)


def levels(v: Tensor, step: Tensor, bits: int, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q - z, v / s and whether v lies within the range: equations 1 and 5. Halves round to even; z is 0 if not given.

    >>> k, ratio, inside = levels(torch.tensor([-9.0, 0.6, 1.4]), torch.tensor(2.0), bits=2)
    >>> k, inside
    (tensor([-2.,  0.,  1.]), tensor([False,  True,  True]))
    """
    low, high = limits(bits)
    ratio = v / step
    if zero_point is None:
        bounded = torch.clamp(ratio, low, high)
    else:
        bounded = torch.clamp(ratio, low - zero_point, high - zero_point)
    return bounded.round(), ratio, bounded == ratio


def step_slope(k: Tensor, ratio: Tensor, inside: Tensor) -> Tensor:
    """∂v̂/∂s by equation 3: round(v/s) - v/s within the range, and the bound itself outside of it.

    >>> step_slope(*levels(torch.tensor([-9.0, 0.6, 1.4]), torch.tensor(2.0), bits=2))
    tensor([-2.0000, -0.3000,  0.3000])
    """
    return torch.where(inside, k - ratio, k)


def offset_slope(step: Tensor, inside: Tensor) -> Tensor:
    """∂v̂/∂z: 0 within the range, where a shifted zero point shifts q along, and -s outside of it (LSQ+, equation 6).

    LSQ+ learns β = -s · z, whose derivative outside of the range is 1.
    """
    return torch.where(inside, 0.0, -step)


class LearnedGrid(torch.autograd.Function):
    """The identity on y, a rounded x, with LSQ's gradients for what the rounding was done by.

    y brings x its own gradient; this adds those of `factor` and `shift`, where scale = start · factor and
    z = round(begin + shift · (2^bits - 1)). `scale` and `zero_point` are those that y was made with.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        factor: Tensor,
        shift: Tensor | None,
        grid: tuple[Tensor, Tensor, Tensor, int, float],
    ) -> Tensor:
        scale, zero_point, start, bits, strength = grid
        ctx.save_for_backward(x, scale, zero_point, start)
        ctx.bits, ctx.strength, ctx.shifts = bits, strength, shift is not None
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, start = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, scale = gradient.to(dtype), scale.to(dtype)
        k, ratio, inside = levels(x.to(dtype), scale, ctx.bits, zero_point)
        of_step = (wide * step_slope(k, ratio, inside)).sum().reshape(1) * ctx.strength / start
        of_shift = None
        if ctx.shifts:
            # LSQ moves β = -s·z by rate · strength · ∂L/∂β; the shift that does the same is z's, in shares of the
            # range.
            of_offset = wide.masked_fill(inside, 0.0).sum().reshape(1)
            of_shift = -of_offset * ctx.strength / (scale * ((1 << ctx.bits) - 1))
        return gradient, None, of_step, of_shift, None
