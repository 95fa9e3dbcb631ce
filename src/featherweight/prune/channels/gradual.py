# SPDX-License-Identifier: Apache-2.0
"""Channels, neurons and heads cut while the network trains (Comb, Prune, Distill, arXiv 2408.03046).

It is a hook: training, and distillation beside it, goes on meanwhile. It costs one product of weights and gradients an
iteration, and what it saves is real: fewer channels, in every runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import OptionError
from featherweight.graph import Trace
from featherweight.prune.channels.options import ChannelOptions
from featherweight.prune.channels.pruner import ChannelPruner
from featherweight.prune.schedule import check_schedule

__all__ = ["GradualChannelPruning"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradualChannelPruning(ChannelOptions):
    """Cuts channels and heads of your model while it trains: masked from `begin` to `end`, cut out by `finalize()`.

    Saves parameters, MACs, memory and time in every runtime. Scores are summed between updates; every `every` optimizer
    steps those that are lowest per cost go, as many as the schedule asks for (cubic, linear, constant, one_shot, as in
    `GradualPruning`), until at `end` all of `until` is met. What is masked is zero, gets no gradient and no momentum,
    and never comes back; it goes on training until `finalize()` cuts it out, of the optimizer's state too. `closure` (a
    function of the model to the loss of a batch) is for curvature; `verify` proves the cut on `example_inputs`.

    List it last among the hooks of `Train`: the shapes change as it is finalized. Raises `OptionError` for an option
    out of range.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    >>> hook = GradualChannelPruning({"macs": "50 %"}, end=20, every=5)
    >>> pruner = hook.attach(model, optimizer, (torch.randn(4, 8),))
    >>> for step in range(30):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     facts = pruner.step()
    >>> facts["channels"]
    0.5
    >>> plan = pruner.finalize()
    >>> model[0], optimizer.state[model[0].weight]["momentum_buffer"].shape
    (Linear(in_features=8, out_features=16, bias=True), torch.Size([16, 8]))
    """

    begin: int = 0
    end: int = 2000
    every: int = 20
    schedule: str = "linear"
    closure: Callable[[nn.Module], Tensor] | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        me = type(self).__name__
        object.__setattr__(self, "end", check_schedule(me, self.schedule, self.begin, self.end, self.every))
        if self.importance == "structured_obs":
            raise OptionError(f"{me}: importance='structured_obs' is for after training; PruneChannels has it.")
        if self.closure is not None and not callable(self.closure):
            raise OptionError(f"{me}: closure is a function of the model that gives a loss; got {self.closure!r}.")

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        example_inputs: Any = None,
        *,
        trace: Trace | None = None,
        follow: Sequence[Any] = (),
    ) -> ChannelPruner:
        """Acts on your model from now on. `example_inputs` are of one forward call, a tuple or a dict by keyword.

        `model` may be compiled or wrapped in DistributedDataParallel (wrap it again after `finalize`); `optimizer` may
        be wrapped by accelerate. `trace` saves tracing again; `follow` are copies of the model that are to be cut
        alike, an exponential average say.

        Raises `NothingToCompress` where no group may be cut, `GraphError` for a model that cannot be traced,
        `OptionError` where options do not fit the model.
        """
        return ChannelPruner(self, model, optimizer, example_inputs, trace, follow)
