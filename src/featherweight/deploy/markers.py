# SPDX-License-Identifier: Apache-2.0
"""Grids on activations, on their way into an ONNX file: `FakeQuantize` is traced as the nodes that it stands for.

In a copy of the model each `FakeQuantize` is replaced by a module that emits QuantizeLinear and DequantizeLinear as
ONNX nodes. So they stand in the graph exactly where the model calls them, whatever the exporter makes of the layer
after it (Gemm, MatMul, Conv, LSTM), and no pattern of rounding and clamping has to be recognised.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.edits.fake_quant import FakeQuantize
from featherweight.measure import eval_copy

__all__ = ["Marks", "has_grids", "mark", "without_grids"]


@dataclasses.dataclass(frozen=True)
class Marks:
    """How many grids a model has on activations: of fixed ranges, of each call's own, and wider than 8 bits."""

    static: int = 0
    dynamic: int = 0
    wide: int = 0

    @property
    def any(self) -> bool:
        return self.static + self.dynamic + self.wide > 0


def has_grids(model: nn.Module) -> bool:
    """Whether any layer of the model has a grid on its input."""
    return any(isinstance(module, FakeQuantize) for module in model.modules())


def without_grids(twin: nn.Module) -> nn.Module:
    """The same weights with activations as they are: another copy of a copy made by `measure.eval_copy`."""
    bare = eval_copy(twin)
    for owner in list(bare.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, FakeQuantize):
                setattr(owner, name, nn.Identity())
    return bare


def mark(model: nn.Module) -> Marks:
    """Replaces each `FakeQuantize` of this model (a copy of yours, to be exported) by one that exports as ONNX nodes.

    8 bits and fewer become QuantizeLinear to uint8, below 8 bits with a Clip before it; a dynamic grid of 8 bits
    DynamicQuantizeLinear; any other stays arithmetic in floating point, which no runtime will do in integers.
    """
    counts = {"static": 0, "dynamic": 0, "wide": 0}
    made: dict[int, nn.Module] = {}
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if not isinstance(child, FakeQuantize):
                continue
            if id(child) not in made:
                kind, made[id(child)] = _marker(child)
                counts[kind] += 1
            setattr(owner, name, made[id(child)])
    return Marks(**counts)


def _marker(grid: FakeQuantize) -> tuple[str, nn.Module]:
    dynamic = bool(getattr(grid, "dynamic", False))
    if dynamic and grid.bits == 8 and not grid.symmetric:
        return "dynamic", _Dynamic()
    if dynamic or grid.bits > 8:
        return "wide", grid
    return "static", _Static(grid)


class _Static(nn.Module):
    """QuantizeLinear, DequantizeLinear with constants. uint8, as runtimes multiply uint8 by int8: zero_point + 128."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: FakeQuantize) -> None:
        super().__init__()
        zero_point = grid.zero_point.detach().reshape(()).to(torch.int32)
        self.register_buffer("scale", grid.scale.detach().reshape(()).float())
        self.register_buffer("zero_point", (zero_point + 128).to(torch.uint8))
        low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
        ends = [float(self.scale * (end - zero_point)) for end in (low, high)]
        self.ends = None if grid.bits == 8 else ends

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.ends is not None:  # a runtime saturates at the ends of 8 bits only
            wide = wide.clamp(*self.ends)
        ops: Any = torch.onnx.ops
        constants = [self.scale, self.zero_point]
        q = ops.symbolic("QuantizeLinear", [wide, *constants], dtype=torch.uint8, shape=x.shape)
        return _as(ops.symbolic("DequantizeLinear", [q, *constants], dtype=torch.float32, shape=x.shape), x)


class _Dynamic(nn.Module):
    """DynamicQuantizeLinear: uint8 over the range of each call, zero included."""

    def forward(self, x: Tensor) -> Tensor:
        ops: Any = torch.onnx.ops
        q, scale, zero_point = ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            [x.float()],
            dtypes=[torch.uint8, torch.float32, torch.uint8],
            shapes=[x.shape, [], []],
        )
        back = ops.symbolic("DequantizeLinear", [q, scale, zero_point], dtype=torch.float32, shape=x.shape)
        return _as(back, x)


def _as(value: Tensor, like: Tensor) -> Tensor:
    """`x.float()` of a float32 tensor leaves no node; nor must this."""
    return value if like.dtype == torch.float32 else value.to(like.dtype)
