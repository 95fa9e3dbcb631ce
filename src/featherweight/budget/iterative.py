# SPDX-License-Identifier: Apache-2.0
"""The survey's loop: compress a little, fine-tune, evaluate, repeat until size and metric targets hold.

It takes any methods and knows none of them. What it returns is the last state in which the metric still held.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight import pack
from featherweight.budget.units import allowed_drop, limit_bytes
from featherweight.edits import replay
from featherweight.errors import OptionError
from featherweight.layers import fill, tensors_and_ties, weights
from featherweight.plan import Plan
from featherweight.state import load_state, save_state
from featherweight.task import Method, Stage, Task

__all__ = ["Iterative", "Until"]


@dataclasses.dataclass(frozen=True)
class Until:
    """When a loop may stop: the packed size to reach, and how far the metric may fall from where it began.

    `bytes` is absolute ("2 MB", 200000) or the share kept of the dense bytes ("10 %"); `sparsity` the share of zeros
    among all weights (biases and norms, which may start at zero, do not count). `drop` is in the metric's units (0.01)
    or a share of its start ("1 %"). At least one of `bytes` and `sparsity` is needed, or the loop would have no end.

    >>> Until(bytes="10 %", drop="1 %")
    Until(bytes='10 %', sparsity=None, drop='1 %')
    """

    bytes: str | int | None = None
    sparsity: float | None = None
    drop: str | float | None = None

    def __post_init__(self) -> None:
        if self.bytes is None and self.sparsity is None:
            raise OptionError("until: give bytes ('10 %', '2 MB') or sparsity (0.9); a drop alone is no end.")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise OptionError(f"until: sparsity must be between 0 and 1; got {self.sparsity!r}.")
        if self.bytes is not None:
            limit_bytes(self.bytes, 1)
        if self.drop is not None:
            allowed_drop(self.drop, 1.0)


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Repeats `step`'s methods until `until` holds, at most `rounds` times; keeps the last state that met the metric.

    Saves what its steps save. A typical step is `(Prune(sparsity=0.2, of="remaining"), Train(...))`. After each round
    the packed size is computed exactly and the metric evaluated; a round that lets the metric fall too far is undone
    and ends the loop. Where the size was not reached, the best state is kept and the report says so (the command line
    then exits with 3). Each round is a checkpoint.

    Raises `OptionError` for options that cannot end or a drop without `Task(evaluate=...)`.

    >>> Iterative(step=[print], until={"sparsity": 0.5}).until
    Until(bytes=None, sparsity=0.5, drop=None)
    """

    step: Sequence[Method]
    until: Until | Mapping[str, Any]
    rounds: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", tuple(self.step))
        if isinstance(self.until, Mapping):
            try:
                object.__setattr__(self, "until", Until(**self.until))
            except TypeError as error:
                raise OptionError(f"until takes bytes, sparsity and drop: {error}.") from None
        if not self.step or not all(callable(method) for method in self.step):
            raise OptionError("iterative: step needs one or more methods, such as Prune(...) and Train(...).")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise OptionError(f"iterative: rounds must be a whole number from 1; got {self.rounds!r}.")

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        if not isinstance(self.until, Until):
            raise OptionError("iterative: until is not an Until.")
        if self.until.drop is not None and task.evaluate is None:
            raise OptionError("iterative: a drop needs Task(evaluate=...).")
        loop = _Rounds(self, self.until, model, task, stage)
        loop.run()
        return loop.kept.plan


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A state to come back to."""

    model: nn.Module
    plan: Plan
    round: int
    bytes: int
    sparsity: float
    metric: float | None


class _Rounds:
    """The loop at work: the model as it goes, the state to come back to, and the curve."""

    def __init__(self, options: Iterative, until: Until, model: nn.Module, task: Task, stage: Stage) -> None:
        self.options, self.until, self.model, self.task, self.stage = options, until, model, task, stage
        self.file = None if stage.folder is None else stage.folder / "rounds.safetensors"
        dense = sum(t.numel() * t.element_size() for t in tensors_and_ties(model)[0].values())
        self.most_bytes = None if until.bytes is None else limit_bytes(until.bytes, dense)
        self.start = copy.deepcopy(model)  # what edits are replayed on when a killed run goes on
        self.offset = 0
        self.kept = self._look(Plan(), 0)
        self.reference = self.kept.metric

    def run(self) -> None:
        current, ended = self._resume()
        while not ended and current < self.options.rounds and not self._reached(self.kept):
            current += 1
            state = self._round(current)
            self._tell(state)
            if self._metric_holds(state):
                self.kept = state
            else:
                ended = True
            self._save(current, ended)
        if not self._reached(self.kept):
            self._say_unmet(current)
        _become(self.model, self.kept.model)
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _round(self, current: int) -> _Kept:
        plan = self.kept.plan
        for index, method in enumerate(self.options.step):
            folder = None if self.stage.folder is None else self.stage.folder / f"round-{current}-{index}"
            if folder is not None:
                folder.mkdir(exist_ok=True)
            plan += method(self.model, self.task, self._sub_stage(current, folder))
            if folder is not None:
                shutil.rmtree(folder)
        return self._look(plan, current)

    def _sub_stage(self, current: int, folder: Path | None) -> Stage:
        offset, last = self.offset, 0

        def report(event: dict[str, Any]) -> None:
            nonlocal last
            if event["kind"] == "selection" and current > 1:
                return  # the same layers as in the first round
            if event["kind"] == "record":
                last = event["step"]
                event = {**event, "step": offset + last}
                self.offset = event["step"]
            self.stage.report(event)

        return dataclasses.replace(
            self.stage,
            name=f"{self.stage.name}, round {current}",
            folder=folder,
            seed=self.stage.seed + current,
            report=report,
        )

    def _look(self, plan: Plan, current: int) -> _Kept:
        tensors = tensors_and_ties(self.model)[0]
        size = sum(form.coded_bytes for form in pack.code(tensors, plan.formats).values())
        parameters = [weight.parameter for weight in weights(self.model)[0]]
        zeros = sum(int((p == 0).sum()) for p in parameters) / max(1, sum(p.numel() for p in parameters))
        metric = None
        if self.task.evaluate is not None:
            mode = self.model.training
            self.model.eval()
            with torch.no_grad():
                metric = float(self.task.evaluate(self.model))
            self.model.train(mode)
        return _Kept(copy.deepcopy(self.model), plan, current, size, zeros, metric)

    def _reached(self, state: _Kept) -> bool:
        small = self.most_bytes is None or state.bytes <= self.most_bytes
        return small and (self.until.sparsity is None or state.sparsity >= self.until.sparsity - 1e-9)

    def _metric_holds(self, state: _Kept) -> bool:
        if self.until.drop is None or state.metric is None or self.reference is None:
            return True
        worse = self.reference - state.metric if self.task.higher_is_better else state.metric - self.reference
        return worse <= allowed_drop(self.until.drop, self.reference) + 1e-12

    def _tell(self, state: _Kept) -> None:
        self.stage.report(
            {
                "kind": "message",
                "text": f"round {state.round}: {state.sparsity:.1%} zeros, {state.bytes:,} bytes packed"
                + ("" if state.metric is None else f", {self.task.metric} {state.metric:.4g}")
                + ("" if self._metric_holds(state) else "; the metric fell too far, so the round is undone"),
            }
        )
        record: dict[str, Any] = {"kind": "record", "step": max(self.offset, state.round), "sparsity": state.sparsity}
        self.stage.report(record if state.metric is None else {**record, "metric": state.metric})

    def _say_unmet(self, current: int) -> None:
        asked = [f"{self.most_bytes:,} bytes" if self.most_bytes is not None else ""]
        asked.append(f"{self.until.sparsity:.1%} zeros" if self.until.sparsity is not None else "")
        cause = "the metric fell too far" if current > self.kept.round else f"{self.options.rounds} rounds were over"
        text = (
            f"Budget not met: asked {' and '.join(a for a in asked if a)}; best {self.kept.bytes:,} bytes and "
            f"{self.kept.sparsity:.1%} zeros after round {self.kept.round}, when {cause}. Allow a larger drop, more rounds or "
            "longer fine-tuning."
        )
        self.stage.report({"kind": "unmet", "text": text})

    def _save(self, current: int, ended: bool) -> None:
        if self.file is None:
            return
        kept = self.kept
        facts = {"round": kept.round, "bytes": kept.bytes, "sparsity": kept.sparsity, "metric": kept.metric}
        state = {"current": current, "ended": ended, "offset": self.offset, "reference": self.reference}
        save_state(
            self.file,
            {**state, "kept": {**facts, "plan": kept.plan.to_dict(), "tensors": tensors_and_ties(kept.model)[0]}},
        )

    def _resume(self) -> tuple[int, bool]:
        if not self.stage.resume or self.file is None or not self.file.exists():
            return 0, False
        state = load_state(self.file)
        kept = state["kept"]
        plan = Plan.from_dict(kept["plan"], str(self.file))
        model = copy.deepcopy(self.start)
        replay(model, plan.edits)
        fill(model, kept["tensors"])
        _become(self.model, copy.deepcopy(model))
        self.kept = _Kept(model, plan, kept["round"], kept["bytes"], kept["sparsity"], kept["metric"])
        self.offset, self.reference = state["offset"], state["reference"]
        return state["current"], state["ended"]


def _become(model: nn.Module, state: nn.Module) -> None:
    """Gives `model` the modules and tensors of `state`, its copy at another time: edits cannot be undone one by one."""
    model.__dict__.clear()
    model.__dict__.update(state.__dict__)
