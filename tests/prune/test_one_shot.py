# SPDX-License-Identifier: Apache-2.0
"""Pruning at once, and the survey's loop of it; gradients against torch's own, batch by batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import DataError, NothingToCompress, NumericalError, OptionError
from tests.models import MODELS
from tests.prune.oracle import lowest_units


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


PROBE = torch.zeros((), requires_grad=True)  # gives a loss a gradient, though not of the model's weights


def task(model: nn.Module, **options: Any) -> fw.Task:
    return fw.Task(model, (torch.zeros(1, 8),), **options)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 10), nn.Dropout(0.5), nn.ReLU(), nn.Linear(10, 4))


def data(batches: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 8), torch.randint(0, 4, (6,))) for _ in range(batches)]


def loss(out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(out, batch[1])


def test_a_share_of_what_remains_goes_each_time() -> None:
    model = mlp()
    counts = []
    for _ in range(4):
        fw.Prune(0.2, of="remaining")(model, task(model), fw.Stage())
        counts.append(80 - zeros(model[0].weight))
    assert counts == [64, 51, 41, 33]  # 0.8 of what was there, each time rounded
    fw.Prune(0.5)(model, task(model), fw.Stage())
    assert 80 - zeros(model[0].weight) == 33  # half of all is gone long since
    fw.Prune(0.7)(model, task(model), fw.Stage())
    assert 80 - zeros(model[0].weight) == 24


def test_a_share_of_what_remains_in_all_layers_together() -> None:
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 4))
    model[0].weight.data[:4] = 0  # 32 of 120
    fw.Prune(0.5, of="remaining", ranking="global", dense=())(model, task(model), fw.Stage())
    assert zeros(model[0].weight) + zeros(model[1].weight) == 32 + 44


@pytest.mark.parametrize(
    ("importance", "score"), [("gradient", lambda w, g: abs(w * g)), ("movement", lambda w, g: -w * g)]
)
@pytest.mark.parametrize("name", ["calibration", "train"])
def test_gradients_are_those_of_the_first_batches_without_dropout(importance: str, score: Any, name: str) -> None:
    model, batches = mlp(), data()
    weight, w = model[0].weight, model[0].weight.detach().double().numpy()
    model.eval()
    total = np.zeros(w.shape)
    for batch in batches[:3]:
        [gradient] = torch.autograd.grad(loss(model(batch[0]), batch), [weight])
        total += score(w, gradient.double().numpy())
    expected = lowest_units(total, [[i] for i in range(80)], 40)
    model.train()
    fw.Prune(0.5, importance=importance, batches=3)(model, task(model, loss=loss, **{name: batches}), fw.Stage())
    assert np.array_equal((weight == 0).numpy(), expected)
    assert model.training and all(module.training for module in model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_chosen_is_reported_as_facts() -> None:
    events: list[dict[str, Any]] = []
    model = mlp()
    fw.Prune(0.5)(model, task(model), fw.Stage(report=events.append))
    assert [event["kind"] for event in events] == ["selection", "selection", "pruned"]
    lines = [(event["weight"]["name"], event["weight"]["action"]) for event in events[:2]]
    assert lines == [("0.weight", "pruned"), ("3.weight", "kept")]
    assert events[-1]["sparsity"] == 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_is_pruned_by_gradient(kind: str) -> None:
    make, inputs = MODELS[kind]
    model = make()
    batches = [(*inputs(3), torch.zeros(())) for _ in range(2)]
    bring = fw.Task(model, inputs(2), calibration=batches, loss=lambda out, batch: out.square().mean())
    fw.Prune(0.5, importance="gradient", dense=())(model, bring, fw.Stage())
    lines = fw.Prune(0.5, dense=()).select(model, inputs(2))
    tensors = dict(model.named_parameters())
    for line in lines:
        if line.action == "pruned":
            assert zeros(tensors[line.name]) == round(line.parameters / 2), line.name
    assert torch.isfinite(model(*inputs(2))).all()


@pytest.mark.parametrize(
    ("options", "bring", "error", "message"),
    [
        ({"importance": "gradient"}, {}, OptionError, r"Prune: importance='gradient' needs gradients.*Task\(loss=..."),
        ({"importance": "gradient"}, {"loss": loss}, OptionError, "needs gradients of the loss on data"),
        ({"importance": "gradient"}, {"loss": loss, "train": []}, DataError, r"Task.train is empty"),
        (
            {"importance": "movement"},
            {"loss": lambda out, batch: out.sum() * torch.nan, "train": data(1)},
            NumericalError,
            "The loss of batch 0 of the data is nan; nothing was pruned",
        ),
        (
            {"importance": "gradient", "dense": ()},
            {"loss": lambda out, batch: batch[0].sum() + out.detach().sum() + PROBE, "train": data(1)},
            NumericalError,
            r"The loss does not depend on 0.weight, 3.weight.*keep=\['0.weight', '3.weight'\]",
        ),
        ({"keep": ["0"]}, {}, NothingToCompress, "0.weight: keep='0' names it; 3.weight: output layer"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    options: dict[str, Any], bring: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = mlp()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        fw.Prune(0.5, **options)(model, task(model, **bring), fw.Stage())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training


def test_weights_that_are_not_finite_are_named() -> None:
    model = mlp()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"0.weight has 1 of 80 values that are NaN or infinite before pruning"):
        fw.Prune(0.5)(model, task(model), fw.Stage())
