# SPDX-License-Identifier: Apache-2.0
"""Grids for what layers read, from calibration data: one pass that looks, in constant memory, then the edits.

The first input of every chosen layer is watched. Padding that a batch's `attention_mask` marks does not count. Ranges
are taken of the model as it is by then, weights rounded: what a layer will read, not what it once read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featherweight.edits import FakeQuantize, Saturated, apply, saturation
from featherweight.errors import NumericalError
from featherweight.layers import numbered
from featherweight.layers.calls import mask_of, quiet
from featherweight.layers.inputs import Call
from featherweight.plan import FakeQuant
from featherweight.quantize.observers import Histogram, Range, grid_of, range_of

__all__ = ["Activations", "observe", "place", "saturated"]

Forward = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Activations:
    """How activations are rounded: `static` grids from observed ranges, or `dynamic` ones of each call."""

    mode: str
    bits: int = 8
    symmetric: bool = False
    observer: str = "minmax"
    percentile: float = 99.99


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], forward: Forward
) -> dict[str, Histogram]:
    """What each layer's first input looks like over all batches; layers that no batch reached are left out.

    Your model runs in evaluation mode and is left as it was. Raises `NumericalError`, naming layer and batch, for
    activations that are NaN or infinite.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> import torch
    >>> seen = observe(model, {"0": model[0]}, [torch.tensor([[-1.0, 5.0]])], lambda model, batch: model(batch))
    >>> seen["0"].low, seen["0"].high
    (-1.0, 5.0)
    """
    found: dict[str, Histogram] = {}
    at: dict[str, Any] = {"batch": 0, "mask": None}

    def watching(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = _first(module, args, kwargs)
            mask = at["mask"]
            if mask is not None and read.ndim > 2 and read.shape[:2] == mask.shape:
                read = read[mask.to(read.device)]
            if not found.setdefault(name, Histogram()).add(read):
                raise NumericalError(
                    f"{name or 'The model'} reads NaN or infinity in batch {at['batch']} of the calibration data, so that its "
                    "activations have no range. Nothing was changed. Look at that batch and at the layers before this one."
                )

        return hook

    handles = [layer.register_forward_pre_hook(watching(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with quiet(model):
            for number, batch in numbered(batches):
                at.update(batch=number, mask=mask_of(batch))
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: histogram for name, histogram in found.items() if histogram.seen}


def _first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    read = Call(module, args, kwargs, None).argument(0, "input")
    return read.data if isinstance(read, PackedSequence) else read


def place(model: nn.Module, name: str, how: Activations, seen: Histogram | None) -> tuple[FakeQuant, Range]:
    """Puts a grid on the input of your model's layer, with the range that was seen; returns the edit and the range."""
    edit = FakeQuant(name, how.bits, how.symmetric, dynamic=how.mode == "dynamic")
    apply(model, edit)
    if seen is None:
        return edit, Range(0.0, 0.0)
    within = range_of(seen, how.observer, how.bits, how.symmetric, how.percentile)
    scale, zero_point = grid_of(within, how.bits, how.symmetric)
    grid = model.get_submodule(f"{name}.input_grid" if name else "input_grid")
    if isinstance(grid, FakeQuantize):
        grid.scale.fill_(scale)
        grid.zero_point.fill_(zero_point)
    return edit, within


def saturated(model: nn.Module, batches: Iterable[Any], forward: Forward) -> dict[str, Saturated]:
    """By layer, how much of what it reads in these batches is outside the range of its grid."""
    with saturation(model) as counts, quiet(model):
        for batch in batches:
            forward(model, batch)
    return counts
