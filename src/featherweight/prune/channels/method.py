# SPDX-License-Identifier: Apache-2.0
"""Channels and heads cut at once, without training, or in rounds that measure scores again in between."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.correct import Correction, Moved, keep_if_better, output_error, reestimate_batch_norm
from featherweight.correct.batch_norm import running_statistics, tracked_norms
from featherweight.correct.surroundings import state_tensors, undone_on_error
from featherweight.edits import cut
from featherweight.errors import DataError, NumericalError, OptionError, check_whole, is_number
from featherweight.graph import Group, Trace, trace
from featherweight.layers import existing_zeros, unwrap
from featherweight.plan import Plan
from featherweight.prune.channels.decide import Decision, decide, prices_of
from featherweight.prune.channels.events import events_of
from featherweight.prune.channels.gather import NEEDS_LOSS, Data, needs_data, scores_of
from featherweight.prune.channels.latency import on_device
from featherweight.prune.channels.masks import couplings_gone, masks_of, zero_buffers
from featherweight.prune.channels.options import ChannelOptions
from featherweight.prune.channels.refit import refit_consumers
from featherweight.prune.channels.selection import choose_groups, refuse_nothing
from featherweight.prune.channels.trial import that_can_be_cut
from featherweight.task import Stage, Task, batches

__all__ = ["PruneChannels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneChannels(ChannelOptions):
    """Cuts channels, neurons and heads out of the model that it is called with, at once and without training.

    Saves parameters, MACs, memory and time in every runtime; costs accuracy, which training afterwards wins back.
    Scores come from the first `batches` batches of the task's calibration data (or else its training data), in
    evaluation mode. With `rounds`, a part is masked, scores are measured again, and so on. `refit` fits the layers that
    read what was cut to answer as they did (least squares, no labels), and `batch_norm` estimates BatchNorm statistics
    anew; both stay only where the output error on held-out batches (a share `held_out` of them) falls. `verify` proves
    the cut.

    Raises `OptionError` for an option out of range or data that is missing, `NothingToCompress` where no group may be
    cut, `GraphError` for a model that cannot be traced; the model is then as it was.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> task = Task(model, (torch.randn(4, 8),))
    >>> plan = PruneChannels({"parameters": "50 %"}, importance="magnitude")(model, task, Stage())
    >>> model[0], len(plan.edits)
    (Linear(in_features=8, out_features=16, bias=True), 3)
    """

    rounds: int = 1
    batches: int = 16
    held_out: float = 0.25
    refit: bool = False
    batch_norm: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        me = type(self).__name__
        check_whole(me, "rounds", self.rounds, least=1)
        check_whole(me, "batches", self.batches, least=1)
        if not is_number(self.held_out) or not 0 < self.held_out < 1:
            raise OptionError(f"{me}: held_out is a share between 0 and 1; got {self.held_out!r}.")

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        model = unwrap(model)
        data = self._data(task)
        inputs = on_device(task.example_inputs, model)
        found = trace(model, inputs, grain=self.grain)  # type: ignore[arg-type]
        groups, reasons = choose_groups(model, found, self, masked=self.rounds > 1 or self.refit)
        groups, failures = that_can_be_cut(model, found, groups, inputs, self.verify)
        reasons |= failures
        refuse_nothing(groups, found, reasons)
        corrects = bool(data) and (self.refit or (self.batch_norm and bool(tracked_norms(model)[0])))
        dense = copy.deepcopy(model) if corrects else None
        fit, held_out = _split(data, self.held_out)
        with undone_on_error(state_tensors(model)):
            gone, decision = self._choose(model, task, found, groups, reasons, inputs, fit, stage)
            notes = []
            if self.refit and dense is not None:
                notes.append(self._refit(model, dense, groups, gone, fit, held_out, task))
            couplings = couplings_gone(groups, gone)
            plan = Plan()
            if couplings:
                plan = cut(model, couplings, trace=found, inputs=inputs, verify=self.verify).plan
        if self.batch_norm and dense is not None:
            notes += self._batch_norm(model, dense, fit, held_out, task)
        for event in events_of(found, gone, reasons, decision, notes):
            stage.report(event)
        return plan

    def _data(self, task: Task) -> list[Any]:
        """The batches that this run works on, once; none where nothing needs them and the task has none."""
        name = "train" if task.calibration is None else "calibration"
        needs = needs_data(self.importance) or self.refit
        if self.importance in NEEDS_LOSS and task.loss is None:
            raise OptionError(
                f"{type(self).__name__}: importance={self.importance!r} needs the gradients of a loss; give "
                "Task(loss=..., calibration=...), or importance='magnitude'."
            )
        if getattr(task, name) is None and not needs:
            return []
        try:
            return list(itertools.islice(batches(getattr(task, name), name), self.batches))
        except DataError as error:
            if needs:
                raise DataError(f"{type(self).__name__}: importance={self.importance!r}: {error}") from error
            raise

    def _choose(
        self,
        model: nn.Module,
        task: Task,
        found: Trace,
        groups: list[Group],
        reasons: dict[str, str],
        inputs: Any,
        fit: Sequence[Any],
        stage: Stage,
    ) -> tuple[dict[str, np.ndarray], Decision]:
        """What goes, in rounds; what is gone is zero in the model where a later step reads it so."""
        data = Data(fit, task.forward, task.loss)
        gone = {group.name: np.zeros(group.size, dtype=bool) for group in groups}
        prices = prices_of(model, found, groups, self, inputs)
        for i in range(self.rounds):
            scores, unranked = scores_of(model, groups, gone, self, data, i)
            reasons |= unranked
            refuse_nothing([group for group in groups if group.name in scores], found, reasons)
            decision = decide(model, found, groups, scores, gone, self, prices, inputs, (i + 1) / self.rounds)
            gone = decision.gone
            if self.rounds > 1 or self.refit:
                _mask(model, groups, gone)
            stage.report({"kind": "step", "step": i + 1, "total": self.rounds})
        return gone, decision

    def _refit(
        self,
        model: nn.Module,
        dense: nn.Module,
        groups: Sequence[Group],
        gone: dict[str, np.ndarray],
        fit: Sequence[Any],
        held_out: Sequence[Any],
        task: Task,
    ) -> str:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        masks = masks_of(parameters, groups, gone)
        for weight, pruned in existing_zeros(dense):  # what an earlier stage made stays too
            parameter = parameters[weight.name]
            masks[parameter] = masks[parameter] | pruned if parameter in masks else pruned
        cut_groups = [group for group in groups if gone[group.name].any()]
        read = {member.tensor for group in cut_groups for member in group.members if member.role == "input"}
        weights = [parameter for name, parameter in model.named_parameters() if name in read]

        def attempt() -> Moved:
            return refit_consumers(model, dense, read, masks, fit, task.forward)

        return _said(_tried("refit", attempt, weights, model, dense, held_out, task))

    def _batch_norm(
        self, model: nn.Module, dense: nn.Module, fit: Sequence[Any], held_out: Sequence[Any], task: Task
    ) -> list[str]:
        norms, _ = tracked_norms(model)
        if not norms:
            return []

        def attempt() -> Moved:
            return reestimate_batch_norm(model, fit, task.forward)

        tensors = running_statistics(norms.values())
        return [_said(_tried("batch_norm", attempt, tensors, model, dense, held_out, task))]


def _tried(
    name: str,
    attempt: Any,
    tensors: Sequence[Tensor],
    model: nn.Module,
    dense: nn.Module,
    held_out: Sequence[Any],
    task: Task,
) -> Correction | str:
    """The correction, or the reason why it cannot be judged."""

    def error() -> float:
        return output_error(model, dense, held_out, task.forward)

    try:
        return keep_if_better(name, attempt, tensors, error, error())
    except (NumericalError, DataError) as failure:
        return f"{name}: left out: {failure}"


def _said(done: Correction | str) -> str:
    if isinstance(done, str):
        return done
    verdict = "kept" if done.kept else "undone"
    return f"{done.name}: held-out output error {done.before:.4g} -> {done.after:.4g}, {verdict}; {done.note}"


@torch.no_grad()
def _mask(model: nn.Module, groups: Sequence[Group], gone: dict[str, np.ndarray]) -> None:
    for parameter, mask in masks_of(dict(model.named_parameters(remove_duplicate=False)), groups, gone).items():
        parameter.masked_fill_(mask, 0.0)
    zero_buffers(model, groups, gone)


def _split(data: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Batches to work on and batches to judge by, spread evenly; the same ones for both where there is only one."""
    if len(data) < 2:
        return list(data), list(data)
    count = min(len(data) - 1, max(1, round(len(data) * share)))
    aside = {(2 * i + 1) * len(data) // (2 * count) for i in range(count)}
    return [b for i, b in enumerate(data) if i not in aside], [b for i, b in enumerate(data) if i in aside]
