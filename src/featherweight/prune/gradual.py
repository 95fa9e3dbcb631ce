# SPDX-License-Identifier: Apache-2.0
"""Gradual magnitude pruning (Zhu & Gupta 2017): sparsity that grows while the network trains and can recover.

It costs one pass over the pruned weights and their optimizer state a step. What it saves is bytes in coded form, and
time only in a runtime that skips zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from featherweight.errors import OptionError, is_number
from featherweight.layers import Selected
from featherweight.prune.options import PruningOptions
from featherweight.prune.pruner import Pruner
from featherweight.prune.schedule import check_schedule
from featherweight.prune.selection import choose_layers

__all__ = ["GradualPruning"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradualPruning(PruningOptions):
    """Prunes your model in place while it trains: from `begin` to `end`, every `every` optimizer steps a little more.

    Saves bytes on disk where a codec skips zeros; saves no memory, and no time in runtimes that do not skip zeros.
    Sparsity at step t is s_f + (s_i - s_f)(1 - (t - begin)/(end - begin))³ (arXiv 1710.01878, equation 1), as exact
    counts of each layer; steps count from 0. `schedule` is cubic, linear, constant (the target from `begin` on) or
    one_shot (a single update, at `begin`; `end` is set to it). Masks only grow: pruned weights get no gradient, update,
    momentum or decay, and after `end` masks stand still. `initial` is s_i; None takes the zeros that are there, so that
    pruning again goes on from them, and holds them from the start.

    Raises `OptionError` for an option out of range.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    >>> pruner = GradualPruning(sparsity=0.75, end=20, every=5).attach(model, optimizer)
    >>> for step in range(30):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     facts = pruner.step()
    >>> pruner.finalize(), facts
    (Plan(edits=(), formats={}), {'sparsity': 0.75, 'updated': False})
    >>> int((model[0].weight == 0).sum()), model[0].weight.numel()
    (96, 128)
    """

    begin: int = 0
    end: int = 2000
    every: int = 100
    schedule: str = "cubic"
    initial: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        me = type(self).__name__
        object.__setattr__(self, "end", check_schedule(me, self.schedule, self.begin, self.end, self.every))
        if self.initial is not None:
            self._check_initial(me, self.initial)

    def _check_initial(self, me: str, initial: object) -> None:
        if not is_number(initial) or not 0 <= initial < 1:
            raise OptionError(f"{me}: initial must be at least 0 and below 1, or None; got {initial!r}.")
        if self.sparsity is None:
            final = 1 - self.parsed.n / self.parsed.m
        else:
            final = self.sparsity if isinstance(self.sparsity, int | float) else min(self.sparsity.values())
        if initial > final:
            raise OptionError(f"{me}: initial={initial} is more than the target {final:g}, and sparsity only grows.")

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        example_inputs: tuple[Any, ...] | None = None,
    ) -> Pruner:
        """Acts on your model from now on: zeros that are there are held, and `step()` of what is returned prunes more.

        `model` may be compiled or wrapped in DistributedDataParallel; `optimizer` may be wrapped by accelerate. With
        `example_inputs` the rules of `dense` see the order in which layers run, and neurons the graph.

        Raises `NothingToCompress` where all is kept, `NumericalError` for weights that are not finite, `OptionError`
        where options do not fit the model.
        """
        return Pruner(self, model, optimizer, example_inputs)

    def select(self, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> tuple[Selected, ...]:
        """What would be pruned and what kept, and why, for every weight. Changes nothing.

        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
        >>> for line in GradualPruning(sparsity=0.9).select(model, (torch.zeros(1, 1, 4, 4),)):
        ...     print(line.name, line.action, line.sparsity, line.reason, sep=" | ")
        0.weight | kept | 0.0 | first layer, a convolution; dense=() prunes it too
        2.weight | pruned | 0.9 | layers='*' names it
        3.weight | kept | 0.0 | output layer; dense=() prunes it too
        """
        return choose_layers(model, self, example_inputs)[1]
