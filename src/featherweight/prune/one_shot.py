# SPDX-License-Identifier: Apache-2.0
"""Pruning at once, without training: the step of the survey's loop prune, fine-tune, evaluate, repeat."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import NumericalError, OptionError, check_whole, check_word
from featherweight.layers import Selected, Weight, existing_zeros, refuse_nothing
from featherweight.plan import Plan
from featherweight.prune.importance import GRADIENT_BASED, add_gradient
from featherweight.prune.masks import check_reach, choose_masks, held_shares, involved, plan_of, refuse_not_finite
from featherweight.prune.options import PruningOptions
from featherweight.prune.selection import Target, choose_layers
from featherweight.task import Stage, Task, batches

__all__ = ["Prune"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(PruningOptions):
    """Sets the least important weights of the model it is called with to zero, at once and without training.

    Saves bytes on disk where a codec skips zeros; saves no memory, and no time in runtimes that do not skip zeros.
    `of` says what `sparsity` is a share of: `all` weights, or those `remaining`, so that `Prune(0.2, of="remaining")`
    again and again leaves 0.8, 0.64, 0.512... Zeros that are there stay. Gradient-based importance is summed over the
    first `batches` batches of the task's calibration data (or else its training data), in evaluation mode.

    Raises `OptionError` for an option out of range or data that is missing, `NothingToCompress` where all is kept.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> task = Task(model, (torch.zeros(1, 8),))
    >>> Prune(0.5)(model, task, Stage())
    Plan(edits=(), formats={})
    >>> int((model[0].weight == 0).sum()), model[0].weight.numel()
    (64, 128)
    """

    of: str = "all"
    batches: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        me = type(self).__name__
        check_word(me, "of", self.of, ("all", "remaining"))
        check_whole(me, "batches", self.batches, least=1)
        if self.of == "remaining" and self.parsed.kind == "n:m":
            raise OptionError(
                f"{me}: pattern={self.pattern!r} fixes the sparsity, so that of='remaining' has no meaning."
            )

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        targets, selected = choose_layers(model, self, task.example_inputs, lambda parameter: parameter.requires_grad)
        for line in selected:
            stage.report({"kind": "selection", "weight": dataclasses.asdict(line)})
        refuse_nothing(selected)
        refuse_not_finite(targets, "before pruning")
        weights = involved(targets)
        held = {w.parameter: pruned for w, pruned in existing_zeros(model) if w.name in weights}
        check_reach(targets, self, held)
        there = held_shares(targets, self, held)
        goals = [target.sparsity for target in targets]
        if self.of == "remaining":
            goals = [share + goal * (1 - share) for share, goal in zip(there, goals, strict=True)]
        gathered = self._gradients(model, task, targets) if self.importance in GRADIENT_BASED else {}
        masks = choose_masks(targets, self, goals, held, gathered)
        with torch.no_grad():
            for parameter, pruned in masks.items():
                parameter.masked_fill_(pruned, 0.0)
        own = [target.weight.parameter for target in targets]
        share = sum(int(masks[p].sum()) for p in own) / sum(p.numel() for p in own)
        stage.report({"kind": "pruned", "sparsity": share})
        return plan_of(targets, self.parsed)

    def select(self, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> tuple[Selected, ...]:
        """What would be pruned and what kept, and why, for every weight. Changes nothing."""
        return choose_layers(model, self, example_inputs)[1]

    def _gradients(self, model: nn.Module, task: Task, targets: Sequence[Target]) -> dict[str, Tensor]:
        name = "train" if task.calibration is None else "calibration"
        data = getattr(task, name)
        if task.loss is None or data is None:
            raise OptionError(
                f"{type(self).__name__}: importance={self.importance!r} needs gradients of the loss on data; give "
                "Task(loss=..., calibration=...), or importance='magnitude'."
            )
        weights = involved(targets)
        loss = task.loss
        losses = (
            loss(task.forward(model, batch), batch) for batch in itertools.islice(batches(data, name), self.batches)
        )
        modes = {module: module.training for module in model.modules()}
        # cuDNN has no backward pass for recurrent layers in evaluation mode; torch's own has.
        recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
        try:
            model.eval()
            with torch.backends.cudnn.flags(enabled=not recurrent):
                totals, seen = _sum_gradients(losses, weights, str(self.importance))
        finally:
            for module, mode in modes.items():
                module.training = mode
        if unseen := [name for name in weights if name not in seen]:
            raise NumericalError(
                f"The loss does not depend on {', '.join(unseen[:5])}, so that importance={self.importance!r} cannot rank "
                f"it; nothing was pruned. keep={unseen[:5]} leaves it dense."
            )
        return totals


def _sum_gradients(
    losses: Iterable[Tensor], weights: Mapping[str, Weight], importance: str
) -> tuple[dict[str, Tensor], set[str]]:
    """The sums by name, and the names that had a gradient."""
    parameters = {name: weight.parameter for name, weight in weights.items()}
    totals = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    seen = set()
    for i, loss in enumerate(losses):
        if not bool(loss.isfinite()):
            raise NumericalError(f"The loss of batch {i} of the data is {loss.item()}; nothing was pruned.")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                add_gradient(totals[name], parameter.detach(), gradient, importance)
                seen.add(name)
    return totals, seen
