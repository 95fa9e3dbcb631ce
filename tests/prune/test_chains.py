# SPDX-License-Identifier: Apache-2.0
"""Neurons: who feeds whom. Oracle for a pair: silencing one output changes nothing once its columns are gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import NothingToCompress, OptionError
from tests.models import MODELS


class Net(nn.Module):
    """A network of layers by name and a function of them."""

    def __init__(self, run: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def lenet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.norm(m.conv1(x))), 2)
        x = m.drop(F.avg_pool2d(F.gelu(m.conv2(x)) * 2 + 1, 2)).flatten(1)
        return m.fc2(torch.sigmoid(m.fc1(x)))

    layers = {
        "conv1": nn.Conv2d(1, 6, 3),
        "norm": nn.BatchNorm2d(6),
        "conv2": nn.Conv2d(6, 8, 3),
        "drop": nn.Dropout(),
        "fc1": nn.Linear(8 * 5 * 5, 12),
        "fc2": nn.Linear(12, 4),
    }
    return Net(run, **layers), (torch.randn(2, 1, 28, 28),)


def select(model: nn.Module, inputs: tuple[Tensor, ...] | None, **options: Any) -> dict[str, str]:
    options = {"sparsity": 0.5, "pattern": "neuron", "dense": ()} | options
    return {line.name: f"{line.action}: {line.reason}" for line in fw.GradualPruning(**options).select(model, inputs)}


def test_pairs_are_followed_through_what_keeps_channels_apart() -> None:
    assert select(*lenet()) == {
        "conv1.weight": "pruned: with the columns it feeds in conv2",
        "conv2.weight": "pruned: with the columns it feeds in fc1",
        "fc1.weight": "pruned: with the columns it feeds in fc2",
        "fc2.weight": "kept: its outputs are the model's own",
    }


@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1"])
def test_a_pair_is_right_when_the_columns_hide_whatever_the_output_does(name: str) -> None:
    """The columns of pruned neurons are zero, so noise on those very outputs must not reach the model's own."""
    model, inputs = lenet()
    model.eval()
    fw.Prune(0.5, pattern="neuron", layers=[name], dense=())(model, fw.Task(model, inputs), fw.Stage())
    layer = getattr(model, name)
    gone = (layer.weight == 0).flatten(1).all(1)
    assert int(gone.sum()) == len(gone) // 2
    assert (layer.bias[gone] == 0).all() and (layer.bias[~gone] != 0).all()
    quiet = model(*inputs)

    def noise(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        mask = gone.view(-1, *[1] * (out.ndim - 2))
        return torch.where(mask, torch.randn_like(out), out)

    with layer.register_forward_hook(noise):
        assert torch.equal(model(*inputs), quiet)
    # And no more than that: the columns of any neuron that stays are as they were.
    kept = torch.nonzero(~gone)[0].item()

    def louder(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, kept] += 10.0
        return out

    with layer.register_forward_hook(louder):
        assert not torch.equal(model(*inputs), quiet)


def test_a_neuron_scores_the_root_of_its_row_and_the_column_it_feeds() -> None:
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    row, column = (model[i].weight.detach().double().numpy() for i in (0, 2))
    scores = np.sqrt((row**2).sum(1) + (column**2).sum(0))
    assert not np.array_equal(np.argsort(scores)[:6], np.argsort((row**2).sum(1))[:6])
    fw.Prune(0.5, pattern="neuron")(model, fw.Task(model, (torch.zeros(1, 5),)), fw.Stage())
    expected = np.zeros(12, dtype=bool)
    expected[np.argsort(scores)[:6]] = True
    assert np.array_equal((model[0].weight == 0).all(1).numpy(), expected)
    assert np.array_equal((model[0].bias == 0).numpy(), expected)
    assert np.array_equal((model[2].weight == 0).all(0).numpy(), expected)
    assert (model[2].bias != 0).all()


def test_a_layer_in_the_middle_loses_rows_of_its_own_and_columns_of_those_before() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = fw.GradualPruning(0.5, begin=1, end=3, every=1, pattern="neuron")
    pruner = options.attach(model, optimizer, (torch.zeros(1, 5),))
    for _ in range(6):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        pruner.step()
    first, second = (model[i].weight == 0 for i in (0, 2))
    rows, columns = second.all(1), second.all(0)
    assert int(rows.sum()) == 3 and int(columns.sum()) == 4
    assert torch.equal(columns, first.all(1)) and torch.equal(columns, model[0].bias == 0)
    assert torch.equal(second, rows[:, None] | columns[None, :])


def test_a_linear_that_reads_positions_instead_of_channels_is_no_consumer() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Linear(4, 4))
    found = select(model, (torch.randn(3, 2, 4),))  # four channels, and by chance four positions
    assert found["0.weight"] == "kept: 2.weight does not read its outputs as input channels"
    assert select(model[:2] + nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), (torch.randn(3, 2, 4),))[
        "0.weight"
    ].startswith("pruned")


