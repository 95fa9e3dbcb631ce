# SPDX-License-Identifier: Apache-2.0
"""What the weights of recurrent layers read: the layer's input, and the hidden states one step earlier.

torch runs all layers and time steps in one call and shows only the last layer's states. Here the same kernels run one
layer at a time on the packed form of the sequence, so that each layer's states are seen; this costs one more forward of
the module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featherweight.layers.inputs import Call, Input, wide

__all__ = ["cell", "sequence"]

_ALL = slice(None)
_KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def cell(call: Call) -> dict[str, list[Input]]:
    """LSTMCell, GRUCell, RNNCell: (n, features) and the state it was handed, zeros where it was handed none."""
    module = cast(nn.LSTMCell, call.module)
    x, state = call.argument(0, "input"), call.argument(1, "hx")
    hidden = state[0] if isinstance(state, tuple) else state
    rows = x.reshape(-1, module.input_size)
    if hidden is None:
        hidden = x.new_zeros(len(rows), module.hidden_size)
    flat = hidden.reshape(-1, module.hidden_size)
    return {
        "weight_ih": [Input(wide(rows), x, ("rows",), "cell")],
        "weight_hh": [Input(wide(flat), hidden, ("rows",), "cell")],
    }


def sequence(call: Call, leaves: Collection[str]) -> dict[str, list[Input]]:
    """LSTM, GRU and RNN of any depth, in both directions, projected or not, padded or packed."""
    module = cast(nn.LSTM, call.module)
    origin, x, sizes, states, keep = _packed(module, call)
    deepest = max(int(leaf.split("_l")[1].split("_")[0]) for leaf in leaves)
    found: dict[str, list[Input]] = {}
    for layer in range(deepest + 1):
        start = layer * _directions(module)
        own = [state[start : start + _directions(module)] for state in states]
        y = _run_layer(module, layer, x, sizes, own)
        step = f"layer {layer}"
        read = Input(wide(x[keep]), x if layer else origin, ("sequence", keep is not _ALL), step)
        for direction, part in enumerate(y.chunk(_directions(module), dim=1)):
            name = f"l{layer}{'_reverse' if direction else ''}"
            before = _before(part, sizes, own[0][direction], backwards=bool(direction))
            found[f"weight_ih_{name}"] = [read]
            found[f"weight_hh_{name}"] = [Input(wide(before[keep]), before, (), step)]
            if f"weight_hr_{name}" in leaves:
                inner = _before_projection(module, name, x, before, sizes, own[1][direction], bool(direction))
                found[f"weight_hr_{name}"] = [Input(wide(inner[keep]), inner, (), f"{step}, projection")]
        x = y
    return found


def _directions(module: nn.RNNBase) -> int:
    return 2 if module.bidirectional else 1


def _packed(module: nn.LSTM, call: Call) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Any]:
    """The tensor read, its rows time step by time step, rows a step, the initial states, and which rows are tokens."""
    x, given = call.argument(0, "input"), call.argument(1, "hx")
    keep: Any = _ALL
    order: Tensor | None = None
    if isinstance(x, PackedSequence):
        origin, rows, sizes, order = x.data, x.data, x.batch_sizes, x.sorted_indices
    else:
        origin = x
        if batched := x.ndim == 3:
            x = x.transpose(0, 1) if module.batch_first else x
        else:
            x = x[:, None]
        if batched and module.batch_first and call.mask is not None and call.mask.shape == origin.shape[:2]:
            keep = call.mask.to(x.device).T.reshape(-1)
        rows, sizes = x.reshape(-1, x.shape[-1]), torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
    n, wanted = int(sizes[0]), module.num_layers * _directions(module)
    states = list(given) if isinstance(given, tuple) else [given]
    if given is None:
        states = [rows.new_zeros(wanted, n, module.proj_size or module.hidden_size)]
        if isinstance(module, nn.LSTM):
            states.append(rows.new_zeros(wanted, n, module.hidden_size))
    states = [state if state.ndim == 3 else state[:, None] for state in states]
    if order is not None:
        states = [state.index_select(1, order) for state in states]
    return origin, rows, sizes, states, keep


def _run_layer(module: nn.LSTM, layer: int, x: Tensor, sizes: Tensor, states: list[Tensor]) -> Tensor:
    """One layer's answers, row by row; the directions side by side."""
    own = module.all_weights[layer * _directions(module) : (layer + 1) * _directions(module)]
    flat = [weight for direction in own for weight in direction]
    initial: Any = states if module.mode == "LSTM" else states[0]
    answer = _KERNELS[module.mode](x, sizes, initial, flat, module.bias, 1, 0.0, False, module.bidirectional)
    return answer[0]


def _spans(sizes: Tensor) -> Iterator[tuple[int, int]]:
    """Where each time step's rows begin and how many they are."""
    start = 0
    for size in sizes.tolist():
        yield start, size
        start += size


def _before(y: Tensor, sizes: Tensor, initial: Tensor, backwards: bool) -> Tensor:
    """For each row, the hidden state that its step started from: sequences that begin here start from `initial`."""
    spans = list(_spans(sizes))
    rows = []
    for t, (_, size) in enumerate(spans):
        start, there = (spans[t + 1] if t + 1 < len(spans) else (0, 0)) if backwards else spans[t - 1] if t else (0, 0)
        there = min(there, size)
        rows += [y[start : start + there], initial[there:size]]
    return torch.cat(rows)


def _before_projection(
    module: nn.LSTM, name: str, x: Tensor, before: Tensor, sizes: Tensor, initial: Tensor, backwards: bool
) -> Tensor:
    """An LSTM's hidden states before weight_hr: its gates from known inputs at once, only the cell step by step."""
    gates = x @ getattr(module, f"weight_ih_{name}").T + before @ getattr(module, f"weight_hh_{name}").T
    if module.bias:
        gates = gates + getattr(module, f"bias_ih_{name}") + getattr(module, f"bias_hh_{name}")
    enter, forget, new, leave = gates.chunk(4, dim=1)
    write, forget, leave = enter.sigmoid() * new.tanh(), forget.sigmoid(), leave.sigmoid()
    hidden = torch.empty_like(leave)
    memory = initial.clone()
    spans = list(_spans(sizes))
    for start, size in reversed(spans) if backwards else spans:
        rows = slice(start, start + size)
        memory[:size] = forget[rows] * memory[:size] + write[rows]
        hidden[rows] = leave[rows] * memory[:size].tanh()
    return hidden
