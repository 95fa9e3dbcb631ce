# SPDX-License-Identifier: Apache-2.0
"""LSTM, GRU and plain recurrent layers: one hidden unit is a position of every gate, and the same in all layers and
directions, since torch builds them of one size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.graph.join import Value
from featherweight.graph.walk import Call, Rule, Walk, plain

__all__ = ["RULES"]


def layers(walk: Walk, call: Call) -> Any:
    """lstm, gru, rnn_tanh, rnn_relu over a sequence, packed or not."""
    params, biases = list(call["params"]), bool(call["has_biases"])
    x: Value = call["input"] if call["input"] is not None else call["data"]
    count = call["num_layers"] * (2 if call["bidirectional"] else 1)
    each = len(params) // count
    states = call["hx"] if isinstance(call["hx"], list | tuple) else [call["hx"]]
    projected = each == (5 if biases else 3)
    entering = walk.vector(walk.pin(x, range(len(x.shape) - 1), f"{call.name} runs along it"), -1)
    outputs: list[Tensor] = []
    hidden: Tensor | None = None
    for layer in range(call["num_layers"]):
        outputs = []
        for direction in range(count // call["num_layers"]):
            at = (layer * (count // call["num_layers"]) + direction) * each
            mine, out = _cell(walk, call, params[at : at + each], entering, biases, projected, x)
            if hidden is not None:
                walk.labels.unite(hidden, mine)
            hidden = mine
            outputs.append(out)
        entering = torch.cat(outputs)
    for state, labels in zip(states, (outputs[0], hidden), strict=False):
        _meet(walk, state, labels)
    found = plain(call)
    sizes = (entering, outputs[0], hidden)
    return [Value(v.shape, _last(v.shape, labels)) for v, labels in zip(found, sizes, strict=False)]


def _cell(
    walk: Walk, call: Call, params: list[Value], entering: Tensor | None, biases: bool, projected: bool, x: Value
) -> tuple[Tensor, Tensor]:
    """One layer in one direction: the labels of its hidden units, and of what it gives."""
    into, inner = params[0], params[1]
    out = walk.vector(inner, 1)
    out = out if out is not None else torch.zeros(inner.shape[1], dtype=torch.int64)
    hidden = out
    if projected:
        rows, columns = (walk.vector(params[-1], axis) for axis in (0, 1))
        if rows is None or columns is None:
            rows, columns = (
                torch.zeros(params[-1].shape[0], dtype=torch.int64),
                torch.zeros(params[-1].shape[1], dtype=torch.int64),
            )
        walk.labels.unite(rows, out)
        walk.role(params[-1], {0: "output", 1: "input"})
        hidden = columns
    gates = inner.shape[0] // len(hidden)
    for one in params[: 4 if biases else 2]:
        rows = walk.vector(one, 0)
        if rows is not None:
            walk.labels.unite(rows.view(gates, -1), hidden[None])
        walk.role(one, {0: "output", 1: "input"} if len(one.shape) > 1 else {0: "output"})
    columns = walk.vector(into, 1)
    if columns is not None:
        if entering is None:
            walk.labels.freeze(columns, "it reads a tensor without channels")
        else:
            walk.labels.unite(columns, entering)
    elif entering is not None:
        walk.labels.freeze(entering, "it is read by a single position")
    steps = max(1, x.shape[0] * x.shape[1] if len(x.shape) == 3 else x.shape[0])
    for one in (into, inner, *(params[-1:] if projected else ())):
        if one.tensor is not None:
            walk.weights.setdefault(one.tensor, call.name)
            walk.tell(
                call,
                Value((steps, one.shape[0]), _last((steps, one.shape[0]), walk.vector(one, 0))),
                (steps, (walk.extent(one, 0), walk.extent(one, 1))),
                one.tensor,
            )
    return hidden, out


def _meet(walk: Walk, state: Value | None, labels: Tensor | None) -> None:
    """A first state: made to size, or it must have the same channels."""
    if state is None or state.uniform or labels is None:
        return
    mine = walk.vector(state, -1)
    if mine is None:
        walk.labels.freeze(labels, "its first state is given, and has no channels")
    else:
        walk.labels.unite(mine, labels)


def _last(shape: tuple[int, ...], labels: Tensor | None) -> tuple[Tensor, ...]:
    return (
        ()
        if labels is None or not bool(labels.any()) or len(labels) == 1
        else (labels.reshape((1,) * (len(shape) - 1) + (-1,)),)
    )


def cell(walk: Walk, call: Call) -> Any:
    """One step of an LSTM, GRU or plain cell."""
    states = call["hx"] if isinstance(call["hx"], list | tuple) else [call["hx"]]
    params = [call[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call[name] is not None]
    x: Value = call["input"]
    hidden, _ = _cell(walk, call, params, walk.vector(x, -1), len(params) == 4, False, x)
    for state in states:
        _meet(walk, state, hidden)
    found = plain(call)
    if isinstance(found, list):
        return [Value(v.shape, _last(v.shape, hidden)) for v in found]
    return Value(found.shape, _last(found.shape, hidden))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), layers),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), cell),
}