def two(run: Any, **layers: nn.Module) -> nn.Module:
    return Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), **layers)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.b(m.a(x)) + m.a.bias, None),
        (lambda m, x: m.b(m.a(x) + x), "its outputs go through add, which is not followed"),
        (lambda m, x: m.b(h := m.a(x)) + h, "its outputs are read in 2 places"),
        (lambda m, x: m.b(F.softmax(m.a(x), -1)), "go through softmax, which is not followed"),
        (lambda m, x: m.b(F.layer_norm(m.a(x), (4,))), "go through layer_norm, which is not followed"),
        (lambda m, x: m.b(m.a(x).view(-1, 2, 2).transpose(1, 2).flatten(1)), "go through view, which is not followed"),
        (lambda m, x: m.b(m.a(x).flip(1)), "go through flip, which is not followed"),
        (lambda m, x: m.b(m.a(m.a(x))), "it is read 2 times in one forward"),
        (lambda m, x: m.b(m.b(m.a(x))), "it feeds b, which is read 2 times in one forward"),
        (lambda m, x: m.b(x @ m.a.weight.t()), "it is read by t, not by a plain linear or conv"),
        (lambda m, x: m.b(m.a(x).t()), "go through t, which is not followed"),
        (lambda m, x: m.b(m.a(x)).sum() * m.a.weight, "it is read 2 times"),
        (lambda m, x: m.b(x * 2), "it is read 0 times"),
    ],
)
def test_nothing_is_guessed(run: Any, reason: str | None) -> None:
    found = select(two(run), (torch.randn(4, 4),))["a.weight"]
    assert found.startswith("pruned") if reason is None else (found.startswith("kept") and reason in found), found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("residual", {"a": "pruned", "stem": "read in 2 places", "b": "go through add"}),
        (
            "depthwise and grouped",
            {"stem": "depth.weight is a conv with 8 groups", "depth": "pruned", "point": "2 groups"},
        ),
        ("transposed", {"up": "line.weight is a conv with 2 groups", "line": "pruned"}),
        ("1-d and 3-d", {"solid": "pruned", "line": "pruned"}),
        ("two inputs", {"left": "go through mul", "right": "go through mul"}),
        ("functional", {"mix": "pruned"}),
        (
            "tied",
            {"words": "weights of kind embedding have no neurons", "mix": "it feeds words, which is read 2 times"},
        ),
    ],
)
def test_every_kind_of_model_has_pairs_or_reasons(kind: str, expected: dict[str, str]) -> None:
    make, inputs = MODELS[kind]
    found = select(make(), inputs(2))
    for layer, words in expected.items():
        assert words in found[f"{layer}.weight"], found


def test_pairs_given_by_hand_need_no_graph() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(3, 4), "fc2": nn.Linear(8, 2), "other": nn.Linear(2, 2)})
    found = select(model, None, feeds={"fc1": "fc2"})
    assert found == {
        "fc1.weight": "pruned: with the columns it feeds in fc2",
        "fc2.weight": "kept: no pair of feeds names it",
        "other.weight": "kept: no pair of feeds names it",
    }
    pruner = fw.GradualPruning(0.5, end=0, pattern="neuron", feeds={"fc1": "fc2"}, dense=()).attach(model)
    pruner.step()
    gone = (model["fc1"].weight == 0).all(1)
    assert torch.equal(
        (model["fc2"].weight == 0).all(0), gone.repeat_interleave(2)
    )  # two columns a neuron, side by side


@pytest.mark.parametrize(
    ("feeds", "error", "message"),
    [
        ({"fd1": "head"}, NothingToCompress, "feeds: 'fd1' is not a layer with a weight. Nearest names: fc"),
        ({"fc": "head"}, OptionError, "'fc' cannot feed 'head': fc.weight has 16 outputs, head.weight 8 inputs"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(feeds: dict[str, str], error: Any, message: str) -> None:
    model = MODELS["mlp"][0]()
    with pytest.raises(error, match=message):
        select(model, None, feeds=feeds)


def test_a_tied_consumer_is_refused_by_hand_too() -> None:
    with pytest.raises(OptionError, match=r"'mix' cannot feed 'words': words.weight is of kind embedding"):
        select(MODELS["tied"][0](), None, feeds={"mix": "words"})
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    with pytest.raises(OptionError, match=r"'0' cannot feed '1': 1.weight is tied to 2.weight, which would lose"):
        select(model, None, feeds={"0": "1"})


def test_neurons_need_to_know_who_feeds_whom() -> None:
    with pytest.raises(OptionError, match=r"pattern='neuron' must know.*example_inputs.*feeds={'fc1': 'fc2'}"):
        select(MODELS["mlp"][0](), None)


def test_a_kept_consumer_keeps_its_producer_but_the_output_rule_does_not() -> None:
    model, inputs = lenet()
    found = select(model, inputs, keep=["fc1"])
    assert found["conv2.weight"] == "kept: it feeds fc1, which keep=['fc1'] names"
    found = select(model, inputs, dense=("first", "output"))
    assert found["fc1.weight"].startswith("pruned")
    assert found["fc2.weight"].startswith("kept: output layer")


def test_a_model_that_cannot_be_traced_says_why() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) if x.sum() > 0 else m.b(x)

    found = select(two(run), (torch.randn(2, 4),))
    assert "torch.export could not trace the model" in found["a.weight"]
    assert "give feeds={...}" in found["a.weight"]
