# SPDX-License-Identifier: Apache-2.0
"""What statistics are held against: real modules run with other weights, and the equations of those that hide what they read."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.layers import Problem, Statistics, collect, problems, to_matrix
from featherweight.layers.weights import from_matrix
from featherweight.task import default_forward


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers has it: the weight is stored in x out."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def gather(model: nn.Module, batches: list[Any], **options: Any) -> dict[str, Statistics]:
    found, _ = problems(model)
    return collect(model, options.pop("only", found), batches, default_forward, **options)


def perturbed(model: nn.Module) -> nn.Module:
    """A copy whose weights are others, as a compressed model's are."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return other


def arguments(model: nn.Module, layer: nn.Module, batches: list[Any]) -> list[tuple[Any, ...]]:
    """What a layer is called with over all batches."""
    seen: list[tuple[Any, ...]] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        for batch in batches:
            default_forward(model, batch)
    handle.remove()
    return seen


def answers(layer: nn.Module, parameter: Tensor, args: tuple[Any, ...]) -> Tensor:
    """The layer's answer with these weights and without bias, as (tokens, rows)."""
    other = {"weight": parameter}
    if layer.bias is not None:
        other["bias"] = torch.zeros_like(layer.bias)
    y = functional_call(layer, other, args)
    if isinstance(layer, nn.Linear | Conv1D):
        return y.reshape(-1, y.shape[-1])
    axes = len(layer.kernel_size)
    return (y if y.ndim == axes + 2 else y[None]).movedim(1, -1).flatten(0, -2)


def loss_of(
    problem: Problem, layer: nn.Module, twin: nn.Module, here: list[tuple[Any, ...]], there: list[tuple[Any, ...]]
) -> Callable[[Tensor], Tensor]:
    """||Y - V X||² / tokens by running the module; other rows and input channels keep their weights."""
    rows, channels = problem.rows, range(problem.weight.columns_per_tap)[problem.channels or slice(None)]
    whole = to_matrix(problem.weight, layer.weight.detach())
    taps = whole.shape[1] // problem.weight.columns_per_tap
    columns = [tap * problem.weight.columns_per_tap + channel for tap in range(taps) for channel in channels]

    def loss(V: Tensor) -> Tensor:
        matrix = whole.clone()
        matrix[rows] = matrix[rows].index_copy(1, torch.tensor(columns), V)
        total, tokens = torch.zeros((), dtype=V.dtype), 0
        for x, x_ref in zip(here, there, strict=True):
            y = answers(twin, twin.weight.detach(), x_ref)[:, rows]
            total = total + (y - answers(layer, from_matrix(problem.weight, matrix), x)[:, rows]).square().sum()
            tokens += len(y)
        return total / tokens

    return loss


