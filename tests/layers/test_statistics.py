# SPDX-License-Identifier: Apache-2.0
"""Oracle: the layers themselves. The loss that H, T and energy stand for is computed by running the real module with other
weights and no bias, and compared with them in value, gradient and Hessian-vector product by autograd. Where a module hides
what a weight reads (recurrent layers, attention), the textbook's equations say it."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_sequence
from transformers.pytorch_utils import Conv1D

from featherweight.errors import DataError, NumericalError, OptionError
from featherweight.layers import Problem, Statistics, bytes_of, call_steps, collect, passes, problems, split, to_matrix
from featherweight.layers.weights import from_matrix
from featherweight.task import default_forward


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


def assert_same_loss(loss: Callable[[Tensor], Tensor], found: Statistics, V: Tensor, constant: float | None = None) -> None:
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


def conv(kind: type[nn.Module], *args: Any, **options: Any) -> Any:
    label = " ".join([kind.__name__, *map(str, args), *(f"{key}={value}" for key, value in options.items())])
    return pytest.param(lambda: kind(*args, **options), id=label)


LAYERS = [
    conv(nn.Linear, 4, 3),
    conv(nn.Linear, 4, 3, bias=False),
    conv(Conv1D, 3, 4),
    conv(nn.Conv1d, 4, 6, 3),
    conv(nn.Conv1d, 4, 6, 3, stride=2, padding=2, dilation=2),
    conv(nn.Conv1d, 4, 6, 3, padding="same", dilation=3, bias=False),
    conv(nn.Conv1d, 4, 6, 3, padding="valid"),
    conv(nn.Conv1d, 4, 8, 3, groups=4, padding=1, padding_mode="circular"),
    conv(nn.Conv2d, 4, 6, 1),
    conv(nn.Conv2d, 4, 6, 3, padding=1),
    conv(nn.Conv2d, 4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    conv(nn.Conv2d, 4, 6, (4, 3), padding="same", dilation=(2, 2)),
    conv(nn.Conv2d, 4, 6, 3, padding="same", padding_mode="reflect"),
    conv(nn.Conv2d, 4, 6, (2, 4), padding="same", padding_mode="circular"),
    conv(nn.Conv2d, 4, 6, 3, padding=(2, 1), padding_mode="replicate", stride=2),
    conv(nn.Conv2d, 4, 6, 3, groups=2, padding=1),
    conv(nn.Conv2d, 4, 4, 3, groups=4, stride=2),
    conv(nn.Conv2d, 4, 8, (1, 3), groups=4),
    conv(nn.Conv3d, 4, 2, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1)),
    conv(nn.Conv3d, 4, 4, 2, groups=2, padding="same", padding_mode="circular"),
    conv(nn.ConvTranspose1d, 4, 6, 3),
    conv(nn.ConvTranspose1d, 4, 6, 4, stride=3, padding=2, output_padding=2, dilation=2),
    conv(nn.ConvTranspose2d, 4, 6, 2, stride=2),
    conv(nn.ConvTranspose2d, 4, 6, (3, 2), stride=(2, 3), padding=(2, 1), output_padding=(1, 0), bias=False),
    conv(nn.ConvTranspose2d, 4, 6, 3, groups=2, padding=2),
    conv(nn.ConvTranspose2d, 4, 4, 3, groups=4, stride=2, output_padding=1),
    conv(nn.ConvTranspose3d, 4, 2, 2, stride=2, dilation=(1, 2, 1)),
]


def front_and(layer: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """A network in which the layer reads what another layer made, and two batches for it."""
    axes = len(getattr(layer, "kernel_size", ()))
    if axes == 0:
        front, batches = nn.Linear(4, 4), images(5, 4)
    else:
        front = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 4, 1)
        batches = images(4, *(7, 6, 5)[:axes])
    return nn.Sequential(front, nn.Tanh(), layer).double(), batches


@pytest.mark.parametrize("make", LAYERS)
def test_statistics_are_the_loss_of_the_real_module(make: Callable[[], nn.Module]) -> None:
    model, batches = front_and(make())
    reference = perturbed(model)
    found = gather(model, batches, reference=reference)
    here, there = arguments(model, model[2], batches), arguments(reference, reference[2], batches)
    own = [problem for problem in problems(model)[0] if problem.weight.layer == "2"]
    assert len(own) == getattr(model[2], "groups", 1)
    for problem in own:
        one = found[problem.name]
        assert one.samples == 5 and one.unpaired == 0 and one.scale is None
        loss = loss_of(problem, model[2], reference[2], here, there)
        assert_same_loss(loss, one, torch.randn(problem.height, problem.d, dtype=torch.float64))
        assert one.tokens == sum(len(answers(model[2], model[2].weight, x)) for x in here)


@pytest.mark.parametrize("make", LAYERS)
def test_a_block_answers_to_what_the_other_channels_leave(make: Callable[[], nn.Module]) -> None:
    model, batches = front_and(make())
    reference = perturbed(model)
    here, there = arguments(model, model[2], batches), arguments(reference, reference[2], batches)
    own = [problem for problem in problems(model)[0] if problem.weight.layer == "2"]
    blocks = [block for problem in own for block in split(problem, max(1, problem.d * 2 // 3))]
    found = gather(model, batches, reference=reference, only=blocks)
    alone = gather(model, batches, only=blocks)
    for block in blocks:
        loss = loss_of(block, model[2], reference[2], here, there)
        assert_same_loss(loss, found[block.name], torch.randn(block.height, block.d, dtype=torch.float64))
        assert alone[block.name].T is None and alone[block.name].energy == 0
        torch.testing.assert_close(alone[block.name].H, found[block.name].H, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose1d(4, 2, 3, stride=2)])
def test_inputs_without_a_batch_axis_are_one_sample_wide(layer: nn.Module) -> None:
    layer = layer.double()
    [problem], _ = problems(layer)
    x = torch.randn(4, *(6, 5)[: len(layer.kernel_size)], dtype=torch.float64)
    found, with_batch = gather(layer, [x])["weight"], gather(layer, [x[None]])["weight"]
    assert torch.equal(found.H, with_batch.H)
    assert found.tokens == with_batch.tokens


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
                        gates, again = gates + getattr(module, f"bias_ih_{name}"), again + getattr(module, f"bias_hh_{name}")
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


class Packed(nn.Module):
    """Sequences of different lengths, packed in the order of their lengths inside."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, *given: Any) -> Any:
        *sequences, states = given
        return self.rnn(pack_sequence(sequences, enforce_sorted=False), states)


