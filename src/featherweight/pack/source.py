# SPDX-License-Identifier: Apache-2.0
"""What a codec is told of a tensor before it says how many bytes it would need. All are read from the values."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from featherweight.pack.narrow import narrowest
from featherweight.pack.words import Spec, Words, words

__all__ = ["Source", "look"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor's words with two facts: how many are not zero, and the narrowest type that holds them all exactly."""

    spec: Spec
    words: Words
    nonzeros: int
    stored: torch.dtype

    @property
    def width(self) -> int:
        """Bytes of one stored value, the v of the size formulas."""
        return min(self.stored.itemsize, 8)


def look(tensor: Tensor) -> Source:
    """Reads the facts of a tensor; a copy only where it is not contiguous or not on the CPU.

    >>> source = look(torch.tensor([0.0, 1.5, -0.0]))
    >>> source.nonzeros, source.stored
    (2, torch.float16)
    """
    flat = words(tensor)
    spec = Spec(tuple(tensor.shape), tensor.dtype)
    return Source(spec, flat, int(np.count_nonzero(flat)), narrowest(flat, tensor.dtype))
