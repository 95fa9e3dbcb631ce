# SPDX-License-Identifier: Apache-2.0
"""`apply(model, edit)`: one small function for each kind of edit, found by the edit's class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from featherweight.edits.factor import apply_factor
from featherweight.edits.fake_quant import apply_fake_quant
from featherweight.edits.slice import apply_slice
from featherweight.edits.swap import apply_swap
from featherweight.edits.tie import apply_tie
from featherweight.errors import EditError
from featherweight.plan import Edit, Factor, FakeQuant, Slice, Swap, Tie

__all__ = ["apply", "replay"]

_APPLY: dict[type[Edit], Callable[[nn.Module, Any], None]] = {
    Slice: apply_slice,
    Factor: apply_factor,
    Swap: apply_swap,
    Tie: apply_tie,
    FakeQuant: apply_fake_quant,
}


def apply(model: nn.Module, edit: Edit) -> None:
    """Changes the structure of your model in place as `edit` says. Values are carried over, never computed.

    Saves what the edit removes; `Factor`'s two new layers start at zero, for whoever decided to fill. Parameters that
    stay keep their identity, so ties and optimizers hold. Raises `EditError`, with the model left as it was, where
    the edit does not fit.

    >>> from featherweight.plan import Slice
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> for tensor, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
    ...     apply(model, Slice(tensor, axis, keep=(0, 2)))
    >>> model[0].out_features, model[2].in_features
    (2, 2)
    """
    _APPLY[type(edit)](model, edit)


def replay(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Applies a plan's edits in order to your model, in place. The error names the edit that did not fit."""
    for i, edit in enumerate(edits):
        try:
            apply(model, edit)
        except EditError as error:
            raise EditError(f"edit {i} of the plan ({edit}): {error}") from error
