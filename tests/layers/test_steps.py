# SPDX-License-Identifier: Apache-2.0
"""What is solved together, in which order, and in how many passes over the data."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import OptionError
from featherweight.layers import bytes_of, call_steps, passes, problems
from featherweight.task import default_forward
from tests.layers.oracles import Attend, Cells, Shared, front_and, gather, gram, perturbed


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Projections(nn.Module):
    """Query, key and value as layers; the third reads a changed tensor."""

    def __init__(self, parting: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)
        self.parting, self.forwards = parting, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = torch.tanh(x)
        q, k = self.q(x), self.k(x.clone() if self.parting and self.forwards == 3 else x)
        return q, k, self.v(x.mul_(2))


@pytest.mark.parametrize("reference", [False, True])
def test_layers_that_read_the_very_same_tensor_share_one_hessian(reference: bool) -> None:
    model = Projections(parting=False).double()
    other = perturbed(model) if reference else None
    batches = list(torch.randn(3, 5, 4, dtype=torch.float64))
    found = gather(model, batches, reference=other)
    assert found["q.weight"].H is found["k.weight"].H
    X = torch.tanh(torch.cat(batches))
    torch.testing.assert_close(found["k.weight"].H, gram(X))
    torch.testing.assert_close(found["v.weight"].H, gram(2 * X))
    if reference:
        torch.testing.assert_close(found["k.weight"].T, other.k.weight.detach() @ gram(X))
    steps = call_steps(model, problems(model)[0], default_forward, batches[0])
    assert [[problem.name for problem in step] for step in steps] == [["q.weight", "k.weight"], ["v.weight"]]


def test_layers_whose_inputs_part_later_have_sums_of_their_own() -> None:
    model = Projections(parting=True).double()
    batches = list(torch.randn(4, 5, 4, dtype=torch.float64))
    found = gather(model, batches)
    assert model.forwards > 4  # begun again
    assert found["q.weight"].H is not found["k.weight"].H
    for name in ("q.weight", "k.weight"):
        torch.testing.assert_close(found[name].H, gram(torch.tanh(torch.cat(batches))))
        assert (found[name].tokens, found[name].samples) == (20, 20)


def test_layers_that_read_the_same_tensors_unequally_often_do_not_share() -> None:
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> None:
            y = torch.tanh(x)
            self.q(x), self.q(x), self.q(y), self.k(x), self.k(y), self.k(y)

    x = torch.randn(5, 4, dtype=torch.float64)
    found = gather(Unequal().double(), [x])
    torch.testing.assert_close(found["q.weight"].H, gram(torch.cat([x, x, x.tanh()])))
    torch.testing.assert_close(found["k.weight"].H, gram(torch.cat([x, x.tanh(), x.tanh()])))


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (
            nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2).double(),
            torch.randn(5, 2, 3, dtype=torch.float64),
            [
                ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
                ["weight_hr_l0", "weight_hr_l0_reverse"],
                ["weight_ih_l1", "weight_hh_l1", "weight_ih_l1_reverse", "weight_hh_l1_reverse"],
                ["weight_hr_l1", "weight_hr_l1_reverse"],
            ],
        ),
        (Cells(nn.GRUCell(3, 4)), torch.randn(5, 2, 3), [["cell.weight_ih", "cell.weight_hh"]]),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            torch.randn(2, 3, 8),
            [
                [f"self_attn.in_proj_weight[{i}]" for i in range(3)],
                ["self_attn.out_proj.weight"],
                ["linear1.weight"],
                ["linear2.weight"],
            ],
        ),
        (
            Attend(nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)),
            (torch.randn(2, 5, 4), torch.randn(2, 6, 3), torch.randn(2, 6, 3), None, "target"),
            [[f"attention.{letter}_proj_weight" for letter in "qkv"], ["attention.out_proj.weight"]],
        ),
        (Shared(), torch.randint(0, 5, (2, 3)), [["twice.weight"], ["words.weight"]]),
    ],
    ids=["LSTM", "cell", "transformer", "cross attention", "shared"],
)
def test_steps_go_in_the_order_of_calls(model: nn.Module, batch: Any, expected: list[list[str]]) -> None:
    steps = call_steps(model, problems(model)[0], default_forward, batch)
    assert [[problem.name for problem in step] for step in steps] == expected


def test_a_shortcut_that_reads_the_block_s_input_is_in_its_first_step() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = nn.Conv2d(2, 4, 1)
            self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(x)
            return self.b(torch.relu(self.a(x))) + self.shortcut(x)

    model = Block()
    steps = call_steps(model, problems(model)[0], default_forward, torch.randn(1, 2, 4, 4))
    assert [[problem.name for problem in step] for step in steps] == [["a.weight", "shortcut.weight"], ["b.weight"]]


def test_passes_keep_within_the_budget_and_the_order() -> None:
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 30), nn.Linear(30, 5), nn.Linear(5, 5), nn.Embedding(6, 3))
    found, _ = problems(model)
    assert [bytes_of(problem, False) for problem in found] == [800, 128, 7200, 200, 72 + 48]
    assert [bytes_of(problem, True) for problem in found] == [1120, 1088, 8400, 400, 120]
    names = [[problem.name for problem in each] for each in passes(found, 2208, True)]
    assert names == [["0.weight", "1.weight"], ["2.weight"], ["3.weight", "4.weight"]]
    assert [len(each) for each in passes(found, 1 << 30, True)] == [5]
    assert [len(each) for each in passes(found, 1, True)] == [1] * 5
    with pytest.raises(OptionError, match="positive"):
        passes(found, 0, True)


def test_passes_and_any_order_give_what_one_pass_does() -> None:
    model, batches = front_and(nn.Conv2d(4, 6, 3, groups=2))
    reference = perturbed(model)
    found, _ = problems(model)
    whole = gather(model, batches, reference=reference)
    parts = [gather(model, batches, reference=reference, only=each) for each in passes(found, 1, True)]
    assert len(parts) == 3
    parts.append(gather(model, batches, reference=reference, only=found[::-1]))
    for part in parts:
        for name, one in part.items():
            torch.testing.assert_close(one.H, whole[name].H)
            torch.testing.assert_close(one.T, whole[name].T)
            assert one.energy == pytest.approx(whole[name].energy)
