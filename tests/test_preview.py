# SPDX-License-Identifier: Apache-2.0
"""The dry run tells what a run then does, and changes nothing; its estimates follow the formulas that it states."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import featherweight as fw
from featherweight.errors import DataError, NothingToCompress
from featherweight.preview import inspect, preview
from featherweight.recipe import Recipe

ROWS, BATCHES = 32, 5


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 2))


def make_task(
    model: nn.Module | None = None, slow: float = 0.0, calls: list[int] | None = None, **options: Any
) -> fw.Task:
    batch = (torch.randn(ROWS, 16), torch.randint(0, 2, (ROWS,)))

    def loss(out: torch.Tensor, batch: Any) -> torch.Tensor:
        time.sleep(slow)
        if calls is not None:
            calls.append(1)
        return cross_entropy(out, batch[1])

    return fw.Task(model or make_model(), (batch[0],), train=[batch] * BATCHES, loss=loss, **options)


class Conv(nn.Module):
    """A convolution, a norm, two names for one linear layer, and a functional op."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.again = self.fc
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.again(self.fc(x)))


def test_inspect_counts_as_the_tensors_do() -> None:
    model = Conv()
    with torch.no_grad():
        model.fc.weight[:3] = 0
    told = inspect(model, (torch.randn(2, 3, 6, 6),))
    rows = {layer["name"]: layer for layer in told["layers"]}
    assert set(rows) == {"conv", "norm", "fc", "head"}
    for name, row in rows.items():
        module = model.get_submodule(name)
        state = list(module.state_dict().values())
        assert row["parameters"] == sum(p.numel() for p in module.parameters())
        assert row["zeros"] == sum(int((p == 0).sum()) for p in module.parameters())
        assert row["bytes"] == sum(t.numel() * t.element_size() for t in state)
    assert rows["conv"]["macs"] == 2 * 8 * 27 * 16
    assert rows["fc"]["macs"] == 2 * 2 * 64  # it runs twice
    assert told["macs"] == sum(row["macs"] for row in rows.values())
    assert [rows[name]["action"] for name in rows] == ["kept", "kept", "pruned", "kept"]
    assert rows["conv"]["reason"].startswith("first layer")
    assert rows["norm"]["reason"].startswith("no weight")


def test_inspect_without_inputs_runs_nothing_and_counts_the_same() -> None:
    model = Conv()
    with_inputs = inspect(model, (torch.randn(2, 3, 6, 6),))
    model.forward = None  # type: ignore[assignment]
    without = inspect(model)
    assert without["macs"] is None
    for key in ("parameters", "nonzeros", "dense_bytes", "pruned", "of"):
        assert without[key] == with_inputs[key]
    for one, other in zip(without["layers"], with_inputs["layers"], strict=True):
        assert {**one, "macs": None, "reason": ""} == {**other, "macs": None, "reason": ""}


def test_what_it_says_matches_is_what_a_run_prunes() -> None:
    task = make_task()
    hook = fw.GradualPruning(sparsity=0.5, end=3, every=1, keep=["2"])
    recipe = Recipe((fw.Train(steps=5, hooks=[hook]),))
    [match] = preview(task, recipe, seconds=0.0)["stages"][0]["matches"]
    result = fw.compress(task, recipe)
    zeros = {name: int((p == 0).sum()) for name, p in result.model.named_parameters()}
    for line in match["selection"]:
        assert zeros[line["name"]] == round(line["sparsity"] * line["parameters"])
        assert (line["action"] == "pruned") == (zeros[line["name"]] > 0)
    assert (match["pruned"], match["of"]) == (1, 3)


def test_it_changes_nothing() -> None:
    task = make_task(evaluate=lambda answer: float(torch.rand(())))
    before, mode = copy.deepcopy(task.model.state_dict()), task.model.training
    state = torch.get_rng_state()
    preview(task, Recipe((fw.Train(steps=5, lr=1.0), fw.Prune(sparsity=0.5))), seconds=0.0)
    inspect(task.model, task.example_inputs)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training == mode
    assert all(p.grad is None for p in task.model.parameters())


