# SPDX-License-Identifier: Apache-2.0
"""`fake_quant`: the first input of a layer is rounded to a grid in floating point. Saves nothing by itself.

It simulates what an integer runtime will compute, so that training and evaluation see it. The layer keeps its class
and its state-dict keys; the grid is a child of it, `LAYER.input_grid`, called by a forward pre-hook.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.edits.find import call_children, find_module
from featherweight.errors import EditError
from featherweight.plan import FakeQuant

__all__ = ["FakeQuantize", "apply_fake_quant"]


class FakeQuantize(nn.Module):
    """x -> scale * (clamp(round(x / scale) + zero_point) - zero_point), with the straight-through gradient.

    Integers run from -2^(b-1) to 2^(b-1) - 1, halves round to even, and zero is always on the grid, since `zero_point`
    is one of the integers. A symmetric grid has zero_point 0. `scale` and `zero_point` are buffers of one element; a new
    grid has scale 1. The gradient is 1 where x is within the grid's range and 0 outside it; NaN stays NaN.

    Written in plain operations: torch's own fused one hides NaN, and cannot be exported with a free batch size.

    >>> grid = FakeQuantize(bits=2, symmetric=True)
    >>> grid(torch.tensor([-5.0, -0.4, 0.6, 5.0]))
    tensor([-2.,  0.,  1.,  1.])
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        # Half precision has too few digits to count the steps of a fine grid.
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        scale, zero_point = self.scale.to(wide.dtype), self.zero_point.to(wide.dtype)
        bounded = torch.clamp(wide / scale, low - zero_point, high - zero_point)
        # Exact, since a number and its rounding are close; autograd sees the identity.
        steps = bounded + (bounded.round() - bounded).detach()
        return (steps * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}"


def _round_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Looked up on the module, not closed over: a deep copy of the layer must call its own grid.
    grid: Any = module.input_grid
    if args:
        return (grid(args[0]), *args[1:]), kwargs
    first = next(iter(inspect.signature(module.forward).parameters))
    return args, {**kwargs, first: grid(kwargs[first])}


def apply_fake_quant(model: nn.Module, edit: FakeQuant) -> None:
    """Gives the layer a child `input_grid` and a hook that calls it."""
    layer = find_module(model, edit.layer)
    if not 1 <= edit.bits <= 16:
        raise EditError(f"{edit.layer}: bits must be 1 to 16; got {edit.bits}.")
    if hasattr(layer, "input_grid"):
        raise EditError(f"{edit.layer} has a grid on its input already.")
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        raise EditError(f"{edit.layer} is a {type(layer).__name__}: its input is indices, which have no grid.")
    if isinstance(layer, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise EditError(f"{edit.layer} is a {type(layer).__name__}, which is never called; name a layer in it.")
    if any(isinstance(module, nn.MultiheadAttention) and module.out_proj is layer for module in model.modules()):
        raise EditError(f"{edit.layer} is never called, its attention reads its weight; swap in 'attention' first.")
    tensor = next(itertools.chain(layer.parameters(), layer.buffers(), model.parameters()), None)
    grid = FakeQuantize(edit.bits, edit.symmetric).to(None if tensor is None else tensor.device)
    layer.input_grid = grid.train(layer.training)
    layer.register_forward_pre_hook(_round_input, with_kwargs=True)
    call_children(model, layer)
