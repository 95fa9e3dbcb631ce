# SPDX-License-Identifier: Apache-2.0
"""Scores against NumPy on recorded weights and gradients, in a loop of the user's own and at once."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.errors import NumericalError, OptionError
from tests.prune.oracle import lowest_units


def loop(importance: Any, steps: int = 12, **options: Any) -> tuple[nn.Linear, dict[str, list[np.ndarray]]]:
    """Trains with updates at 3, 7 and 11 and records weights before, gradients in, weights after each step."""
    layer = nn.Linear(10, 6, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    options = {"sparsity": 0.6, "begin": 3, "end": 11, "every": 4, "schedule": "linear", "dense": ()} | options
    pruner = fw.GradualPruning(importance=importance, **options).attach(layer, optimizer)
    seen: dict[str, list[np.ndarray]] = {"before": [], "gradient": [], "after": [], "zero": []}
    inputs, targets = torch.randn(steps, 8, 10), torch.randn(steps, 8, 6)
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        seen["before"].append(layer.weight.detach().numpy().copy())
        seen["gradient"].append(layer.weight.grad.numpy().copy())
        optimizer.step()
        seen["after"].append(layer.weight.detach().numpy().copy())
        pruner.step()
        seen["zero"].append(layer.weight.detach().numpy() == 0)
    return layer, seen


@pytest.mark.parametrize(
    ("importance", "score"),
    [("gradient", lambda w, g: abs(w * g)), ("movement", lambda w, g: -w * g)],
)
def test_gradient_scores_sum_over_the_interval(importance: str, score: Any) -> None:
    _, seen = loop(importance)
    for step, since, count in ((7, 4, 18), (11, 8, 36)):  # 30 % and 60 % of 60; the first update asks for 0
        total = sum(score(seen["before"][t], seen["gradient"][t]) for t in range(since, step + 1))
        total[seen["zero"][step - 1]] = -np.inf
        expected = lowest_units(total, [[i] for i in range(60)], count)
        assert np.array_equal(seen["zero"][step], expected)


def test_movement_differs_from_magnitude_and_removes_what_shrinks() -> None:
    _, seen = loop("movement", steps=8)
    shrinking = abs(seen["after"][7]) < abs(seen["before"][4])
    assert shrinking[seen["zero"][7]].mean() > 0.8 > shrinking[~seen["zero"][7]].mean()


@pytest.mark.parametrize("importance", ["magnitude", "group_l2"])
def test_magnitude_ranks_the_weights_after_the_step(importance: str) -> None:
    _, seen = loop(importance)
    expected = lowest_units(abs(seen["after"][11]), [[i] for i in range(60)], 36)
    assert np.array_equal(seen["zero"][11], expected)


@pytest.mark.parametrize("importance", ["random", "movement", lambda name, weight: -weight.abs()])
def test_what_is_zero_stays_zero_under_every_score(importance: Any) -> None:
    """The last score would bring zeros back first: they score highest."""
    _, seen = loop(importance)
    for earlier, later in itertools.pairwise(seen["zero"]):
        assert not (earlier & ~later).any()
    assert [int(zero.sum()) for zero in seen["zero"]][3::4] == [0, 18, 36]


def test_random_depends_on_the_seed_alone() -> None:
    def mask(seed: int, noise: int) -> list[bool]:
        torch.manual_seed(noise)
        layer = nn.Linear(20, 20)
        fw.Prune(0.5, importance="random", seed=seed, dense=())(layer, fw.Task(layer, ()), fw.Stage())
        return (layer.weight == 0).flatten().tolist()

    assert mask(1, 0) == mask(1, 5)
    assert mask(1, 0) != mask(2, 0)
    assert sum(mask(1, 0)) == 200


def test_a_function_of_the_user_ranks() -> None:
    calls = []

    def position(name: str, weight: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        return torch.arange(weight.numel(), 0, -1).view(weight.shape)

    layer = nn.Linear(4, 3)
    fw.Prune(0.5, importance=position, dense=())(layer, fw.Task(layer, ()), fw.Stage())
    assert (layer.weight == 0).flatten().tolist() == [False] * 6 + [True] * 6
    assert calls == ["weight"]


def test_infinity_marks_what_stays() -> None:
    layer = nn.Linear(4, 2)
    guard = torch.zeros(2, 4)
    guard[0] = torch.inf
    fw.Prune(0.5, importance=lambda name, w: guard, dense=())(layer, fw.Task(layer, ()), fw.Stage())
    assert (layer.weight == 0).tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (lambda n, w: w.sum(), OptionError, r"importance gave Tensor\[\] float32 for weight.*Tensor\[2, 4\]"),
        (lambda n, w: None, OptionError, "importance gave NoneType for weight"),
        (lambda n, w: w * torch.nan, NumericalError, r"NaN or minus infinity for weight.*\+inf marks"),
    ],
)
def test_scores_that_cannot_rank_are_refused(scores: Any, error: type[Exception], message: str) -> None:
    layer = nn.Linear(4, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(error, match=message):
        fw.Prune(0.5, importance=scores, dense=())(layer, fw.Task(layer, ()), fw.Stage())
    assert torch.equal(layer.weight, before)


def test_entries_of_a_gradient_that_are_not_finite_count_as_nothing() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 1.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    pruner = fw.GradualPruning(0.4, end=0, importance="gradient", dense=()).attach(layer, optimizer)
    layer.weight.grad = torch.tensor([[0.1, torch.nan, 0.2]])
    optimizer.step()
    layer.weight.data = torch.tensor([[1.0, 1.0, 1.0]])  # 0 * NaN is NaN
    pruner.step()
    assert layer.weight.tolist() == [[1, 0, 1]]


def test_gradient_importance_needs_an_optimizer() -> None:
    with pytest.raises(OptionError, match=r"importance='movement' reads gradients.*attach\(model, optimizer\)"):
        fw.GradualPruning(0.5, importance="movement").attach(nn.Linear(3, 3))


def test_a_layer_without_gradient_cannot_be_ranked_and_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = fw.GradualPruning(0.5, importance="gradient", dense=()).attach(model, optimizer)
    model["used"](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(NumericalError, match=r"idle.weight had no gradient up to step 0.*keep=\['idle.weight'\]"):
        pruner.step()


def test_what_is_not_trained_is_pruned_by_magnitude_and_kept_by_gradient() -> None:
    def model() -> nn.ModuleDict:
        layers = nn.ModuleDict({"free": nn.Linear(4, 4), "frozen": nn.Linear(4, 4), "outside": nn.Linear(4, 4)})
        layers["frozen"].requires_grad_(False)
        return layers

    options: dict[str, Any] = {"sparsity": 0.5, "end": 0, "dense": ()}
    layers = model()
    optimizer = torch.optim.SGD(layers["free"].parameters(), lr=0.1)
    fw.GradualPruning(**options).attach(layers, optimizer).step()
    assert all(int((layer.weight == 0).sum()) == 8 for layer in layers.values())

    layers = model()
    optimizer = torch.optim.SGD(layers["free"].parameters(), lr=0.1)
    pruner = fw.GradualPruning(**options, importance="gradient").attach(layers, optimizer)
    reasons = {line.name: line.reason for line in pruner.selection if line.action == "kept"}
    assert set(reasons) == {"frozen.weight", "outside.weight"}
    assert set(reasons.values()) == {"it is not trained, and importance='gradient' needs its gradient"}