RECURRENT = [
    conv(nn.LSTM, 3, 4),
    conv(nn.LSTM, 3, 4, num_layers=2, bidirectional=True, batch_first=True),
    conv(nn.LSTM, 3, 4, num_layers=2, bidirectional=True, proj_size=2, bias=False),
    conv(nn.LSTM, 3, 4, proj_size=3),
    conv(nn.GRU, 3, 4, num_layers=3, dropout=0.5),
    conv(nn.GRU, 3, 4, bidirectional=True, batch_first=True),
    conv(nn.RNN, 3, 4, num_layers=2, bidirectional=True, nonlinearity="relu"),
    conv(nn.RNN, 3, 4, bias=False, batch_first=True),
]


def initial(module: nn.RNNBase, n: int) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    hidden = torch.randn(count, n, module.proj_size or module.hidden_size, dtype=torch.float64)
    if not isinstance(module, nn.LSTM):
        return hidden
    return hidden, torch.randn(count, n, module.hidden_size, dtype=torch.float64)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("make", RECURRENT)
def test_recurrent_weights_read_the_input_and_the_former_states(make: Callable[[], nn.RNNBase], stateful: bool) -> None:
    module = make().double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)  # (n, T, features)
    states = initial(module, 2) if stateful else None
    there = states if states is None or isinstance(states, tuple) else (states,)
    oracle = unrolled(module, list(x), there)
    given = x if module.batch_first else x.transpose(0, 1)
    y = module.eval()(given, states)[0]
    torch.testing.assert_close((y if module.batch_first else y.transpose(0, 1)).flatten(0, 1), oracle.pop("y"))
    module.train()
    found = gather(module, [(given, states, "target")])
    assert sorted(found) == sorted(oracle)
    for name, X in oracle.items():
        torch.testing.assert_close(found[name].H, gram(X.detach()))
        assert found[name].tokens == 10


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("make", RECURRENT)
def test_packed_sequences_count_their_own_steps_alone(make: Callable[[], nn.RNNBase], stateful: bool) -> None:
    module = make().double()
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 5, 1, 3)]
    states = initial(module, 4) if stateful else None
    there = states if states is None or isinstance(states, tuple) else (states,)
    oracle = unrolled(module, sequences, there)
    del oracle["y"]
    found = gather(Packed(module), [(*sequences, states, "target")])
    assert sorted(found) == sorted(f"rnn.{name}" for name in oracle)
    for name, X in oracle.items():
        torch.testing.assert_close(found[f"rnn.{name}"].H, gram(X.detach()))
        assert found[f"rnn.{name}"].tokens == 11


