# SPDX-License-Identifier: Apache-2.0
"""What is removed first: a score for each weight, summed over the weights that go together. The lowest go first.

- magnitude: |w|; tiles, rows and columns by their sum, a neuron by the root of its summed squares.
- group_l2: the root of the summed squares of what goes together (for single weights |w| again).
- gradient: |w · g|, to first order how much the loss changes without w (Molchanov et al. 2017, arXiv 1611.06440).
- movement: -w · g, negative where training moves w towards zero (Sanh et al. 2020, arXiv 2005.07683, equation 4).
- random: seeded by step and name, so that a resumed run draws the same.
- a function `(name, weight) -> scores` of the weight's shape.

The two that need gradients sum over the steps since the last update of the masks. Scores are compared as they are:
with `ranking="global"` a layer of large weights keeps more of them, and one with long rows keeps more rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featherweight.errors import NumericalError, OptionError
from featherweight.patterns import Pattern
from featherweight.task import describe

__all__ = ["GRADIENT_BASED", "IMPORTANCES", "Importance", "add_gradient", "entry_scores", "unit_scores"]

Importance = Callable[[str, Tensor], Tensor]
IMPORTANCES = ("magnitude", "group_l2", "gradient", "movement", "random")
GRADIENT_BASED = ("gradient", "movement")


def add_gradient(total: Tensor, weight: Tensor, gradient: Tensor, importance: str) -> None:
    """Adds one step's |w · g| or -w · g to `total`, in place; entries that are not finite count as zero."""
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    product = (weight.to(total.dtype) * gradient.to(total.dtype)).nan_to_num_(0.0, 0.0, 0.0)
    if importance == "gradient":
        total.add_(product.abs_())
    else:
        total.sub_(product)


def entry_scores(
    name: str,
    weight: Tensor,
    importance: str | Importance,
    pattern: Pattern,
    gathered: Mapping[str, Tensor],
    seed: int,
    step: int,
) -> Tensor:
    """A score for each entry of a weight, in float32 or wider, to be summed over units by `unit_scores`.

    `gathered` holds the sums of `add_gradient` by name. Raises `OptionError` where a function of the user's gives
    scores of another shape, `NumericalError` where it gives NaN or minus infinity.
    """
    if callable(importance):
        return _users_scores(name, weight, importance)
    if importance in GRADIENT_BASED:
        return gathered[name]
    if importance == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}/{name}".encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    # Half-precision squares underflow, and their sums round.
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return wide.square() if _squares(importance, pattern) else wide.abs()


def unit_scores(entries: Tensor) -> Tensor:
    """The score of each unit from those of its entries, (units, entries in each) -> (units,).

    Of summed squares no root is taken: it would change no order, neither within a layer nor between layers.
    """
    return entries[:, 0] if entries.shape[1] == 1 else entries.sum(1)


def _squares(importance: str | Importance, pattern: Pattern) -> bool:
    return importance == "group_l2" or (importance == "magnitude" and pattern.kind == "neuron")


def _users_scores(name: str, weight: Tensor, importance: Importance) -> Tensor:
    with torch.no_grad():
        scores = importance(name, weight)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        raise OptionError(
            f"importance gave {describe(scores)} for {name}; it must give a score for each entry, "
            f"Tensor{list(weight.shape)}. Entries with the lowest scores are pruned first."
        )
    scores = scores.detach().to(weight.device, torch.promote_types(scores.dtype, torch.float32))
    if not bool((scores > -torch.inf).all()):
        raise NumericalError(
            f"importance gave NaN or minus infinity for {name}, which cannot be ranked. +inf marks what must stay."
        )
    return scores
