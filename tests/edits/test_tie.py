# SPDX-License-Identifier: Apache-2.0
"""A tied parameter is one parameter under every name, also where a module keeps references of its own."""

import re

import pytest
import torch
from torch import nn

from featherweight.edits import apply
from featherweight.errors import EditError
from featherweight.plan import Tie
from tests.edits.snapshot import snapshot


def test_all_names_become_the_first_ones_parameter() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "other": nn.Linear(3, 5)})
    first, values = model["words"].weight, model["words"].weight.detach().clone()
    apply(model, Tie(("words.weight", "head.weight", "other.weight")))
    assert model["head"].weight is model["other"].weight is model["words"].weight is first
    assert torch.equal(first, values)
    assert len(list(model.parameters())) == 3
    x = torch.randn(2, 3)
    assert torch.equal(model["head"](x), x @ values.T + model["head"].bias)


def test_ties_that_were_there_stay() -> None:
    """b is c already; tying a to b must carry c along."""
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    model["c"].weight = model["b"].weight
    apply(model, Tie(("a.weight", "b.weight")))
    assert model["a"].weight is model["b"].weight is model["c"].weight
    before = snapshot(model)
    apply(model, Tie(("c.weight", "a.weight")))
    assert snapshot(model) == before


def test_recurrent_layers_compute_with_the_tied_weight() -> None:
    """An LSTM keeps a list of its weights besides its parameters. Oracle: an LSTM loaded with the tied values."""
    model = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.LSTM(4, 4)})
    apply(model, Tie(("a.weight_ih_l0", "b.weight_ih_l0")))
    alone = nn.LSTM(4, 4)
    alone.load_state_dict(model["b"].state_dict())
    x = torch.randn(3, 2, 4)
    assert torch.equal(model["b"](x)[0], alone(x)[0])
    model["b"](x)[0].sum().backward()
    assert model["a"].weight_ih_l0.grad.any()


def test_gradients_of_all_uses_add_up() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    weight = model[0].weight.detach().clone().requires_grad_()
    x = torch.randn(2, 3)
    (x @ weight.T @ weight.T).sum().backward()
    apply(model, Tie(("0.weight", "1.weight")))
    model(x).sum().backward()
    assert torch.allclose(model[1].weight.grad, weight.grad, rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "two or more different names; got none"),
        (("0.weight",), "two or more different names; got 0.weight"),
        (("0.weight", "0.weight"), "two or more different names"),
        (("0.weight", "1.wieght"), "no tensor '1.wieght'"),
        (("0.weight", "2.weight"), "2.weight is (3,) torch.float32 on cpu, but 0.weight is (3, 3)"),
        (("0.weight", "3.weight"), "3.weight is (3, 3) torch.float64"),
        (("2.running_mean", "2.running_var"), "2.running_mean is a buffer"),
        (("0.weight", "4.weight"), "lazy module"),
    ],
    ids=str,
)
def test_a_tie_that_does_not_fit_changes_nothing(names: tuple[str, ...], message: str) -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, dtype=torch.float64), nn.LazyLinear(3)
    )
    before = snapshot(model)
    with pytest.raises(EditError, match=re.escape(message)):
        apply(model, Tie(names))
    assert snapshot(model) == before
