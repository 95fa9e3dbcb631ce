# SPDX-License-Identifier: Apache-2.0
"""`fake_quant`: the first input of a layer is rounded to a grid in floating point. Saves nothing by itself.

It simulates what an integer runtime will compute, so that training and evaluation see it. The layer keeps its class
and its state-dict keys; the grid is a child of it, `LAYER.input_grid`, called by a forward pre-hook.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.edits.find import find_module
from featherweight.errors import EditError
from featherweight.plan import FakeQuant

__all__ = ["FakeQuantize", "apply_fake_quant"]


class FakeQuantize(nn.Module):
    """x -> scale * (clamp(round(x / scale) + zero_point) - zero_point), with the straight-through gradient.

    Integers run from -2^(b-1) to 2^(b-1) - 1; zero is always on the grid, since `zero_point` is one of them. A
    symmetric grid has zero_point 0. `scale` and `zero_point` are buffers of one element; a new grid has scale 1.

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
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, low, high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}"


def _round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # Looked up on the module, not closed over: a deep copy of the layer must call its own grid.
    return (module.input_grid(args[0]), *args[1:])  # type: ignore[operator]


def apply_fake_quant(model: nn.Module, edit: FakeQuant) -> None:
    layer = find_module(model, edit.layer)
    if not 1 <= edit.bits <= 16:
        raise EditError(f"{edit.layer}: bits must be 1 to 16; got {edit.bits}.")
    if hasattr(layer, "input_grid"):
        raise EditError(f"{edit.layer} has a grid on its input already.")
    parameter = next(layer.parameters(recurse=False), None)
    layer.input_grid = FakeQuantize(edit.bits, edit.symmetric).to(parameter.device if parameter is not None else None)
    layer.register_forward_pre_hook(_round_input)
