# SPDX-License-Identifier: Apache-2.0
"""`fake_quant`: the first input of a layer is rounded to a grid in floating point. Saves nothing by itself.

It simulates what an integer runtime will compute, so that training and evaluation see it. The layer keeps its class
and its state-dict keys; the grid is a child of it, `LAYER.input_grid`, called by a forward pre-hook.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featherweight.edits.find import call_children, find_module
from featherweight.errors import EditError
from featherweight.plan import FakeQuant

__all__ = ["FakeQuantize", "Saturated", "apply_fake_quant", "saturation"]


class FakeQuantize(nn.Module):
    """x -> scale * (clamp(round(x / scale) + zero_point) - zero_point), with the straight-through gradient.

    Integers run from -2^(b-1) to 2^(b-1) - 1, halves round to even, and zero is always on the grid, since `zero_point`
    is one of the integers. A symmetric grid has zero_point 0. `scale` and `zero_point` are buffers of one element; a
    new grid has scale 1. The gradient is 1 where x is within the grid's range and 0 outside it; NaN stays NaN. What is
    outside saturates; `saturation` counts it.

    `dynamic` takes the grid of each call's own range (zero included), as runtimes do that quantize inputs as they
    come; scale and zero_point stay as they are and are not read.

    Written in plain operations: torch's own fused one hides NaN, and cannot be exported with a free batch size.

    >>> grid = FakeQuantize(bits=2, symmetric=True)
    >>> grid(torch.tensor([-5.0, -0.4, 0.6, 5.0]))
    tensor([-2.,  0.,  1.,  1.])
    >>> FakeQuantize(bits=2, symmetric=False, dynamic=True)(torch.tensor([-1.0, 0.4, 0.6, 5.0]))
    tensor([0., 0., 0., 4.])
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, symmetric: bool, dynamic: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.dynamic = dynamic
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def forward(self, x: Tensor) -> Tensor:
        # Half precision has too few digits to count the steps of a fine grid.
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        scale, zero_point = self._of(wide) if self.dynamic else (self.scale, self.zero_point)
        scale, zero_point = scale.to(wide.dtype), zero_point.to(wide.dtype)
        bounded = torch.clamp(wide / scale, self.low - zero_point, self.high - zero_point)
        # Exact, since a number and its rounding are close; autograd sees the identity.
        steps = bounded + (bounded.round() - bounded).detach()
        return (steps * scale).to(x.dtype)

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least grid that holds x and zero."""
        smallest, largest = x.detach().amin().clamp_max(0), x.detach().amax().clamp_min(0)
        if self.symmetric:
            scale = torch.maximum(-smallest, largest) / max(self.high, 1)
            zero_point = torch.zeros_like(scale)
        else:
            scale = (largest - smallest) / (self.high - self.low)
            zero_point = self.low - smallest / torch.where(scale > 0, scale, 1.0)
        return torch.where(scale > 0, scale, 1.0), zero_point.round()

    @torch.no_grad()
    def outside(self, x: Tensor) -> Tensor:
        """How many values of x saturate: those that round to an integer beyond the grid's. Zero dimensions, int64."""
        if self.dynamic:
            return torch.zeros((), dtype=torch.int64, device=x.device)
        steps = (x.float() / self.scale).round() + self.zero_point
        return ((steps < self.low) | (steps > self.high)).sum()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}" + (", dynamic=True" if self.dynamic else "")


@dataclasses.dataclass
class Saturated:
    """Of `seen` values that came to a layer's grid, `outside` were beyond its range and took its nearest end."""

    outside: int = 0
    seen: int = 0

    @property
    def share(self) -> float:
        return self.outside / max(self.seen, 1)


@contextlib.contextmanager
def saturation(model: nn.Module) -> Iterator[dict[str, Saturated]]:
    """Counts, for as long as it is open, what of your model's activations is outside the ranges of their grids.

    By layer, one entry for each that has a static grid on its input. Copies that are made of the model meanwhile count
    too. Costs one more pass over each such input, which is why it is not always on.

    >>> from featherweight import FakeQuant, apply
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> apply(model, FakeQuant("0", bits=2, symmetric=True))
    >>> with saturation(model) as counts:
    ...     _ = model(torch.tensor([[0.5, 7.0]]))
    >>> counts
    {'0': Saturated(outside=1, seen=2)}
    """
    counts: dict[str, Saturated] = {}
    handles = []
    try:
        for name, grid in model.named_modules():
            if isinstance(grid, FakeQuantize) and not grid.dynamic:
                layer = name.rpartition(".")[0]
                counts[layer] = Saturated()
                handles.append(grid.register_forward_pre_hook(_counting(counts[layer])))
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _counting(total: Saturated) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(grid: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(grid, FakeQuantize):
            total.outside += int(grid.outside(args[0]))
            total.seen += args[0].numel()

    return hook


def _round_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Looked up on the module, not closed over: a deep copy of the layer must call its own grid.
    grid: Any = module.input_grid
    if args:
        return (_rounded(grid, args[0]), *args[1:]), kwargs
    first = next(iter(inspect.signature(module.forward).parameters))
    return args, {**kwargs, first: _rounded(grid, kwargs[first])}


def _rounded(grid: Callable[[Tensor], Tensor], x: Any) -> Any:
    return x._replace(data=grid(x.data)) if isinstance(x, PackedSequence) else grid(x)


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
    grid = FakeQuantize(edit.bits, edit.symmetric, edit.dynamic).to(None if tensor is None else tensor.device)
    layer.input_grid = grid.train(layer.training)
    layer.register_forward_pre_hook(_round_input, with_kwargs=True)
    call_children(model, layer)
