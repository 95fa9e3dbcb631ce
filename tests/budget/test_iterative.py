# SPDX-License-Identifier: Apache-2.0
"""The loop is run over a step whose effect is known in advance: it zeroes k more weights and costs a set amount of metric."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from featherweight.budget import Iterative, Until
from featherweight.edits import apply
from featherweight.errors import OptionError
from featherweight.plan import Factor, Plan
from featherweight.task import Stage, Task

COST = 0.01  # what the metric loses with each round of ten zeros


@dataclasses.dataclass(frozen=True)
class ZeroTen:
    """Zeroes the ten first weights that are not zero."""

    fails_in: int | None = None

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        weight = model.get_parameter("fc.weight").detach().view(-1)
        zeros = int((weight == 0).sum())
        if self.fails_in is not None and zeros == 10 * (self.fails_in - 1):
            raise KeyboardInterrupt
        weight[zeros : zeros + 10] = 0
        stage.report({"kind": "record", "step": 5})
        stage.report({"kind": "selection", "weight": {"name": "fc.weight"}})
        return Plan(formats={"fc.weight": f"round:{stage.seed}"})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"fc": nn.Linear(10, 10, bias=False)})


def task(model: nn.Module) -> Task:
    def evaluate(m: Any) -> float:
        return 0.9 - COST * int((m["fc"].weight == 0).sum()) / 10

    return Task(model, (), evaluate=evaluate)


def run(loop: Iterative, **stage: Any) -> tuple[nn.Module, Plan, list[dict[str, Any]]]:
    model, events = network(), []
    plan = loop(model, task(model), Stage(report=events.append, **stage))
    return model, plan, events


def zeros(model: nn.Module) -> int:
    return int((model["fc"].weight == 0).sum())


def texts(events: list[dict[str, Any]], kind: str) -> list[str]:
    return [event["text"] for event in events if event["kind"] == kind]


def test_it_stops_where_the_size_is_reached() -> None:
    model, plan, events = run(Iterative([ZeroTen()], Until(sparsity=0.35)))
    assert zeros(model) == 40
    assert plan.formats == {"fc.weight": "round:4"}
    assert texts(events, "unmet") == []
    assert len(texts(events, "message")) == 4
    steps = [event["step"] for event in events if event["kind"] == "record"]
    assert steps == sorted(steps)
    assert max(steps) == 20, "four rounds of five steps, one after the other on the curve"
    assert sum(event["kind"] == "selection" for event in events) == 1


def test_bytes_are_those_of_the_packed_model() -> None:
    model, _, _ = run(Iterative([ZeroTen()], {"bytes": "45 %"}))
    # 100 floats: a bitmask takes 13 bytes, so 180 bytes hold at most 41 values; a narrower float may not be used.
    assert 60 <= zeros(model) <= 70


def test_a_round_that_costs_too_much_is_undone_and_said() -> None:
    model, plan, events = run(Iterative([ZeroTen()], Until(sparsity=0.9, drop=2.5 * COST)))
    assert zeros(model) == 20
    assert plan.formats == {"fc.weight": "round:2"}
    assert "undone" in texts(events, "message")[-1]
    [unmet] = texts(events, "unmet")
    assert "asked 90.0% zeros" in unmet
    assert "20.0% zeros after round 2, when the metric fell too far" in unmet


def test_rounds_are_an_end_too() -> None:
    model, _, events = run(Iterative([ZeroTen()], Until(sparsity=0.9), rounds=3))
    assert zeros(model) == 30
    assert "3 rounds were over" in texts(events, "unmet")[0]


def test_lower_can_be_better() -> None:
    model = network()
    rising = Task(model, (), evaluate=lambda m: 1 + COST * zeros(m) / 10, higher_is_better=False)
    Iterative([ZeroTen()], Until(sparsity=0.9, drop=2.5 * COST))(model, rising, Stage())
    assert zeros(model) == 20


def test_structure_that_a_bad_round_changed_is_undone_too() -> None:
    @dataclasses.dataclass(frozen=True)
    class Split:
        def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
            edit = Factor("fc", 2)
            apply(model, edit)
            return Plan((edit,))

    model = network()
    before = model["fc"].weight.detach().clone()
    plan = Iterative([Split()], Until(sparsity=0.9, drop=0.0), rounds=2)(
        model, Task(model, (), evaluate=lambda m: float(isinstance(m["fc"], nn.Linear))), Stage()
    )
    assert plan == Plan()
    assert torch.equal(model["fc"].weight, before)


@pytest.mark.parametrize("fails_in", [1, 3])
def test_a_loop_that_died_goes_on_to_the_same_state(tmp_path: Path, fails_in: int) -> None:
    whole, plan, _ = run(Iterative([ZeroTen()], Until(sparsity=0.6)), folder=None)
    with pytest.raises(KeyboardInterrupt):
        run(Iterative([ZeroTen(fails_in)], Until(sparsity=0.6)), folder=tmp_path)
    again, resumed, events = run(Iterative([ZeroTen()], Until(sparsity=0.6)), folder=tmp_path, resume=True)
    assert torch.equal(whole["fc"].weight, again["fc"].weight)
    assert resumed == plan
    assert len(texts(events, "message")) == 6 - (fails_in - 1)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_bad_options_are_named() -> None:
    with pytest.raises(OptionError, match="no end"):
        Until(drop="1 %")
    with pytest.raises(OptionError, match="sparsity"):
        Until(sparsity=1.0)
    with pytest.raises(OptionError, match="size '3x'"):
        Until(bytes="3x")
    with pytest.raises(OptionError, match="until takes bytes, sparsity and drop"):
        Iterative([ZeroTen()], {"byte": 3})
    with pytest.raises(OptionError, match="one or more methods"):
        Iterative([], Until(sparsity=0.5))
    model = network()
    with pytest.raises(OptionError, match="evaluate"):
        Iterative([ZeroTen()], Until(sparsity=0.5, drop=0.1))(model, Task(model, ()), Stage())