def test_time_is_that_of_real_steps_times_their_number() -> None:
    looks: list[int] = []

    def evaluate(answer: Any) -> float:
        looks.append(1)
        time.sleep(0.05)
        return 0.0

    task = make_task(slow=0.02, evaluate=evaluate)
    step = (fw.Prune(sparsity=0.2, of="remaining"), fw.Train(epochs=2))
    stages = (fw.Train(steps=300, evaluate_every=100), fw.Iterative(step=step, until={"sparsity": 0.5}, rounds=4))
    told = preview(task, Recipe(stages), seconds=0.1)
    first, second = (stage["training"][0] for stage in told["stages"])
    assert (first["steps"], second["steps"], second["rounds_at_most"]) == (300, 2 * BATCHES * 4, 4)
    assert 0.02 <= first["seconds_per_step"] < 0.2
    estimate = told["estimate"]
    assert estimate["evaluations"] == 3 + 2 + 2  # every 100 steps, after each of two stages, before and after all
    assert 0.05 <= estimate["seconds_per_evaluation"] < 0.5
    by_hand = sum(t["steps"] * t["seconds_per_step"] for t in (first, second)) + 7 * estimate["seconds_per_evaluation"]
    assert estimate["seconds"] == pytest.approx(by_hand)
    assert len(looks) == 1


def test_a_long_training_is_timed_by_a_few_steps_of_it() -> None:
    calls: list[int] = []
    hook = fw.GradualPruning(sparsity=0.9, end=900_000)
    told = preview(make_task(calls=calls), Recipe((fw.Train(steps=1_000_000, hooks=[hook]),)), seconds=0.05)
    assert told["stages"][0]["training"][0]["steps"] == 1_000_000
    assert len(calls) < 150
    told = preview(make_task(slow=0.001), Recipe((fw.Train(steps=1_000_000),)), seconds=5.0)
    assert told["stages"][0]["training"][0]["timed_steps"] > 50, "what the first step loads must not use up the time"
    assert preview(make_task(slow=0.01), Recipe((fw.Train(steps=1),)))["estimate"]["seconds"] >= 0.01


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("sgd", 1)])
def test_memory_and_disk_follow_the_stated_formulas(optimizer: str, moments: int) -> None:
    """By hand: all is fp32; autograd saves each linear layer's input and the loss's probabilities and targets."""
    weights = 16 * 48 + 48 * 32 + 32 * 2
    values = weights + 48 + 32 + 2
    saved = 4 * ROWS * (16 + 48 + 32 + 2) + 8 * ROWS
    estimate = preview(make_task(), Recipe((fw.Train(steps=3, optimizer=optimizer),)), seconds=0.0)["estimate"]
    memory = 2 * 4 * values + (1 + moments) * 4 * values + weights + saved
    assert memory <= estimate["memory_bytes"] <= memory + 64  # the loss also saves a scalar
    assert estimate["disk_bytes"] == 2 * 4 * values + 1_000_000
    checkpoint = 4 * values * (1 + moments) + weights
    assert estimate["disk_peak_bytes"] == estimate["disk_bytes"] + 4 * values + 2 * checkpoint


def test_what_a_run_would_refuse_the_dry_run_refuses() -> None:
    with pytest.raises(NothingToCompress, match="conv"):
        preview(make_task(), Recipe((fw.Prune(sparsity=0.5, layers=["conv*"]),)))
    with pytest.raises(NothingToCompress, match="all 3 weights are kept"):
        preview(make_task(), Recipe((fw.Prune(sparsity=0.5, keep=["*"]),)))
    with pytest.raises(DataError, match="empty"):
        preview(fw.Task(make_model(), (torch.zeros(1, 16),), train=[]), Recipe((fw.Train(steps=3),)))