def test_one_sequence_without_a_batch_axis() -> None:
    module = nn.GRU(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    oracle = unrolled(module, [x], None)
    found = gather(module, [x])
    for name in ("weight_ih_l0", "weight_hh_l0"):
        torch.testing.assert_close(found[name].H, gram(oracle[name].detach()))


def test_recurrent_targets_are_the_reference_s_gates() -> None:
    """T and energy of a second layer: what the reference's weights make of the reference's own input and states."""
    model = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2).double()
    reference = perturbed(model)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    found = gather(model, [x], reference=reference)
    here, there = (unrolled(one, list(x.transpose(0, 1)), None) for one in (model, reference))
    for problem in problems(model)[0]:
        X, Y = here[problem.name].detach().T, (reference.get_parameter(problem.name) @ there[problem.name].T).detach()
        one = found[problem.name]
        assert_same_loss(
            lambda V, X=X, Y=Y: (Y - V @ X).square().sum() / X.shape[1], one, torch.randn(len(Y), len(X)).double()
        )


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


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 3)])
def test_cells_read_token_and_state_at_every_call(kind: type[nn.RNNCellBase], shape: tuple[int, ...]) -> None:
    model = Cells(kind(3, 4)).double()
    reference = perturbed(model)
    x = torch.randn(*shape, dtype=torch.float64)
    states = [[torch.zeros(*shape[1:-1], 4, dtype=torch.float64), *one(x)[:-1]] for one in (model, reference)]
    hidden, theirs = (torch.cat([state.reshape(-1, 4) for state in one]).detach() for one in states)
    found = gather(model, [x], reference=reference)
    torch.testing.assert_close(found["cell.weight_ih"].H, gram(x.reshape(-1, 3)))
    torch.testing.assert_close(found["cell.weight_hh"].H, gram(hidden))
    Y = theirs @ reference.cell.weight_hh.detach().T
    torch.testing.assert_close(found["cell.weight_hh"].T, 2 * Y.T @ hidden / len(hidden))


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


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}], ids=str)
def test_attention_s_projections_and_context(batch_first: bool, need_weights: bool, options: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, dropout=0.5, **options).double()
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    model = Attend(module, attn_mask=causal, need_weights=need_weights)
    q = torch.randn(3, 4, 8, dtype=torch.float64)
    k, v = torch.randn(3, 4, module.kdim, dtype=torch.float64), torch.randn(3, 4, module.vdim, dtype=torch.float64)
    padded = torch.tensor([[False] * 4, [False, False, False, True], [False, False, True, True]])
    given = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    context = context_of(module, q, k, v, causal | padded[:, None]).detach()
    expected = module.out_proj(context).detach()
    out = model.eval()(*given, padded)
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected)
    found = gather(model.train(), [(*given, padded, "target")])
    inputs = {"attention.out_proj.weight": context}
    if module.in_proj_weight is not None:
        inputs |= {f"attention.in_proj_weight[{i}]": x for i, x in enumerate((q, k, v))}
    else:
        inputs |= {f"attention.{letter}_proj_weight": x for letter, x in zip("qkv", (q, k, v), strict=True)}
    assert sorted(found) == sorted(inputs)
    for name, X in inputs.items():
        torch.testing.assert_close(found[name].H, gram(X.flatten(0, 1)))


def test_self_attention_shares_one_hessian_and_targets_go_to_their_rows() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    reference = perturbed(model)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = gather(model, [x], reference=reference)
    parts = [found[f"self_attn.in_proj_weight[{part}]"] for part in range(3)]
    assert parts[0].H is parts[1].H is parts[2].H
    X = x.flatten(0, 1)
    Y = X @ reference.self_attn.in_proj_weight.detach().T
    for part, one in enumerate(parts):
        rows = slice(part * 8, part * 8 + 8)
        torch.testing.assert_close(one.T, 2 * Y[:, rows].T @ X / len(X))
        assert one.energy == pytest.approx(2 * float(Y[:, rows].square().sum()) / len(X))
    assert {"linear1.weight", "linear2.weight"} < set(found)  # the fast path would have skipped their hooks
