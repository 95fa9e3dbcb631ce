# SPDX-License-Identifier: Apache-2.0
"""The uncut model with what a plan cuts set to zero: what a cut has to answer like.

Read from the edits alone. The positions are zero everywhere, or only in a part: on the axes that layers contract (a
Linear's columns), on the others (its rows, biases, norms), or in all but biases and norms. Where channels are made in
one place and read in another, a plan that pairs them wrongly answers like no part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize, remove_weight_norm

from featherweight.edits.effective import find_effective, is_computed, value_of
from featherweight.edits.swap import apply_swap
from featherweight.errors import EditError
from featherweight.plan import Attribute, Edit, Slice, Swap

__all__ = ["Lost", "parts", "prepare", "zeros"]


@dataclass(frozen=True, eq=False)
class Lost:
    """What slices leave of one axis of one tensor of the uncut model, under the name that they use."""

    name: str
    tensor: Tensor
    axis: int
    kept: Tensor
    read: bool
    computed: bool

    @property
    def dropped(self) -> Tensor:
        gone = torch.ones(self.tensor.shape[self.axis], dtype=torch.bool, device=self.tensor.device)
        gone[self.kept] = False
        return gone.nonzero()[:, 0]


def prepare(model: nn.Module, edits: Iterable[Edit], read: Collection[tuple[str, int]] = ()) -> list[Lost]:
    """Carries out the swaps of a plan on your model, makes computed tensors that it slices plain ones, and says what
    its slices leave. `read` are axes that are contracted by other code than torch's own layers.

    Raises `EditError` for an edit that is neither a slice nor a swap nor an attribute.
    """
    lost: dict[tuple[int, int], Lost] = {}
    computed: set[str] = set()
    for edit in edits:
        if isinstance(edit, Swap):
            apply_swap(model, edit)
        elif isinstance(edit, Slice):
            module, leaf, _ = find_effective(model, edit.tensor)
            if is_computed(module, leaf):
                computed.add(edit.tensor)
                make_plain(module, leaf)
            module, leaf, tensor = find_effective(model, edit.tensor)
            key = (id(tensor), edit.axis)
            kept = lost[key].kept if key in lost else torch.arange(tensor.shape[edit.axis], device=tensor.device)
            lost[key] = Lost(
                edit.tensor,
                tensor,
                edit.axis,
                kept[torch.tensor(edit.keep, device=tensor.device)],
                (edit.tensor, edit.axis) in read or _contracts(module, leaf, edit.axis),
                edit.tensor in computed,
            )
        elif not isinstance(edit, Attribute):
            raise EditError(f"{edit} is no cut: only slices, swaps and attributes are proved.")
    return list(lost.values())


def parts(lost: Sequence[Lost]) -> dict[str, list[Lost]]:
    """Some of what is lost and not all of it, by what it is."""
    sides = {
        "where read": [one for one in lost if one.read],
        "where made": [one for one in lost if not one.read],
        "in weights": [one for one in lost if one.tensor.ndim > 1],
    }
    return {name: some for name, some in sides.items() if 0 < len(some) < len(lost)}


@contextlib.contextmanager
def zeros(chosen: Iterable[Lost]) -> Iterator[None]:
    """Their dropped positions are zero inside, and what they were again outside."""
    chosen = list(chosen)
    saved = {id(one.tensor): (one.tensor, one.tensor.data) for one in chosen}
    try:
        for tensor, data in saved.values():
            tensor.data = data.clone()
        for one in chosen:
            one.tensor.data.index_fill_(one.axis, one.dropped, 0)
        yield
    finally:
        for tensor, data in saved.values():
            tensor.data = data


def make_plain(module: nn.Module, leaf: str) -> None:
    """In place of torch's own `remove_parametrizations`, which edits the class that all copies of a module share."""
    if not parametrize.is_parametrized(module, leaf):
        value = value_of(module, leaf)
        remove_weight_norm(module, leaf)
        getattr(module, leaf).data = value
        return
    lists: Any = module.parametrizations
    values = {name: value_of(module, name) for name in lists}
    originals = {name: isinstance(next(iter(lists[name].parameters()), None), nn.Parameter) for name in lists}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        if originals[name]:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)


def _contracts(module: nn.Module, leaf: str, axis: int) -> bool:
    """Whether torch's own layer sums over that axis of its tensor."""
    if not leaf.startswith("weight"):
        return False
    if isinstance(module, _ConvNd):
        return axis == (0 if isinstance(module, _ConvTransposeNd) else 1)
    if isinstance(module, nn.Linear | nn.RNNBase | nn.RNNCellBase):
        return axis == 1
    return isinstance(module, nn.Bilinear) and axis > 0
