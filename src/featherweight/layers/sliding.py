# SPDX-License-Identifier: Apache-2.0
"""X Xᵀ of a kernel that slides by single steps along a long axis, from its first tap and its two ends.

Two taps, t and t', one further, read the same products but for those at the ends of the axis of P positions:

    H[t + 1, t' + 1] = H[t, t'] + x[P + t] x[P + t']ᵀ - x[t] x[t']ᵀ    (0 <= t, t' <= k - 2)

So the first tap is multiplied with all k, the ends of P + k - 1 inputs with themselves, and the rest is additions in
float64: 2 / k + 2 / P of the multiply-adds. A 3 x 3 kernel gains nothing; 64 taps over 128 positions take a twentieth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor

from featherweight.layers.inputs import Input
from featherweight.layers.products import Products

__all__ = ["Slides", "sliding_axis"]

_MOST_SHARE = 0.5
_LEAST_COLUMNS = 256


def sliding_axis(read: Input, d: int) -> int | None:
    """The kernel's longest axis, if a patch of `d` numbers is so long, and moves along it so, that sliding pays."""
    if not read.kernel or read.flipped or d < _LEAST_COLUMNS:
        return None
    axis = max(range(len(read.kernel)), key=read.kernel.__getitem__)
    if read.stride[axis] != 1 or read.dilation[axis] != 1:
        return None
    return axis if 2 / read.kernel[axis] + 2 / read.positions[axis] <= _MOST_SHARE else None


class Slides:
    """Σ X Xᵀ over patches of calls whose kernel slides along `axis`: feed `ends` each call once, `add` its patches."""

    def __init__(self, read: Input, axis: int) -> None:
        self.axis = axis
        # Columns are (taps of axes before, taps of this one, taps of axes after and channels).
        self._before, self._taps = prod(read.kernel[:axis]), read.kernel[axis]
        self._first, self._enter, self._leave = Products(), Products(), Products()
        self._most: Tensor | None = None  # (groups, d) the largest of each input, by size

    def add(self, X: Tensor) -> None:
        """Some patches (groups, tokens, d) of a call."""
        first = X.view(*X.shape[:2], self._before, self._taps, -1)[:, :, :, 0].flatten(2)
        self._first.add(first, X)

    def ends(self, read: Input, groups: Sequence[int], channels: slice | None, most: int) -> None:
        """What enters and what leaves the window at both ends of a call's input; `most` is as for `Input.patches`."""
        kernel = tuple(k - (i == self.axis) for i, k in enumerate(read.kernel))
        for products, start in ((self._enter, read.positions[self.axis]), (self._leave, 0)):
            x = read.x.narrow(2 + self.axis, start, self._taps - 1)
            for X in dataclasses.replace(read, x=x, kernel=kernel).patches(groups, channels, most):
                products.add(X)
        largest = dataclasses.replace(read, x=read.x.abs().amax(0, keepdim=True))
        for X in largest.patches(groups, channels, most):
            here = X.amax(1)
            self._most = here if self._most is None else torch.maximum(self._most, here)

    def total(self) -> Tensor | None:
        """(groups, d, d) in float64, symmetric, or None if nothing was added. Call it once, at the end."""
        if self._most is None:
            return None
        first, gain = (cast(Tensor, part.total()) for part in (self._first, self._enter))
        gain -= cast(Tensor, self._leave.total())
        b, k = self._before, self._taps
        groups, _, d = first.shape
        s = d // (b * k)
        found = first.new_empty(groups, b, k, s, b, k, s)
        row = first.view(groups, b, s, b, k, s)
        row[:, :, :, :, 0] = (row[:, :, :, :, 0] + row[:, :, :, :, 0].permute(0, 3, 4, 1, 2)) / 2
        found[:, :, 0] = row
        found[:, :, :, :, :, 0] = row.permute(0, 3, 4, 5, 1, 2)
        gain = gain.view(groups, b, k - 1, s, b, k - 1, s)
        for t in range(1, k):
            torch.add(found[:, :, t - 1, :, :, :-1], gain[:, :, t - 1], out=found[:, :, t, :, :, 1:])
        total = found.view(groups, d, d)
        # What was never active is zero, and not what rounding leaves of a difference.
        dead = self._most == 0
        return total.masked_fill_(dead[:, :, None], 0.0).masked_fill_(dead[:, None], 0.0)
