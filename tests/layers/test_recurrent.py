# SPDX-License-Identifier: Apache-2.0
"""Oracle: the equations in torch's documentation, unrolled sequence by sequence and step by step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from featherweight.layers import problems
from tests.layers.oracles import Cells, assert_same_loss, case, gather, gram, perturbed, unrolled


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Packed(nn.Module):
    """Sequences of different lengths, packed in the order of their lengths inside."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, *given: Any) -> Any:
        *sequences, states = given
        return self.rnn(pack_sequence(sequences, enforce_sorted=False), states)


RECURRENT = [
    case(nn.LSTM, 3, 4),
    case(nn.LSTM, 3, 4, num_layers=2, bidirectional=True, batch_first=True),
    case(nn.LSTM, 3, 4, num_layers=2, bidirectional=True, proj_size=2, bias=False),
    case(nn.LSTM, 3, 4, proj_size=3),
    case(nn.GRU, 3, 4, num_layers=3, dropout=0.5),
    case(nn.GRU, 3, 4, bidirectional=True, batch_first=True),
    case(nn.RNN, 3, 4, num_layers=2, bidirectional=True, nonlinearity="relu"),
    case(nn.RNN, 3, 4, bias=False, batch_first=True),
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
