# SPDX-License-Identifier: Apache-2.0
"""Learned grids at work: one weight, or one layer's input, whose step is a parameter beside the model and never in it.

A weight holds its rounded values whenever the model runs, and its full-precision ones only while the optimizer steps.
Autograd then differentiates by the rounded weight with no help, in any kernel, module or wrapper, and LSQ's two
gradients are closed forms of that one: so there is no parametrization, no buffer, no hook on a weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherweight.edits import FakeQuantize
from featherweight.errors import NumericalError
from featherweight.grids import GridSpec, fit_grid, read_grid
from featherweight.layers import Weight, to_matrix
from featherweight.quantize.lsq import LearnedGrid, gradient_scale, initial_step, levels, limits, step_slope

__all__ = ["STARTS", "LearnedInput", "LearnedWeight"]

STARTS = ("mse", "lsq")
# A step never falls below this share of where it began: at 0 or below a grid has no meaning.
_LEAST = 1e-3
_SAMPLED = 1 << 15  # of an activation's first batch, for the search of its step


class LearnedWeight:
    """A weight on a symmetric grid of `bits` bits, a step per output channel or one for all.

    `full` are the full-precision values, of the weight's shape and type; `factor` is what the optimizer learns.
    """

    def __init__(self, weight: Weight, bits: int, per: str, start: str) -> None:
        self.name, self.bits = weight.name, bits
        self.parameter = weight.parameter
        self._view, shape = _layout(weight, per)
        values = to_matrix(weight, self.parameter.detach())
        self.start = _start(values if per == "row" else values.reshape(1, -1), bits, start).view(shape)
        self.factor = nn.Parameter(torch.ones_like(self.start))
        self.full = self.parameter.detach().clone()
        self._summed = [axis for axis, size in enumerate(shape) if size == 1]
        self._strength = gradient_scale(self.parameter.numel() // self.start.numel(), limits(bits)[1])

    @property
    def step(self) -> Tensor:
        """The steps now, float32, of a shape that broadcasts over the weight's view."""
        return self.start * self.factor.detach()

    def _levels(self) -> tuple[Tensor, Tensor, Tensor]:
        wide = self.full.view(self._view).to(torch.promote_types(self.full.dtype, torch.float32))
        return levels(wide, self.step.to(wide.dtype), self.bits)

    def _values(self, k: Tensor) -> Tensor:
        # Adding zero makes -0.0 a zero to every codec.
        return (k * self.step.to(k.dtype) + 0.0).view(self.full.shape).to(self.full.dtype)

    @torch.no_grad()
    def round(self) -> None:
        """Puts the rounded values into the model."""
        self.parameter.copy_(self._values(self._levels()[0]))

    @torch.no_grad()
    def take_over(self) -> None:
        """After an optimizer step and whatever else changed the weight: these are the full-precision values now."""
        self.full = self.full.to(self.parameter.device)
        self.full.copy_(self.parameter)
        self.factor.clamp_(min=_LEAST)

    @torch.no_grad()
    def give(self, differentiate: bool) -> None:
        """Before an optimizer step: LSQ's gradients from the rounded weight's, and full-precision values in its place.

        What others did to the rounded weight since `round` (a pruner's zeros, a loaded checkpoint) is kept.
        """
        k, ratio, inside = self._levels()
        changed = self.parameter != self._values(k)
        if bool(changed.any()):
            self.full = torch.where(changed, self.parameter, self.full)
        gradient = self.parameter.grad
        if differentiate and gradient is not None and self.factor.requires_grad:
            wide = gradient.view(self._view).to(k.dtype)
            slope = (wide * step_slope(k, ratio, inside)).sum(self._summed, keepdim=True)
            self.factor.grad = (slope * self._strength / self.start).to(self.factor.dtype)
        if differentiate and gradient is not None:
            gradient.masked_fill_(~inside.view(gradient.shape), 0.0)
        self.parameter.copy_(self.full)

    def state_dict(self) -> dict[str, Any]:
        return {"full": self.full.clone(), "start": self.start.clone(), "factor": self.factor.detach().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.full = state["full"].to(self.parameter.device, copy=True)
        self.start = state["start"].to(self.start.device, copy=True)
        self.factor.copy_(state["factor"])


class LearnedInput:
    """The grid on a layer's first input: `edits.FakeQuantize` rounds, this learns scale and, unless fixed, zero point.

    A new grid begins with the first batch that is seen. Inputs that are never negative there get the integers from the
    least on; others a learned zero point, or 0 where the grid is symmetric.
    """

    def __init__(self, layer: str, grid: FakeQuantize, start: str, known: bool, group: Any) -> None:
        self.layer, self.grid, self.ready = layer, grid, known
        self._way, self._group = start, group
        self.start, self.begin = grid.scale.clone(), grid.zero_point.float()
        self.factor = nn.Parameter(torch.ones_like(self.start))
        self.shift = None if grid.symmetric else nn.Parameter(torch.zeros_like(self.start))
        self.fixed = False  # whether the zero point stays where the first batch put it
        # Closed over, not looked up: a deep copy of the model keeps its grids' values and learns nothing.
        self._hooks = [
            grid.register_forward_pre_hook(
                lambda module, args: None if self.ready or module is not grid else self._begin(args[0])
            ),
            grid.register_forward_hook(lambda module, args, y: self._learn(args[0], y) if module is grid else None),
        ]

    @property
    def learned(self) -> list[nn.Parameter]:
        return [self.factor] if self.shift is None else [self.factor, self.shift]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        if not x.is_floating_point() or not x.numel():
            return
        flat = x.detach().reshape(-1).float()
        flat = flat[:: max(1, flat.numel() // _SAMPLED)]
        if not bool(flat.isfinite().all()):
            raise NumericalError(
                f"The input of {self.layer} holds NaN or infinity in the first batch, so that its grid cannot begin. Look "
                "at that batch, and at the layers before this one."
            )
        if not bool(flat.any()):
            return  # nothing to see yet; the next batch may have more
        low, high = limits(self.grid.bits)
        positive = not self.grid.symmetric and not bool((flat < 0).any())
        if self._way == "mse":
            fitted = fit_grid(flat[None], GridSpec(self.grid.bits, self.grid.symmetric))
            scale, zero_point = fitted.scale.reshape(1), fitted.zero_point.reshape(1)
        elif self.grid.symmetric or positive:
            scale = initial_step(flat[None], high - low if positive else high)
            zero_point = torch.full_like(self.grid.zero_point, low if positive else 0)
        else:  # LSQ+: the range of what is seen
            least, most = flat.min().clamp_max(0), flat.max().clamp_min(0)
            scale = ((most - least) / (high - low)).reshape(1)
            zero_point = (low - least / scale).round()
        self._place(scale.to(self.start.dtype), zero_point, positive)

    def _place(self, scale: Tensor, zero_point: Tensor, fixed: bool) -> None:
        said = torch.cat([scale.double(), zero_point.double(), scale.new_tensor([fixed]).double()])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._group) > 1:
            dist.broadcast(said, group=self._group, group_src=0)
        self.start = said[:1].to(self.start.dtype)
        self.begin = said[1:2].to(self.begin.dtype)
        self.fixed, self.ready = bool(said[2]), True
        self.write()

    def _learn(self, x: Any, y: Any) -> Tensor | None:
        if not torch.is_grad_enabled() or not self.ready or not self.factor.requires_grad:
            return None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        strength = gradient_scale(max(1, x.numel() // len(x)) if x.ndim else 1, self._high)
        shift = None if self.fixed else self.shift
        grid = (self.grid.scale.clone(), self.grid.zero_point.clone(), self.start, self.grid.bits, strength)
        learned: Tensor = LearnedGrid.apply(y, x.detach(), self.factor, shift, grid)  # type: ignore[no-untyped-call]
        return learned

    @property
    def _high(self) -> int:
        low, high = limits(self.grid.bits)
        return high - low if self.fixed else high

    @torch.no_grad()
    def write(self) -> None:
        """Puts the learned values into the model's buffers: what is saved, exported and evaluated."""
        if not self.ready:
            return
        low, high = limits(self.grid.bits)
        self.factor.clamp_(min=_LEAST)
        self.grid.scale.copy_(self.start * self.factor)
        moved = self.begin if self.shift is None else self.begin + self.shift * (high - low)
        self.grid.zero_point.copy_(moved.round().clamp(low, high))

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {
            "start": self.start.clone(),
            "begin": self.begin.clone(),
            "factor": self.factor.detach().clone(),
            "shift": None if self.shift is None else self.shift.detach().clone(),
            "ready": self.ready,
            "fixed": self.fixed,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.begin = state["start"].to(self.start.device), state["begin"].to(self.begin.device)
        self.ready, self.fixed = bool(state["ready"]), bool(state["fixed"])
        self.factor.copy_(state["factor"])
        if self.shift is not None:
            self.shift.copy_(state["shift"])
        self.write()


def _layout(weight: Weight, per: str) -> tuple[torch.Size, tuple[int, ...]]:
    """A view of the weight along one of whose shapes the steps of its rows (`to_matrix`) broadcast, and their shape."""
    shape = weight.parameter.shape
    if per == "tensor":
        return shape, (1,) * len(shape)
    if weight.kind == "transposed linear":
        return shape, (1, shape[1])
    if weight.kind == "transposed conv":  # (in, out / groups, ...), where a group owns its own run of inputs
        split = torch.Size((weight.groups, shape[0] // weight.groups, *shape[1:]))
        return split, (weight.groups, 1, shape[1], *[1] * (len(shape) - 2))
    return shape, (shape[0], *[1] * (len(shape) - 1))


def _start(matrix: Tensor, bits: int, way: str) -> Tensor:
    """Where the steps of rows begin, float32: on the grid that the weight has already, else as `way` says."""
    there = read_grid(matrix, most_bits=bits)
    if there is not None and there.bits == bits and not bool(there.zero_point.any()):
        steps = there.scale[:, 0]
    elif way == "mse":
        steps = fit_grid(matrix, GridSpec(bits, symmetric=True)).scale[:, 0]
    else:
        steps = initial_step(matrix.float(), limits(bits)[1])
    # A row of zeros has no step of its own; should it come to life, the others' will do.
    empty = ~matrix.bool().any(1)
    usual = steps[~empty].mean() if bool((~empty).any()) else steps.new_ones(())
    return torch.where(empty, usual, steps)
