# SPDX-License-Identifier: Apache-2.0
"""Order rules of grids: what an earlier stage put on a grid is on it, or on a coarser one, after every later stage."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.errors import OptionError, StageError
from featherweight.grids import read_grid


def task(model: nn.Module | None = None) -> fw.Task:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    data = [(torch.randn(8, 16), torch.randn(8, 4)) for _ in range(4)]
    return fw.Task(
        model, (data[0][0],), train=data, calibration=data, loss=lambda out, batch: (out - batch[-1]).square().mean()
    )


def compress(stages: list[Any], on: fw.Task | None = None, **options: Any) -> fw.Result:
    return fw.compress(on or task(), stages, progress=False, **options)


TRAIN = fw.Train(steps=3, lr=0.05)


def test_a_report_counts_integers_as_such() -> None:
    result = compress([fw.Quantize(8, activations="static"), fw.Quantize(4)])
    before, after = result.scorecards["before"], result.scorecards["after"]
    assert (before.bits, before.input_bits, before.bops) == (32.0, None, 32 * before.macs)
    assert after.bits == 4.0 and after.input_bits == 8
    assert after.bops <= 4 * 8 / 32 * before.macs
    assert "4-bit weights and 8-bit inputs: " in result.report["gains"][0]
    shown = {stage["name"]: stage["scorecard"]["bits"] for stage in result.report["stages"]}
    assert list(shown.values()) == [8.0, 4.0]
    assert "PyTorch (which only simulates integers)" in result.report["verdict"]["sentence"]


@pytest.mark.parametrize(
    "first",
    [fw.Quantize(8), fw.Quantize(2), fw.Quantize(4, symmetric=False), fw.Quantize(1), fw.Quantize(4, chunk=8)],
    ids=["8", "2", "4 asymmetric", "1", "chunks"],
)
def test_training_off_the_grid_is_refused_and_says_what_to_do(first: Any) -> None:
    with pytest.raises(
        StageError, match=r"stage '2 train' moved 0\.weight off the \d-bit grid .*hooks=\[QAT\(\.\.\.\)\]"
    ):
        compress([first, TRAIN])


def test_chunks_of_a_reconstructed_grid_are_known_to_later_stages() -> None:
    solved = fw.Reconstruct(bits=4, chunk=8, samples=16, work=0.1)
    with pytest.raises(StageError, match="off the 4-bit grid"):
        compress([solved, TRAIN])


@pytest.mark.parametrize(
    "second",
    [
        fw.Prune(0.5, dense=()),
        fw.Quantize(3),
        fw.Quantize(8, activations="static"),
        fw.Reconstruct(bits=3, samples=16, work=0.1),
    ],
    ids=["prune", "coarser", "activations", "reconstruct coarser"],
)
def test_what_keeps_the_grid_or_makes_it_coarser_may_follow(second: Any) -> None:
    result = compress([fw.Quantize(4), second])
    for name in ("0.weight", "2.weight"):
        assert read_grid(result.model.state_dict()[name], most_bits=4) is not None


def test_pruning_one_bit_makes_it_two() -> None:
    result = compress([fw.Quantize(1), fw.Prune(0.5, dense=())])
    grid = read_grid(result.model.state_dict()["0.weight"])
    assert grid is not None and grid.bits == 2


def test_a_finer_grid_is_not_the_same_grid() -> None:
    with pytest.raises(OptionError, match=r"lies on a grid of 3 bits.*by bits=3 too"):
        compress([fw.Quantize(3), fw.Reconstruct(bits=8, samples=16)])


def test_cutting_channels_of_a_quantized_model_is_allowed() -> None:
    stages = [fw.Quantize(8), fw.PruneChannels({"parameters": "70 %"}, importance="taylor", refit=False)]
    result = compress(stages)
    assert read_grid(result.model.state_dict()["0.weight"]) is not None


def test_a_model_that_came_with_a_fixed_filter_may_train_it() -> None:
    """No stage put it on a grid, so none has to keep it there."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    model[0].weight.data.copy_(torch.randint(-3, 4, (24, 16)) * 0.25)
    result = compress([TRAIN], task(model))
    assert read_grid(result.model.state_dict()["0.weight"]) is None


@dataclasses.dataclass(frozen=True)
class Move:
    """A method that breaks the rule whatever it says: one value, by one unit in the last place."""

    def __call__(self, model: nn.Module, task: fw.Task, stage: fw.Stage) -> fw.Plan:
        weight = model.get_parameter("2.weight")
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        return fw.Plan()


def test_one_unit_in_the_last_place_is_off_the_grid(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"2\.weight off the 8-bit grid"):
        compress([fw.Quantize(8), Move()])
    assert compress([Move()]).model is not None


@dataclasses.dataclass(frozen=True)
class Finer:
    """A method that leaves weights on a grid, of twice as many bits."""

    def __call__(self, model: nn.Module, task: fw.Task, stage: fw.Stage) -> fw.Plan:
        weight = model.get_parameter("0.weight")
        with torch.no_grad():
            weight.copy_(torch.randint(-100, 100, weight.shape) * 0.01 * (weight != 0))
        return fw.Plan()


def test_a_finer_grid_in_the_end_is_refused_too() -> None:
    with pytest.raises(StageError, match=r"0\.weight off the 4-bit grid"):
        compress([fw.Quantize(4), Finer()])
