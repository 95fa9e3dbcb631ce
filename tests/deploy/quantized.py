# SPDX-License-Identifier: Apache-2.0
"""Models quantized by hand: weights rounded to grids, grids on inputs from the ranges of one call. No method of ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits import apply
from featherweight.layers import from_matrix, to_matrix, weights
from featherweight.plan import FakeQuant

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.LSTM)


class Block(nn.Module):
    """What integer convs meet: a stem with pooling, a residual, a depthwise conv with ReLU6, a concatenation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.side = nn.Conv2d(8, 4, 3, stride=2, bias=False)
        self.mix = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = torch.cat([F.relu6(self.depth(x)), self.side(x)], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.mix(x)), 1).flatten(1))


class Words(nn.Module):
    """An embedding, a matrix product over sequences, a norm, and the embedding again as the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 64)
        self.mix = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.head(self.norm(x + self.mix(x)))


def on_grid(rows: Tensor, bits: int, chunk: int | None = None) -> Tensor:
    """Rows rounded to a symmetric grid each (or each chunk of each), whose largest value is on it."""
    pieces = rows.reshape(-1, chunk or rows.shape[1])
    scale = pieces.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return ((pieces / scale).round() * scale).reshape(rows.shape)


def quantized(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    bits: int = 8,
    chunk: int | None = None,
    activations: str | None = "static",
    activation_bits: int = 8,
    symmetric: bool = False,
) -> nn.Module:
    """A copy on grids; "static" ones on inputs cover what the inputs of this one call give, zero included."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in weights(model)[0]:
            rows = to_matrix(weight, weight.parameter)
            weight.parameter.copy_(from_matrix(weight, on_grid(rows, bits, chunk)))
        if activations is not None:
            _place(model, inputs, activations == "dynamic", activation_bits, symmetric)
    return model


def _place(model: nn.Module, inputs: tuple[Any, ...], dynamic: bool, bits: int, symmetric: bool) -> None:
    seen: dict[str, tuple[float, float]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    layers = {name: module for name, module in layers.items() if not name.endswith("out_proj")}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update(
                {name: (min(0.0, float(args[0].min())), max(0.0, float(args[0].max())))}
            )
        )
        for name, module in layers.items()
    ]
    model(*inputs)
    for handle in handles:
        handle.remove()
    steps = 2**bits - 1
    for name, (low, high) in seen.items():
        apply(model, FakeQuant(name, bits, symmetric, dynamic))
        grid: Any = model.get_submodule(name).input_grid
        scale = max(-low, high) / (steps // 2) if symmetric else (high - low) / steps
        grid.scale.fill_(scale or 1.0)
        zero_point = 0 if symmetric or not scale else round(-(2 ** (bits - 1)) - low / scale)
        grid.zero_point.fill_(zero_point)
