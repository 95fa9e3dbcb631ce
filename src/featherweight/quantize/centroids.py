# SPDX-License-Identifier: Apache-2.0
"""`TuneCentroids`: trains the few numbers that clustered weights share, by the gradient summed over each cluster.

A cluster has one number, so that its gradient is the sum of its members' (Deep Compression, arXiv 1510.00149, equation
3). Members get that sum before the optimizer steps: what is equal and moves equally stays equal, momentum and second
moments included, and any optimizer of torch trains numbers as if they were parameters of their own. No parametrization:
clusters are read from the values, as sparsity is from zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featherweight.errors import OptionError, check_strings, check_whole, check_word
from featherweight.quantize.members import look
from featherweight.quantize.tuning import Tuner

if TYPE_CHECKING:
    from featherweight.layers import Selected

__all__ = ["TuneCentroids"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneCentroids:
    """Trains your model's clustered weights in place, each cluster as one number; zeros stay zero.

    Saves nothing by itself: it wins back what `Cluster` lost, and the weights keep no more different values than they
    had. All other parameters train as ever. Which weights are clustered is read from their values: at most `most`
    different ones, and far fewer than weights. A weight on a grid of so many values is clustered too, and its values
    would leave the grid: keep it out by its name.

    - layers, keep: globs on qualified names of what is tuned.
    - share: `model` where equal values of different layers are one number (`Cluster(share="model")`), else `layer`.
    - most: a tensor with more different values is not clustered, but ordinary.

    The summed gradient is as large as its cluster: SGD wants a learning rate that is smaller by as much; Adam and its
    kind do not mind. `Train(clip=...)` clips before it is summed.

    >>> model = nn.Linear(8, 4)
    >>> model.weight.data = torch.tensor([-0.5, 0.0, 0.25, 0.25]).repeat(4, 2)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> tuner = TuneCentroids().attach(model, optimizer)
    >>> for step in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     facts = tuner.step()
    >>> tuner.finalize(), len(model.weight.unique()), int((model.weight == 0).sum())
    (Plan(edits=(), formats={}), 3, 8)
    """

    layers: Sequence[str] = ("*",)
    keep: Sequence[str] = ()
    share: str = "layer"
    most: int = 256

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("layers", "keep"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))
        check_word(me, "share", self.share, ("layer", "model"))
        check_whole(me, "most", self.most, least=2)
        if self.most >= 1 << 15:
            raise OptionError(f"{me}: most must be below {1 << 15}; got {self.most}.")

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        example_inputs: tuple[Any, ...] | None = None,
    ) -> Tuner:
        """Acts on your model from now on: before each `optimizer.step()` members of a cluster get its gradient.

        `model` may be compiled or wrapped in DistributedDataParallel; `optimizer` may be wrapped by accelerate. What
        the optimizer remembers of members is made equal. Gradients may be accumulated, clipped and scaled as ever.

        Raises `NothingToCompress` where no weight is clustered, `OptionError` without an optimizer.
        """
        return Tuner(self, model, optimizer)

    def select(self, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> tuple[Selected, ...]:
        """What would be tuned and what not, and why, for every weight. Changes nothing."""
        return look(model, self.layers, self.keep, self.most)[1]
