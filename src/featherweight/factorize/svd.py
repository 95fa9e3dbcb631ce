# SPDX-License-Identifier: Apache-2.0
"""One linear layer as two by the truncated singular value decomposition: the best approximation of its rank.

W (out x in) = U S V^T is kept to its r largest singular values: down = sqrt(S) V^T (r x in), up = U sqrt(S) (out x r)
(Eckart and Young 1936). The choice of ranks from data comes with the factorization room proper.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from featherweight.edits import apply
from featherweight.errors import NumericalError, OptionError
from featherweight.layers import existing_grids, existing_zeros, select, tensors_and_ties
from featherweight.plan import Factor, Plan
from featherweight.task import Stage, Task

__all__ = ["Factorize"]


@dataclasses.dataclass(frozen=True)
class Factorize:
    """Splits each `torch.nn.Linear` that `layers` (globs) names at `rank`, by truncated SVD.

    Saves parameters, bytes and MACs everywhere, if rank < out * in / (out + in); a rank above that is an error, since
    it would make the model larger. Saves nothing in accuracy: fine-tune after. Raises `OptionError` for such a rank,
    for a layer that an earlier stage made sparse or put on a grid (either would be lost) and for one that is tied to
    another (the tie would be lost), `NothingToCompress` for a glob without a match.

    >>> task = Task(nn.Sequential(nn.Linear(20, 30)), (torch.zeros(1, 20),))
    >>> Factorize(rank=4)(task.model, task, Stage())
    Plan(edits=(Factor(layer='0', rank=4),), formats={})
    >>> sum(p.numel() for p in task.model.parameters())
    230
    """

    rank: int
    layers: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not isinstance(self.rank, int) or self.rank < 1:
            raise OptionError(f"factorize: rank must be a whole number from 1; got {self.rank!r}.")

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
        chosen = select(list(linear), self.layers)
        sparse = {weight.layer for weight, _ in existing_zeros(model)}
        on_grid = {weight.layer: grid.bits for weight, grid in existing_grids(model)}
        tied = {
            name: other
            for alias, first in tensors_and_ties(model)[1].items()
            for name, other in ((alias, first), (first, alias))
        }
        for name in chosen:
            rows, columns = linear[name].weight.shape
            if name in sparse:
                raise OptionError(
                    f"factorize: {name} is sparse and its zeros would be lost. Factorize before pruning, or leave it out."
                )
            if name in on_grid:
                raise OptionError(
                    f"factorize: {name} lies on a grid of {on_grid[name]} bits, which its factors would not. Factorize before "
                    "quantizing, or leave it out."
                )
            if f"{name}.weight" in tied:
                raise OptionError(
                    f"factorize: {name}.weight is one tensor with {tied[f'{name}.weight']}, which would go on alone. Leave it out."
                )
            if self.rank * (rows + columns) >= rows * columns:
                most = max(1, (rows * columns - 1) // (rows + columns))
                raise OptionError(
                    f"factorize: rank {self.rank} would make {name} ({rows} x {columns}) larger. Give at most {most}, or leave it out of layers."
                )
            if not torch.isfinite(linear[name].weight).all():
                raise NumericalError(f"factorize: {name} has NaN or infinite weights.")
        return Plan(tuple(self._split(model, name, linear[name]) for name in chosen))

    @torch.no_grad()
    def _split(self, model: nn.Module, name: str, layer: nn.Linear) -> Factor:
        u, s, vt = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        root = s[: self.rank].sqrt()
        edit = Factor(name, self.rank)
        apply(model, edit)
        pair = model.get_submodule(name)
        pair.get_parameter("0.weight").copy_(root[:, None] * vt[: self.rank])
        pair.get_parameter("1.weight").copy_(u[:, : self.rank] * root)
        return edit
