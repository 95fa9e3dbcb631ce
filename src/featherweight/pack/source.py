# SPDX-License-Identifier: Apache-2.0
"""What a codec is told of a tensor before it says how many bytes it would need. All are read from the values."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from featherweight.pack.narrow import narrowest
from featherweight.pack.words import Spec, Words, words

if TYPE_CHECKING:
    from featherweight.pack.symbols import Symbols

__all__ = ["Source", "look"]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A tensor's words with two facts: how many are not zero, and the narrowest type that holds them all exactly.

    `hint` is what a method said of it, as ("int", "4", "128"): where to look first, never what to believe.
    """

    spec: Spec
    words: Words
    nonzeros: int
    stored: torch.dtype
    hint: tuple[str, ...] = ()
    kept: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """What was encoded to learn its size, until it is written."""

    @functools.cached_property
    def symbols(self) -> tuple[Symbols, ...]:
        """The tensor as small integers, in the ways that it can be seen so; found once, for all codecs that ask."""
        from featherweight.pack.symbols import read_symbols

        return tuple(read_symbols(self))

    @property
    def width(self) -> int:
        """Bytes of one stored value, the v of the size formulas."""
        return min(self.stored.itemsize, 8)


def look(tensor: Tensor, hint: str = "") -> Source:
    """Reads the facts of a tensor; a copy only where it is not contiguous or not on the CPU.

    >>> source = look(torch.tensor([0.0, 1.5, -0.0]))
    >>> source.nonzeros, source.stored
    (2, torch.float16)
    """
    flat = words(tensor)
    spec = Spec(tuple(tensor.shape), tensor.dtype)
    return Source(spec, flat, int(np.count_nonzero(flat)), narrowest(flat, tensor.dtype), tuple(hint.split(":")))
