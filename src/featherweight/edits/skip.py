# SPDX-License-Identifier: Apache-2.0
"""A block that does nothing: its first input is its output. Depth is cut by putting it in a residual block's place."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Skip", "skip", "skip_tuple"]


class Skip(nn.Module):
    """Gives back its first argument (by keyword: the first that is given), in a tuple of one where the block gave that.

    >>> Skip()(1, mask=None), Skip(in_tuple=True)(1)
    (1, (1,))
    """

    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        return (first,) if self.in_tuple else first


def skip(old: nn.Module) -> Skip:
    """For a block that answers with a tensor."""
    return Skip()


def skip_tuple(old: nn.Module) -> Skip:
    """For a block that answers with a tuple of one tensor."""
    return Skip(in_tuple=True)