def assert_same_loss(
    loss: Callable[[Tensor], Tensor], found: Statistics, V: Tensor, constant: float | None = None
) -> None:
    """Value, gradient and one Hessian-vector product of a loss over V (rows, d) against those from (H, T, energy)."""
    V = V.clone().requires_grad_()
    direction = torch.randn_like(V)
    value = loss(V)
    [gradient] = torch.autograd.grad(value, V, create_graph=True)
    [product] = torch.autograd.grad((gradient * direction).sum(), V)
    H, T = found.H, found.T
    assert T is not None
    ours = found.energy / 2 - (V * T).sum() + ((V @ H) * V).sum() / 2
    torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(V @ H - T, gradient, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(direction @ H, product, rtol=1e-8, atol=1e-9)


def images(*shape: int) -> list[Tensor]:
    """Two batches of unequal size."""
    return [torch.randn(n, *shape, dtype=torch.float64) for n in (3, 2)]


def case(kind: type[nn.Module], *args: Any, **options: Any) -> Any:
    label = " ".join([kind.__name__, *map(str, args), *(f"{key}={value}" for key, value in options.items())])
    return pytest.param(lambda: kind(*args, **options), id=label)


def front_and(layer: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """A network in which the layer reads what another layer made, and two batches for it."""
    axes = len(getattr(layer, "kernel_size", ()))
    if axes == 0:
        front, batches = nn.Linear(4, 4), images(5, 4)
    else:
        front = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 4, 1)
        batches = images(4, *(7, 6, 5)[:axes])
    return nn.Sequential(front, nn.Tanh(), layer).double(), batches


def gram(x: Tensor) -> Tensor:
    return 2 * x.T @ x / len(x)


def steps_of(cell: str, gates: Tensor, recurrent: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One time step of the equations in torch's documentation, given W_ih x + b_ih and W_hh h + b_hh: hidden, memory."""
    if cell == "LSTM":
        i, f, g, o = (gates + recurrent).chunk(4)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        return o.sigmoid() * memory.tanh(), memory
    r, z, n = zip(gates.chunk(3), recurrent.chunk(3), strict=True)
    new = (n[0] + sum(r).sigmoid() * n[1]).tanh()
    z = sum(z).sigmoid()
    return new, z  # the caller mixes in the former state


def unrolled(module: nn.RNNBase, sequences: list[Tensor], states: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
    """What each weight reads, sequence by sequence (T, features), step by step; and `y`, the last layer's answers."""
    directions, size = (2 if module.bidirectional else 1), module.proj_size or module.hidden_size
    read: dict[str, list[Tensor]] = {}
    ends = []
    for number, x in enumerate(sequences):
        for layer in range(module.num_layers):
            sides = []
            for direction in range(directions):
                name = f"l{layer}{'_reverse' if direction else ''}"
                place = layer * directions + direction
                h = states[0][place, number] if states else x.new_zeros(size)
                c = states[1][place, number] if states and len(states) > 1 else x.new_zeros(module.hidden_size)
                side: list[Tensor] = []
                for token in x.flip(0) if direction else x:
                    gates = getattr(module, f"weight_ih_{name}") @ token
                    again = getattr(module, f"weight_hh_{name}") @ h
                    if module.bias:
                        gates, again = (
                            gates + getattr(module, f"bias_ih_{name}"),
                            again + getattr(module, f"bias_hh_{name}"),
                        )
                    read.setdefault(f"weight_ih_{name}", []).append(token)
                    read.setdefault(f"weight_hh_{name}", []).append(h)
                    if module.mode == "LSTM":
                        h, c = steps_of("LSTM", gates, again, c)
                        if module.proj_size:
                            read.setdefault(f"weight_hr_{name}", []).append(h)
                            h = getattr(module, f"weight_hr_{name}") @ h
                    elif module.mode == "GRU":
                        new, z = steps_of("GRU", gates, again, c)
                        h = (1 - z) * new + z * h
                    else:
                        h = (gates + again).tanh() if module.mode == "RNN_TANH" else (gates + again).relu()
                    side.append(h)
                sides.append(torch.stack(side[::-1] if direction else side))
            x = torch.cat(sides, 1)
        ends.append(x)
    return {name: torch.stack(tokens) for name, tokens in read.items()} | {"y": torch.cat(ends)}


class Cells(nn.Module):
    """A cell in a loop, as users write it; the first step has no state."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> list[Tensor]:
        state, states = None, []
        for token in x:
            state = self.cell(token, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return states


class Attend(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, **fixed: Any) -> None:
        super().__init__()
        self.attention, self.fixed = attention, fixed

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padded: Tensor | None = None) -> Tensor:
        return self.attention(query, key, value, key_padding_mask=padded, **self.fixed)[0]


def context_of(module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """The textbook's attention of (n, T, .) with `hidden` (n, T, S) True where a key is not seen."""
    E = module.embed_dim
    weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.split(E))
    biases = module.in_proj_bias.split(E) if module.in_proj_bias is not None else [torch.zeros(E).double()] * 3
    heads = [
        (x @ w.T + b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((q, k, v), weights, biases, strict=True)
    ]
    scores = heads[0] @ heads[1].mT / (E // module.num_heads) ** 0.5
    weights_of_keys = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    return (weights_of_keys @ heads[2]).transpose(1, 2).flatten(2)


class Shared(nn.Module):
    """One layer called twice, its weight used by another layer too, and by the embedding that the text comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.twice = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.twice.weight
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.twice(self.words(tokens)))
        return self.head(self.again(torch.tanh(self.twice(x))))
