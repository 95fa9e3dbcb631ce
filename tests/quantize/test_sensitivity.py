# SPDX-License-Identifier: Apache-2.0
"""What each weight loses at fewer bits, against rounding by hand; bits within a budget, against all choices."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.errors import NothingToCompress, NumericalError, OptionError
from featherweight.grids import GridSpec, fit_grid, read_grid
from featherweight.layers import to_matrix, weights
from featherweight.quantize.sensitivity import Tried
from tests.models import MODELS


def task_of(kind: str, **more: Any) -> fw.Task:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    data = [(*inputs(6), torch.randn(6, 6)) for _ in range(3)]
    return fw.Task(make(), inputs(2), calibration=data, **more)


@pytest.mark.parametrize("kind", ["mlp", "transposed", "recurrent", "tied"])
def test_output_errors_are_those_of_each_weight_rounded_by_hand(kind: str) -> None:
    task = task_of(kind)
    before = copy.deepcopy(task.model.state_dict())
    events: list[dict[str, Any]] = []
    found = fw.sensitivity(task.model, task, bits=(2, 5), report=events.append)
    assert all(torch.equal(value, task.model.state_dict()[name]) for name, value in before.items())
    assert found.bits == (5, 2) and found.of == "output error" and found.whole is None
    assert [line.name for line in found.lines] == [weight.name for weight in weights(task.model)[0]]
    assert [(e["step"], e["total"]) for e in events] == [(i + 1, len(events)) for i in range(2 * len(found.lines) + 1)]
    with torch.no_grad():
        dense = [task.model.eval()(*batch[:-1]).double() for batch in task.calibration]
        size = sum(float(y.square().sum()) for y in dense)
        for index, line in enumerate(found.lines):
            for bits, loss in line.losses.items():
                model = copy.deepcopy(task.model)
                weight = weights(model)[0][index]
                rows = to_matrix(weight, weight.parameter)
                rounded = fit_grid(rows, GridSpec(bits, symmetric=True)).nearest(rows)
                rows.copy_(rounded) if rows.data_ptr() == weight.parameter.data_ptr() else _fill(weight, rounded)
                now = [model(*batch[:-1]).double() for batch in task.calibration]
                expected = sum(float((a - b).square().sum()) for a, b in zip(now, dense, strict=True)) / size
                assert loss == pytest.approx(expected, rel=1e-5, abs=1e-12), (line.name, bits)
            assert line.losses[2] > line.losses[5]


def _fill(weight: Any, matrix: torch.Tensor) -> None:
    from featherweight.layers import from_matrix

    weight.parameter.copy_(from_matrix(weight, matrix))


@pytest.mark.parametrize("higher", [True, False])
def test_a_metric_is_how_far_it_fell_in_its_own_direction(higher: bool) -> None:
    def evaluate(model: nn.Module) -> float:
        assert not model.training
        total = float(model.head.weight.detach().abs().sum())
        return total if higher else -total

    task = task_of("mlp", evaluate=evaluate, metric="sum", higher_is_better=higher)
    found = fw.sensitivity(task.model, task, bits=(2,))
    head = task.model.head.weight.detach()
    rounded = fit_grid(head, GridSpec(2, symmetric=True)).nearest(head)
    assert found.of == "sum" and found.whole == pytest.approx(evaluate(task.model.eval()))
    losses = {line.name: line.losses[2] for line in found.lines}
    assert losses["fc.weight"] == 0.0
    assert losses["head.weight"] == pytest.approx(float(head.abs().sum() - rounded.abs().sum()), rel=1e-5)
    assert fw.sensitivity(task.model, task, bits=(2,), by="output").of == "output error"


def test_what_layers_read_is_tried_too_and_left_as_it_was() -> None:
    task = task_of("mlp")
    found = fw.sensitivity(task.model, task, bits=(8, 2), activations=True, layers=["mid", "head"])
    inputs = [line for line in found.lines if line.kind == "input"]
    assert [line.name for line in inputs] == ["mid", "head"]
    assert all(0 < line.losses[8] < line.losses[2] for line in inputs)
    assert not any("input_grid" in name for name, _ in task.model.named_modules())
    x = task.calibration[0][0]
    twin = copy.deepcopy(task.model)
    fw.apply(twin, fw.FakeQuant("head", 2, symmetric=False, dynamic=True))
    assert not torch.equal(twin(x), task.model(x))
    assert set(fw.mixed_bits(found, 5)) == {"mid.weight", "head.weight"}


def test_what_is_on_a_grid_of_as_few_bits_loses_nothing() -> None:
    task = task_of("mlp")
    head = task.model.head.weight
    with torch.no_grad():
        head.copy_(fit_grid(head, GridSpec(3, symmetric=True)).nearest(head))
    found = fw.sensitivity(task.model, task, bits=(4, 2), layers=["head"])
    assert found.lines[0].losses[4] == 0.0 < found.lines[0].losses[2]


def table(losses: list[list[float]], sizes: list[int], bits: tuple[int, ...]) -> fw.Sensitivity:
    lines = [
        Tried(str(i), "linear", size, 1, dict(zip(bits, row, strict=True)))
        for i, (row, size) in enumerate(zip(losses, sizes, strict=True))
    ]
    return fw.Sensitivity("output error", None, bits, tuple(lines))


@pytest.mark.parametrize("seed", range(30))
def test_bits_within_a_budget_are_as_good_as_the_best_of_all_choices_but_for_the_last_step(seed: int) -> None:
    """Brute force. Of equal sizes, losses convex and steps all one bit, the choice is exactly the best."""
    chance = np.random.default_rng(seed)
    bits, n = (6, 5, 4, 3, 2), 5
    exact = seed % 2 == 0
    sizes = [100] * n if exact else chance.integers(50, 500, n).tolist()
    steps = chance.exponential(size=(n, 4))
    losses = np.concatenate([np.zeros((n, 1)), (np.sort(steps, axis=1) if exact else steps).cumsum(1)], axis=1)
    budget = float(chance.uniform(2.1, 5.9))
    found = fw.mixed_bits(table(losses.tolist(), sizes, bits), budget)
    allowed = budget * sum(sizes)

    def cost(choice: Any) -> float:
        return float(sum(bits[t] * size for t, size in zip(choice, sizes, strict=True)))

    def loss(choice: Any) -> float:
        return float(sum(row[t] for row, t in zip(losses, choice, strict=True)))

    ours = [bits.index(found[str(i)]) for i in range(n)]
    best = min((c for c in itertools.product(range(5), repeat=n) if cost(c) <= allowed), key=loss)
    assert cost(ours) <= allowed
    if exact:
        assert loss(ours) == pytest.approx(loss(best))
    else:
        assert loss(ours) <= loss(best) + float(np.diff(losses).max())


def test_a_budget_is_an_average_bytes_or_a_share_and_scales_are_counted_in_bytes() -> None:
    found = table([[0.0, 1.0, 3.0]] * 2, [1000, 1000], (8, 4, 2))
    assert fw.mixed_bits(found, 4) == {"0": 4, "1": 4}
    assert fw.mixed_bits(found, "1008 B") == {"0": 4, "1": 4}  # 1000 bytes of integers and two scales
    assert fw.mixed_bits(found, "1007 B") == {"0": 2, "1": 4}
    assert fw.mixed_bits(found, "12.6 %") == {"0": 4, "1": 4}
    assert fw.mixed_bits(found, 32) == {"0": 8, "1": 8}
    with pytest.raises(OptionError, match="2 bits everywhere, the fewest that were tried, take 500 bytes of the 400"):
        fw.mixed_bits(found, 1.6)
    for wrong in ("4 bits", -1, True, "0 %"):
        with pytest.raises(OptionError):
            fw.mixed_bits(found, wrong)


def test_losses_that_are_better_by_chance_never_pay_for_more_bits() -> None:
    found = table([[0.0, -0.2, 0.1], [0.05, 0.0, 0.3]], [100, 100], (8, 4, 2))
    assert fw.mixed_bits(found, 32) in ({"0": 8, "1": 4}, {"0": 8, "1": 8})
    assert fw.mixed_bits(found, 3) == {"0": 2, "1": 4}


def test_the_method_meets_its_budget_and_loses_less_than_the_same_bits_everywhere() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(4)]
    for layer, gain in zip(layers, (0.1, 1.0, 4.0, 0.3), strict=True):
        layer.weight.data *= gain
        layer.weight.data[:, 0] *= 5
    model = nn.Sequential(*itertools.chain(*((layer, nn.Tanh()) for layer in layers)), nn.Linear(16, 4))
    task = fw.Task(model, (torch.zeros(1, 16),), calibration=[torch.randn(64, 16) for _ in range(4)])
    said: list[str] = []
    stage = fw.Stage(report=lambda event: said.append(event["text"]) if event["kind"] == "message" else None)
    mixed, uniform = copy.deepcopy(model), copy.deepcopy(model)
    fw.MixedQuantize(3, bits=(8, 6, 4, 3, 2), quantize={"correct": ()})(mixed, task, stage)
    fw.Quantize(3, correct=())(uniform, task, fw.Stage())
    bits = {}
    for weight in weights(mixed)[0]:
        grid = read_grid(to_matrix(weight, weight.parameter.detach()))
        assert grid is not None
        bits[weight.name] = grid.bits
    sizes = {weight.name: weight.parameter.numel() for weight in weights(model)[0]}
    assert len(set(bits.values())) > 1
    assert sum(bits[name] * size for name, size in sizes.items()) <= 3 * sum(sizes.values())
    assert any("bits on average, by output error" in text for text in said)
    x = torch.cat(list(task.calibration))
    with torch.no_grad():
        error = [float((one(x) - model(x)).square().sum()) for one in (mixed, uniform)]
    assert error[0] < error[1]


def test_wrong_options_and_data_are_said() -> None:
    task = task_of("mlp")
    with pytest.raises(OptionError, match="from 2 to 8; got 9"):
        fw.sensitivity(task.model, task, bits=(9,))
    with pytest.raises(OptionError, match="empty"):
        fw.sensitivity(task.model, task, bits=())
    with pytest.raises(OptionError, match=r"needs Task\(evaluate"):
        fw.sensitivity(task.model, task, by="metric")
    with pytest.raises(NothingToCompress, match="'fx'"):
        fw.sensitivity(task.model, task, layers=["fx"])
    with pytest.raises(NothingToCompress, match="leave no weight"):
        fw.sensitivity(task.model, task, keep=["*"])
    infinite = task_of("mlp", evaluate=lambda model: float("nan"))
    with pytest.raises(NumericalError, match="became nan"):
        fw.sensitivity(infinite.model, infinite)
    nn.init.zeros_(task.model.head.weight)
    nn.init.zeros_(task.model.head.bias)
    with pytest.raises(NumericalError, match="nothing but zeros"):
        fw.sensitivity(task.model, task)
    with pytest.raises(OptionError, match="leave them out"):
        fw.MixedQuantize(4, quantize={"bits": 4})
    with pytest.raises(OptionError, match="not options of Quantize"):
        fw.MixedQuantize(4, quantize={"sparsity": 4})
