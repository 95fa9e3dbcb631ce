# SPDX-License-Identifier: Apache-2.0
"""Oracle: a full snapshot of every bit, attribute, identity and hook from before."""

import torch
from torch import nn

from featherweight.edits import replay
from featherweight.edits.undo import remember
from featherweight.plan import Attribute, Factor, FakeQuant, Fold, Slice, Swap, Tie
from tests.edits.snapshot import snapshot
from tests.edits.test_replay import KINDS, Net


def test_every_kind_of_edit_is_taken_back_to_the_last_bit() -> None:
    """Values, shapes, gradients, modules, ties and hooks, in the very same objects."""
    model = Net()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    model.sizes = [4, 2]
    gradients = {id(p): p.grad for p in model.parameters()}
    tied, sizes = model.head.weight, model.sizes
    before = snapshot(model)
    edits = (*KINDS["all five"], Fold("stem", "norm"), Attribute("", "sizes", (3, 2)))
    assert {type(edit) for edit in edits} == {Slice, Factor, Swap, Tie, FakeQuant, Fold, Attribute}
    undo = remember([model])
    replay(model, edits)
    assert snapshot(model) != before
    undo()
    assert snapshot(model) == before
    assert model.head.weight is tied
    assert model.words.weight is tied
    assert model.sizes is sizes
    assert {id(p): p.grad for p in model.parameters()} == gradients
    model(torch.randn(2, 1, 8, 8)).sum().backward()


def test_a_handle_of_a_hook_still_removes_it_afterwards() -> None:
    model, seen = nn.Sequential(nn.Linear(2, 4)), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    undo = remember([model])
    replay(model, (Slice("0.weight", 0, (0, 1)), Slice("0.bias", 0, (0, 1))))
    undo()
    handle.remove()
    model(torch.randn(1, 2))
    assert not seen


def test_an_optimizers_new_and_replaced_state_goes() -> None:
    layer = nn.Linear(2, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    moments = {p: dict(s) for p, s in optimizer.state.items()}
    parameters = list(optimizer.param_groups[0]["params"])
    undo = remember([layer], [optimizer])
    optimizer.state[nn.Parameter(torch.ones(1))] = {"step": torch.tensor(1.0)}
    optimizer.state[layer.weight]["exp_avg"] = torch.zeros(1)
    optimizer.state.pop(layer.bias)
    optimizer.param_groups[0]["params"].pop()
    undo()
    assert {p: {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()} == {
        p: {k: id(v) for k, v in s.items()} for p, s in moments.items()
    }
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
