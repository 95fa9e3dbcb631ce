# SPDX-License-Identifier: Apache-2.0
"""Bias correction inside recurrent layers: of the gates before their nonlinearities, which no hook sees.

They are linear in what goes in: mean gates are W_ih E[x] + b_ih and W_hh E[h of the step before] + b_hh. Inputs and
outputs give both expectations; for the lower layers of a stack, these layers are run by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.correct.walk import Call, Measured, Site
from featherweight.correct.zeros import put

__all__ = ["recurrent_sites"]


def recurrent_sites(
    name: str, module: nn.RNNBase | nn.RNNCellBase, held: dict[int, Tensor]
) -> Iterator[tuple[Site, list[Tensor]]]:
    """A site for each layer of the stack, in order, with the biases that it sets."""
    if isinstance(module, nn.RNNCellBase):
        yield _site(name, name, "", ("",), module, held)
        return
    ends = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        where = f"{name} layer {layer}".strip() if module.num_layers > 1 else name
        yield _site(where, name, f"_l{layer}", ends, module, held)


def _site(
    where: str, name: str, layer: str, ends: tuple[str, ...], module: nn.Module, held: dict[int, Tensor]
) -> tuple[Site, list[Tensor]]:
    names = [f"bias_{of}{layer}{end}" for end in ends for of in ("ih", "hh")]

    def read(call: Call) -> dict[str, Tensor] | str:
        if isinstance(call.module, nn.RNNCellBase):
            return _cell_inputs(call)
        if not isinstance(call.argument(0, "input"), Tensor):
            return "reads packed sequences"
        return _layer_inputs(call, int(layer.removeprefix("_l")))

    def fold(mine: nn.Module, dense: nn.Module, own: Measured, target: Measured) -> list[str]:
        for bias in names:
            end = "_reverse" if bias.endswith("_reverse") else ""
            part = "input" if bias.startswith("bias_ih") else f"state{end}"
            shift = _gates(dense, bias, target[part].mean) - _gates(mine, bias, own[part].mean)
            parameter = mine._parameters[bias]
            if parameter is not None:
                put(parameter, parameter.detach().to(torch.float64) + shift.to(parameter.device), held)
        return [f"{name}.{bias}".lstrip(".") for bias in names]

    biases = [module._parameters.get(bias) for bias in names]
    return Site(where, name, read, fold), [bias for bias in biases if bias is not None]


def _gates(module: Any, bias: str, mean: Tensor) -> Tensor:
    """The mean of this part of the gates for this mean of what it reads, on the CPU."""
    weight: Tensor = getattr(module, bias.replace("bias", "weight", 1)).detach().cpu().double()
    offset: Tensor = getattr(module, bias).detach().cpu().double()
    return weight @ mean.cpu() + offset


def _cell_inputs(call: Call) -> dict[str, Tensor]:
    x, state = call.argument(0, "input"), call.argument(1, "hx")
    h = state[0] if isinstance(state, tuple) else state
    size: int = call.module.hidden_size  # type: ignore[assignment]
    h = x.new_zeros(*x.shape[:-1], size) if h is None else h
    return {"input": x.reshape(-1, x.shape[-1]), "state": h.reshape(-1, h.shape[-1])}


def _layer_inputs(call: Call, layer: int) -> dict[str, Tensor]:
    """What one layer of the stack reads: its inputs, and for each direction the states of the step before."""
    module: Any = call.module
    directions = 2 if module.bidirectional else 1
    x, outputs = (_items_first(tensor, module) for tensor in (call.argument(0, "input"), call.output[0]))
    state = call.argument(1, "hx")
    h = state[0] if isinstance(state, tuple) else state
    for below in range(layer + 1):
        own = slice(below * directions, (below + 1) * directions)
        if below == module.num_layers - 1:
            given = outputs
        else:
            given = _alone(module, below, x)(x, _of_layer(state, own))[0]
        if below < layer:
            x = given
    first = x.new_zeros(directions, len(x), module.proj_size or module.hidden_size)
    first = first if h is None else _batched(h)[layer * directions : (layer + 1) * directions]
    forth, *back = given.chunk(directions, -1)
    found = {"input": x, "state": torch.cat([first[0][:, None], forth[:, :-1]], 1)}
    if back:
        found["state_reverse"] = torch.cat([back[0][:, 1:], first[1][:, None]], 1)
    return found


def _items_first(tensor: Tensor, module: Any) -> Tensor:
    """(items, steps, channels), whatever the module's layout."""
    if tensor.ndim == 2:
        return tensor[None]
    return tensor if module.batch_first else tensor.transpose(0, 1)


def _batched(h: Tensor) -> Tensor:
    return h if h.ndim == 3 else h[:, None]


def _of_layer(state: Any, own: slice) -> Any:
    if isinstance(state, tuple):
        return tuple(_batched(part)[own] for part in state)
    return None if state is None else _batched(state)[own]


def _alone(module: Any, layer: int, x: Tensor) -> nn.RNNBase:
    """One layer of the stack as a module that reads (items, steps, channels) and has the stack's own parameters."""
    options: dict[str, Any] = {"bidirectional": module.bidirectional, "bias": module.bias, "device": "meta"}
    if isinstance(module, nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    if module.proj_size:
        options["proj_size"] = module.proj_size
    one: nn.RNNBase = type(module)(x.shape[-1], module.hidden_size, batch_first=True, **options)
    for name in list(one._parameters):
        setattr(one, name, module._parameters[name.replace("_l0", f"_l{layer}")])
    return one.eval()
