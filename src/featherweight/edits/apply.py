# SPDX-License-Identifier: Apache-2.0
"""`apply(model, edit)`: one small function for each kind of edit, found by the edit's class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from featherweight.edits.attribute import apply_attribute
from featherweight.edits.factor import apply_factor
from featherweight.edits.fake_quant import apply_fake_quant
from featherweight.edits.fold import apply_fold
from featherweight.edits.slice import apply_slice
from featherweight.edits.swap import apply_swap
from featherweight.edits.tie import apply_tie
from featherweight.errors import EditError
from featherweight.plan import Attribute, Edit, Factor, FakeQuant, Fold, Slice, Swap, Tie

__all__ = ["apply", "replay"]

_APPLY: dict[type[Edit], Callable[[nn.Module, Any], None]] = {
    Slice: apply_slice,
    Factor: apply_factor,
    Swap: apply_swap,
    Tie: apply_tie,
    FakeQuant: apply_fake_quant,
    Fold: apply_fold,
    Attribute: apply_attribute,
}


def apply(model: nn.Module, edit: Edit) -> None:
    """Changes the structure of your model in place as `edit` says. Values are carried over, never computed.

    Saves what the edit removes; `Factor`'s two new layers start at zero, for whoever decided to fill. Parameters that
    stay keep their identity, so ties and optimizers hold; an optimizer's momentum of a sliced parameter is the caller's
    to cut, and DistributedDataParallel, which remembers shapes, is to be wrapped around afterwards. No random number is
    drawn. Raises `EditError`, with the model left as it was, where the edit does not fit.

    >>> from featherweight.plan import Slice
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> for tensor, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
    ...     apply(model, Slice(tensor, axis, keep=(0, 2)))
    >>> model[0].out_features, model[2].in_features
    (2, 2)
    """
    if type(edit) not in _APPLY:
        raise EditError(f"{edit!r} is not an edit; the kinds are {', '.join(kind.__name__ for kind in _APPLY)}.")
    _APPLY[type(edit)](model, edit)


def replay(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Applies a plan's edits in order to your model, in place.

    Raises `EditError` that names the edit that does not fit; those before it have been carried out by then, so start
    again from a fresh model.

    >>> from featherweight.plan import Factor, Plan
    >>> model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    >>> replay(model, Plan((Factor("0", rank=2),)).edits)
    >>> [tuple(p.shape) for p in model.parameters()]
    [(2, 6), (6, 2), (6,)]
    """
    for i, edit in enumerate(edits):
        try:
            apply(model, edit)
        except EditError as error:
            raise EditError(f"edit {i} of the plan ({edit}): {error}") from error
