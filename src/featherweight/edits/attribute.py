# SPDX-License-Identifier: Apache-2.0
"""`attribute`: a size that a module keeps as a plain number, set to another. Saves nothing by itself.

Most sizes follow from tensors, and `slice` sets them. What is left is what Python code carries along: the number of
heads in a `view`, the widths in a `split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from featherweight.edits.find import find_module
from featherweight.errors import EditError, nearest
from featherweight.plan import Attribute

__all__ = ["apply_attribute", "is_sizes"]


def apply_attribute(model: nn.Module, edit: Attribute) -> None:
    """Sets an attribute that is there, and keeps its type: a whole number, or a tuple, list or torch.Size of them."""
    layer = find_module(model, edit.layer)
    me = edit.layer or "the model"
    known = {name: value for name, value in vars(layer).items() if is_sizes(value)}
    if edit.name not in known:
        if edit.name in vars(layer):
            raise EditError(f"{me}.{edit.name} is a {type(vars(layer)[edit.name]).__name__}, not a size.")
        close = ", ".join(nearest(edit.name, known)) or "none"
        raise EditError(f"{me} has no size {edit.name!r} of its own. Nearest: {close}.")
    setattr(layer, edit.name, _alike(known[edit.name], edit.value, f"{me}.{edit.name}"))


def is_sizes(value: Any) -> bool:
    """A whole number, or some in a tuple, list or torch.Size.

    >>> is_sizes(8), is_sizes((2, 4)), is_sizes(True), is_sizes(())
    (True, True, False, False)
    """
    if type(value) in (tuple, list, torch.Size):
        return len(value) > 0 and all(type(item) is int for item in value)
    return type(value) is int


def _alike(old: int | Sequence[int], value: int | tuple[int, ...], me: str) -> int | Sequence[int]:
    if isinstance(old, int) or isinstance(value, int):
        if isinstance(old, int) and type(value) is int:
            return value
        raise EditError(f"{me} is {old!r}; it cannot become {value!r}, which is of another type.")
    if len(old) != len(value) or not is_sizes(value):
        raise EditError(f"{me} is {tuple(old)!r}; it takes {len(old)} whole numbers, not {value!r}.")
    return type(old)(value)  # type: ignore[call-arg]
