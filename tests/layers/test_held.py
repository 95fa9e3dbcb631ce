# SPDX-License-Identifier: Apache-2.0
"""Statistics from held inputs, against those of a pass over the data with the weights as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from featherweight.layers import collect, hold, problems, split


class Twice(nn.Module):
    """A layer behind another, called twice, whose input is then changed in place."""

    def __init__(self, layer: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = first, layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.layer(x)
        z = self.layer(2 * x)
        x.relu_()
        return y + z


MODELS = {
    "conv": lambda: Twice(nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(3, 8, 1)),
    "strided": lambda: Twice(nn.Conv2d(8, 6, 3, stride=2, dilation=2), nn.Conv2d(3, 8, 1)),
    "grouped": lambda: Twice(nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(3, 8, 1)),
    "transposed": lambda: Twice(nn.ConvTranspose2d(8, 6, 3, stride=2), nn.Conv2d(3, 8, 1)),
    "linear": lambda: Twice(nn.Linear(10, 6), nn.Identity()),
}


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.clone())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_what_is_held_follows_the_weights(kind: str, share: float) -> None:
    torch.manual_seed(0)
    reference = MODELS[kind]().eval()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    data = [torch.randn(4, 3, 10, 10) for _ in range(2)]
    whole = next(p for p in problems(model)[0] if p.weight.layer == "layer")
    held = hold(model, whole, data, forward, reference=reference, most_bytes=10**9)
    assert held is not None
    blocks = split(whole, max(1, whole.d // 2))
    for step in range(3):
        matrix = blocks[step % len(blocks)].matrix()
        moved = torch.randn_like(matrix) * (torch.rand(matrix.shape[1]) < share)
        blocks[step % len(blocks)].write(matrix + moved)
        found = held.statistics(blocks)
        wanted = collect(model, blocks, data, forward, reference=reference)
        for block in blocks:
            a, b = found[block.name], wanted[block.name]
            assert (a.tokens, a.samples) == (b.tokens, b.samples)
            assert a.T is not None
            assert b.T is not None
            for mine, right in ((a.H, b.H), (a.T, b.T)):
                torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))
            assert a.energy == pytest.approx(b.energy, rel=1e-4)


def test_without_a_reference_it_answers_as_it_did_and_what_was_tried_out_can_be_put_back() -> None:
    torch.manual_seed(0)
    model = MODELS["grouped"]().eval()
    reference = copy.deepcopy(model)
    data = [torch.randn(4, 3, 10, 10) for _ in range(2)]
    whole = problems(model)[0][1]
    held = hold(model, whole, data, forward, reference=None, most_bytes=10**9)
    assert held is not None
    dense = whole.matrix()
    for values in (torch.zeros_like(dense), dense, dense.abs(), dense):
        whole.write(values)
        found = held.statistics([whole])[whole.name]
        wanted = collect(model, [whole], data, forward, reference=reference)[whole.name]
        assert found.T is not None
        torch.testing.assert_close(found.T, wanted.T, rtol=1e-5, atol=1e-5 * float(found.T.abs().max()))
        assert found.energy == pytest.approx(wanted.energy, rel=1e-4)
    exact = held.statistics([whole])[whole.name]
    assert torch.equal(exact.T, dense.double() @ exact.H), "back at the beginning nothing of what was tried is left"


def test_what_would_take_too_much_memory_or_is_never_reached_is_not_held() -> None:
    model = MODELS["conv"]().eval()
    data = [torch.randn(4, 3, 10, 10)]
    whole = problems(model)[0][1]
    assert hold(model, whole, data, forward, reference=model, most_bytes=1000) is None
    assert hold(model, whole, data, lambda model, batch: batch, reference=model, most_bytes=10**9) is None
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    [query, *_] = problems(attention)[0]
    data = [torch.randn(2, 5, 8)]
    assert hold(attention, query, data, lambda m, x: m(x, x, x), reference=attention, most_bytes=10**9) is None
    assert not model.layer._forward_hooks
