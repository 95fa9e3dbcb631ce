# SPDX-License-Identifier: Apache-2.0
"""Bias correction inside recurrent layers: of the gates before their nonlinearities, which no hook sees.

They are linear in what goes in: mean gates are W_ih E[x] + b_ih and W_hh E[h of the step before] + b_hh, each with a
bias of its own. Correcting them moves the states that they read, so that the means are met to first order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from featherweight.correct.walk import Measured, Site
from featherweight.correct.zeros import put
from featherweight.layers import recurrent
from featherweight.layers.inputs import Call

__all__ = ["recurrent_sites"]


def recurrent_sites(name: str, module: nn.RNNBase | nn.RNNCellBase, held: dict[int, Tensor]) -> Iterator[Site]:
    """A site for each layer of the stack, in order."""
    if isinstance(module, nn.RNNCellBase):
        yield _site(name, name, [""], module, held)
        return
    for layer in range(module.num_layers):
        where = f"{name} layer {layer}".strip() if module.num_layers > 1 else name
        ends = [f"_l{layer}{end}" for end in (("", "_reverse") if module.bidirectional else ("",))]
        yield _site(where, name, ends, module, held)


def _site(where: str, name: str, ends: list[str], module: nn.Module, held: dict[int, Tensor]) -> Site:
    parts = [f"{of}{end}" for end in ends for of in ("ih", "hh")]

    def read(call: Call) -> dict[str, Tensor]:
        leaves = [f"weight_{part}" for part in parts]
        alone = isinstance(call.module, nn.RNNCellBase)
        found = recurrent.cell(call) if alone else recurrent.sequence(call, leaves)
        return {part: found[leaf][0].x for part, leaf in zip(parts, leaves, strict=True)}

    def fold(mine: nn.Module, dense: nn.Module, own: Measured, target: Measured) -> list[str]:
        for part in parts:
            bias = mine.get_parameter(f"bias_{part}")
            shift = _gates(dense, part, target[part].mean) - _gates(mine, part, own[part].mean)
            put(bias, bias.detach().to(torch.float64) + shift.to(bias.device), held)
        return [f"{name}.bias_{part}".lstrip(".") for part in parts]

    biases = [module._parameters.get(f"bias_{part}") for part in parts]
    return Site(where, name, [bias for bias in biases if bias is not None], read, fold)


def _gates(module: nn.Module, part: str, mean: Tensor) -> Tensor:
    """The mean of this part of the gates for this mean of what it reads, on the CPU."""
    weight, bias = getattr(module, f"weight_{part}"), getattr(module, f"bias_{part}")
    gates: Tensor = weight.detach().cpu().double() @ mean.cpu() + bias.detach().cpu().double()
    return gates
