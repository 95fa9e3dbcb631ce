# SPDX-License-Identifier: Apache-2.0
"""`featherweight inspect --bits`: what each weight loses at fewer bits, by the metric or by the answers."""

from pathlib import Path

import pytest
import torch

from featherweight.grids import GridSpec, fit_grid

from .conftest import Run

NETS = '''
import torch
from torch import nn
import featherweight as fw


def whole(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    return fw.Task(model, (x,), calibration=[x], evaluate=lambda net: float(net(x).square().mean()), metric="energy")


def answers():
    task = whole()
    return fw.Task(task.model, task.example_inputs, calibration=task.calibration)


def no_data():
    return fw.Task(whole().model, whole().example_inputs)
'''  # fmt: skip


@pytest.fixture(autouse=True)
def nets(project: Path) -> None:
    (project / "bitnets.py").write_text(NETS)


def test_each_weight_is_measured_at_each_number_of_bits(run: Run) -> None:
    """Oracle: the last layer rounded by hand."""
    result = run("inspect", "--task", "bitnets:whole", "--bits", "--json")
    assert result.exit_code == 0, result.stderr
    found = result.answer["bits"]
    import bitnets

    task = bitnets.whole()
    assert found["of"] == "energy" and found["whole"] == pytest.approx(task.evaluate(task.model))
    weight = task.model[2].weight
    with torch.no_grad():
        weight.copy_(fit_grid(weight, GridSpec(2, symmetric=True)).nearest(weight))
    line = found["lines"][1]
    assert line["name"] == "2.weight"
    assert line["losses"]["2"] == pytest.approx(found["whole"] - task.evaluate(task.model))
    told = run("inspect", "--task", "bitnets:whole", "--bits").stdout
    assert "How far energy falls from" in told and "for 4 on average" in told
    assert "Output error with one weight rounded" in run("inspect", "--task", "bitnets:answers", "--bits").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bitnets:whole", "--bits"], "--task package.module:function"),
        (["--task", "bitnets:no_data", "--bits"], "Task(train=...)"),
    ],
)
def test_bits_without_a_task_or_its_data_are_answered_with_2(run: Run, words: list[str], said: str) -> None:
    result = run("inspect", *words)
    assert result.exit_code == 2 and said in result.stderr, result.stderr
