# SPDX-License-Identifier: Apache-2.0
"""Whole blocks dropped: those that do least, only where the shapes allow, and replayed from the plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import NothingToCompress, NumericalError, OptionError
from featherweight.prune.channels.depth import block_influence, blocks


class Block(nn.Module):
    def __init__(self, size: float, width: int = 6, in_tuple: bool = False) -> None:
        super().__init__()
        self.fc, self.size, self.in_tuple = nn.Linear(width, width), size, in_tuple

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = x + self.size * torch.tanh(self.fc(x))
        return (y,) if self.in_tuple else y


class Net(nn.Module):
    def __init__(self, sizes: tuple[float, ...], in_tuple: bool = False, reads: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(Block(size, in_tuple=in_tuple) for size in sizes)
        self.in_tuple, self.reads = in_tuple, reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if self.reads and layer.size < 0:
                continue
            x = layer(x, mask=None)
            x = x[0] if self.in_tuple else x
        return self.head(x)


SIZES = (1.0, 0.02, 0.6, 0.01, 0.9)


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(SIZES, **options).eval()


def data(seed: int = 0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))


def drop(model: nn.Module, **options: Any) -> tuple[fw.Plan, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    task = fw.Task(model, (data(),), train=[(data(i), torch.zeros(16)) for i in range(3)])
    return fw.DropBlocks(**options)(model, task, fw.Stage(report=events.append)), events


@pytest.mark.parametrize("importance", ["influence", "error"])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_the_blocks_that_do_least_go(importance: str, in_tuple: bool) -> None:
    model = net(in_tuple=in_tuple)
    expected = copy.deepcopy(model)
    expected.layers = nn.ModuleList(expected.layers[i] for i in (0, 2, 4))
    parameters = sum(p.numel() for p in expected.parameters())
    plan, events = drop(model, count=2, importance=importance)
    assert {edit.layer for edit in plan.edits} == {"layers.1", "layers.3"}
    assert {edit.to for edit in plan.edits} == {"skip_tuple" if in_tuple else "skip"}
    assert torch.equal(model(data(5)), expected(data(5)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    lines = {event["weight"]["name"]: event["weight"]["action"] for event in events if event["kind"] == "selection"}
    assert [lines[f"layers.{i}"] for i in range(5)] == ["kept", "pruned", "kept", "pruned", "kept"]


def test_influence_is_one_minus_the_mean_cosine() -> None:
    model = net()
    found = block_influence(model, ["layers.0", "layers.3"], [data(0), data(1)], lambda model, x: model(x))
    total: dict[str, list[float]] = {"layers.0": [], "layers.3": []}
    for seed in (0, 1):
        x = model.stem(data(seed))
        for i, layer in enumerate(model.layers):
            y = layer(x)
            if f"layers.{i}" in total:
                total[f"layers.{i}"] += [
                    float((a @ b) / (a.norm() * b.norm())) for a, b in zip(x.detach(), y.detach(), strict=True)
                ]
            x = y
    for name, cosines in total.items():
        assert found[name] == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


def test_images_have_their_channels_on_axis_one() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)  # orthogonal for equal channels

    model = nn.Sequential(Scale())
    found = block_influence(model, ["0"], [torch.ones(1, 2, 3, 3)], lambda model, x: model(x))
    assert found["0"] == pytest.approx(1.0)


def test_the_plan_replays_on_a_fresh_model(tmp_path: Path) -> None:
    model = net()
    plan, _ = drop(model, count=2)
    fw.save(model, plan, tmp_path / "run")
    again = fw.load(net(), tmp_path / "run").eval()
    assert torch.equal(again(data(5)), model(data(5)))


def test_what_is_no_block_is_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(1.0, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 7), nn.Tanh()), nn.LayerNorm(7))
    found, reasons = blocks(model, data(), lambda model, x: model(x))
    assert found == {"0": "skip"}
    assert reasons["1"] == "it is a single layer, not a block"
    assert reasons["2"] == "it takes [16, 4] and gives [16, 7]"


def test_a_block_that_its_parent_reads_is_left_with_the_reason() -> None:
    model = net(reads=True)
    found, reasons = blocks(model, data(), lambda model, x: model(x))
    assert not found
    assert "does not run without it: AttributeError" in reasons["layers.0"]


def test_blocks_outside_of_lists_go_where_they_are_named() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(0.1, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x))

    with pytest.raises(NothingToCompress, match="1 blocks are to go and 0 can"):
        drop(One())
    model = One()
    plan, _ = drop(model, layers=["block"])
    assert plan.edits == (fw.Swap("block", to="skip"),)


def test_a_block_within_another_does_not_go_with_it() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(Block(0.001, 4), Block(0.002, 4))
    model = nn.Sequential(inner, Block(1.0, 4))
    plan, _ = drop(model, count=2)
    names = [edit.layer for edit in plan.edits]
    assert names == ["0.0", "0.1"] or (names[0] == "0" and names[1] == "1")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, OptionError, "count must be a whole number from 1"),
        ({"importance": "depth"}, OptionError, "importance 'depth' is none of"),
        ({"count": 9}, NothingToCompress, "9 blocks are to go and 5 can"),
        ({"count": 5, "keep": ["layers.0"]}, NothingToCompress, "layers.0: keep names it"),
        ({"keep": ["layer.0"]}, NothingToCompress, "keep: 'layer.0' matches none"),
        ({"layers": ["blocks.*"]}, NothingToCompress, r"layers: 'blocks.\*' matches none"),
    ],
)
def test_what_cannot_be_is_refused_with_the_model_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net()
    before = model(data())
    with pytest.raises(error, match=message):
        drop(model, **options)
    assert torch.equal(model(data()), before)


def test_nan_is_not_ranked() -> None:
    model = net()
    with torch.no_grad():
        model.layers[2].fc.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.2: what goes through it is NaN"):
        drop(model)
