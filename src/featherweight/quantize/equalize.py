# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: layers in a row share out their range, so that no channel is lost on a coarse grid.

"Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel, van Baalen, Blankevoort and Welling
2019, arXiv 1906.04721, equations 9 to 11): channel i of one layer is divided by s_i = √(r1_i / r2_i) and multiplied
again in the next, r being the largest magnitude of the row and of the column; pair after pair until nothing moves. Rows
with scales of their own gain little from it; activations, which share one, gain where channels differ by much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featherweight.quantize.links import Link, column_peaks, row_peaks, scale

__all__ = ["equalize", "factors_of"]

_SWEEPS = 40
_STILL = 1e-3


def factors_of(rows: Tensor, columns: Tensor) -> Tensor:
    """s = √(r1 / r2) by channel (equation 11); 1 where either is zero, as nothing is then to be shared out.

    >>> factors_of(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0]))
    tensor([2., 1.])
    """
    even = (rows > 0) & (columns > 0)
    return torch.where(even, (rows / torch.where(even, columns, 1.0)).sqrt(), 1.0)


def equalize(model: nn.Module, links: Sequence[Link]) -> float:
    """Equalizes your model along links from layer to layer, in place; its answers stay, to rounding.

    Returns the largest factor, or one over it, by which any channel was scaled in all.

    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[16.0], [1.0]])), model[2].weight.copy_(torch.tensor([[1.0, 4.0]]))
    >>> round(equalize(model, [Link("0", ("2",))]), 3)
    4.0
    >>> model[0].weight.flatten().tolist(), model[2].weight.flatten().tolist()
    ([4.0, 2.0], [4.0, 2.0])
    """
    total: dict[str, Tensor] = {}
    for _ in range(_SWEEPS):
        moved = 0.0
        for link in links:
            rows = row_peaks(model, link)
            factors = factors_of(rows, column_peaks(model, link, len(rows)).to(rows.device))
            if float(factors.log().abs().amax()) <= _STILL:
                continue
            if scale(model, link, factors):
                moved = max(moved, float(factors.log().abs().amax()))
                total[link.source] = total.get(link.source, torch.ones_like(factors)) * factors
        if moved <= _STILL:
            break
    return max((float(factors.log().abs().amax().exp()) for factors in total.values()), default=1.0)
