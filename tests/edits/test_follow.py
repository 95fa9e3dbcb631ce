# SPDX-License-Identifier: Apache-2.0
"""What goes along with a cut. Oracle: an optimizer in which the cut channels never were.

Channels whose every weight is zero get no gradient through a ReLU from either side, so the other channels train as if
they were alone: training the whole model and then cutting, and cutting first, must come to the same weights.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from featherweight.edits import cut
from featherweight.errors import EditError, OptionError
from featherweight.graph import trace
from tests.edits.snapshot import snapshot

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[[1, 4]] = 0
        model[2].weight[:, [1, 4]] = 0
    return model.double()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_if_the_cut_channels_had_never_been(kind: str) -> None:
    x = (torch.randn(8, 4, dtype=torch.float64),)
    models = [net(), net()]
    optimizers = [OPTIMIZERS[kind](model.parameters()) for model in models]
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        if i == 0:
            steps(model, optimizer, 3, seed=1)
        found = trace(model, x)
        cut(model, [found["0"][1], found["0"][4]], trace=found, inputs=x, follow=[optimizer])
        if i == 1:
            steps(model, optimizer, 3, seed=1)
        steps(model, optimizer, 3, seed=2)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for group in optimizers[0].param_groups:
        assert [id(p) for p in group["params"]] == [id(p) for p in models[0].parameters()]


def test_without_follow_a_stale_moment_is_refused_by_torch() -> None:
    """Why `follow` is there."""
    model, x = net(), (torch.randn(8, 4, dtype=torch.float64),)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    steps(model, optimizer, 1, seed=1)
    found = trace(model, x)
    cut(model, found["0"][:2], trace=found, inputs=x)
    with pytest.raises(RuntimeError):
        steps(model, optimizer, 1, seed=2)


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw, foreach", "adamw, fused"])
def test_a_swap_hands_its_moments_on_in_thirds(kind: str) -> None:
    """Each new parameter stands where the fused one stood, in the same group, with a step count of its own."""
    model, x = Attended(), (torch.randn(2, 6, 5),)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "attention" not in n]},
        {"params": list(model.attention.parameters()), "weight_decay": 0.01},
    ]
    optimizer = OPTIMIZERS[kind](groups)
    model(*x).square().sum().backward()
    optimizer.step()
    fused = model.attention.in_proj_weight
    old = {key: value.clone() for key, value in optimizer.state[fused].items() if value is not None}
    found = trace(model, x)
    group = next(group for group in found.groups if group.kind == "heads")
    cut(model, [group[0], group[2]], trace=found, inputs=x, follow=[optimizer])
    assert fused not in optimizer.state
    inside = optimizer.param_groups[1]["params"]
    assert {id(p) for p in inside} == {id(p) for p in model.attention.parameters()}
    rows = [2, 3, 6, 7]
    for i, part in enumerate("qkv"):
        state = optimizer.state[getattr(model.attention, part).weight]
        for key, value in old.items():
            expected = value if value.ndim == 0 else value.chunk(3)[i][rows]
            assert torch.equal(state[key], expected)
    model(*x).square().sum().backward()
    optimizer.step()
    steps_taken = {float(s["step"]) for s in optimizer.state.values() if "step" in s}
    assert steps_taken <= {2.0}


def test_averaged_copies_get_the_same_edits_and_keep_their_own_values() -> None:
    model, x = Attended(), (torch.randn(2, 6, 5),)
    averaged, plain = AveragedModel(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*averaged.parameters(), *plain.parameters()):
            parameter.add_(1.0)
    old = plain.enter.weight.detach().clone()
    found = trace(model, x)
    group = next(group for group in found.groups if group.kind == "heads")
    wide = next(group for group in found.groups if group.name == "enter")
    cut(model, [*group[:1], *wide[:2]], trace=found, inputs=x, follow=[averaged, plain])
    for copied in (averaged.module, plain):
        assert [p.shape for p in copied.parameters()] == [p.shape for p in model.parameters()]
        assert torch.equal(copied.enter.weight, old[2:])
        copied(*x)
    averaged.update_parameters(model)


def test_a_state_that_cannot_be_cut_stops_the_cut_and_everything_is_as_it_was() -> None:
    model, x = net(), (torch.randn(8, 4, dtype=torch.float64),)
    adam = OPTIMIZERS["adam"](model.parameters())
    steps(model, adam, 2, seed=1)
    odd = torch.optim.Adafactor(model.parameters())
    steps(model, odd, 1, seed=1)
    ema = copy.deepcopy(model)
    states = copy.deepcopy(adam.state_dict()), copy.deepcopy(odd.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    found = trace(model, x)
    before = snapshot(model), snapshot(ema)
    with pytest.raises(EditError, match=r"Adafactor keeps '.*' of it in a form that cannot be cut"):
        cut(model, found["0"][:2], trace=found, inputs=x, follow=[adam, ema, odd])
    assert (snapshot(model), snapshot(ema)) == before
    for optimizer, state in zip((adam, odd), states, strict=True):
        now = optimizer.state_dict()
        assert now["param_groups"] == state["param_groups"]
        for index, entries in state["state"].items():
            assert all(
                torch.equal(torch.as_tensor(now["state"][index][k]), torch.as_tensor(v)) for k, v in entries.items()
            )
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is None or torch.equal(parameter.grad, gradient)
    steps(model, adam, 1, seed=2)


def test_a_copy_of_other_tensors_is_refused() -> None:
    model, x = net(), (torch.randn(8, 4, dtype=torch.float64),)
    found = trace(model, x)
    with pytest.raises(OptionError, match="a ReLU is neither an optimizer nor a copy of the model"):
        cut(model, found["0"][:2], trace=found, inputs=x, follow=[nn.ReLU()])
