# SPDX-License-Identifier: Apache-2.0
"""How many bits hold a model's numbers, read from its values: of each weight, and of the grids on what layers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.grids.grid import MOST_BITS
from featherweight.layers import Weight, existing_grids, unwrap, weights

__all__ = ["Products", "input_bits", "stored_bits"]

_SAMPLE = 4096  # entries that are looked at first: ordinary floats are told by them


def stored_bits(model: nn.Module, formats: Mapping[str, str] | None = None) -> list[tuple[Weight, int]]:
    """Every weight with the bits that each of its numbers takes: those of its grid, of half precision, of its type.

    `formats` are a plan's hints; a codebook that they name counts by its indices, if the weight has no more values.

    >>> layer = nn.Linear(8, 2)
    >>> _ = layer.weight.data.copy_(torch.arange(-8, 8).view(2, 8) * 0.1)
    >>> [(weight.name, bits) for weight, bits in stored_bits(layer)]
    [('weight', 4)]
    """
    exact = _computed_bits(model, formats)
    found = []
    for weight in weights(unwrap(model))[0]:
        entries = _entries((formats or {}).get(weight.name, ""))
        bits = exact.get(weight.name, 8 * weight.parameter.element_size())
        if (
            entries
            and max(1, (entries - 1).bit_length()) < bits
            and len(torch.unique(weight.parameter.detach())) <= entries
        ):
            bits = max(1, (entries - 1).bit_length())
        found.append((weight, bits))
    return found


def _computed_bits(model: nn.Module, formats: Mapping[str, str] | None) -> dict[str, int]:
    """By name: the bits of weights that are computed with in fewer than their type has."""
    halves = {weight.name: 16 for weight in weights(unwrap(model))[0] if _half(weight.parameter.detach())}
    return halves | {weight.name: grid.bits for weight, grid in existing_grids(model, formats, most_bits=MOST_BITS)}


def _half(values: Tensor) -> bool:
    """Whether float32 values are those of a half precision; not said of a weight of one magnitude, which starts so."""
    if values.dtype != torch.float32 or not values.numel():
        return False
    flat = values.reshape(-1)
    for part in (flat[:_SAMPLE], flat):
        if not any(bool((part.to(kind).float() == part).all()) for kind in (torch.float16, torch.bfloat16)):
            return False
    return not bool(((flat.abs() == flat.abs().amax()) | (flat == 0)).all())


def _entries(hint: str) -> int:
    """How many entries a codebook has that a hint names: `codebook:16`, `entropy:codebook:16:huffman`."""
    kind, *rest = hint.removeprefix("entropy:").split(":")
    return int(rest[0]) if kind == "codebook" and rest and rest[0].isdigit() else 0


def input_bits(model: nn.Module) -> int | None:
    """The fewest bits of a grid on what a layer reads (an edit `fake_quant`), None where there is none."""
    return min((grid.bits for grid in map(_grid, model.modules()) if grid is not None), default=None)


def _grid(module: nn.Module) -> Any:
    """What rounds a layer's first input: known by its name and by its bits, so that no room of edits is asked."""
    grid = getattr(module, "input_grid", None)
    return grid if isinstance(getattr(grid, "bits", None), int) else None


class Products:
    """The bits of the two factors of a product, while a copy of the model runs that shares its parameters."""

    def __init__(self, model: nn.Module, formats: Mapping[str, str] | None = None) -> None:
        bits = _computed_bits(model, formats)
        self._weights: dict[int, list[tuple[int, int, int]]] = {}
        for weight in weights(unwrap(model))[0]:
            if weight.name in bits:
                start = int(weight.parameter.storage_offset())
                place = (start, start + weight.parameter.numel(), bits[weight.name])
                self._weights.setdefault(_address(weight.parameter), []).append(place)
        self._inputs = {
            name: (grid.bits, _states(module)) for name, module in model.named_modules() if (grid := _grid(module))
        }

    def weight(self, tensor: Tensor) -> int:
        """Of a factor: the grid's where it is (a view of) a weight on one, else those of its type."""
        own = 8 * tensor.element_size()
        for start, stop, bits in self._weights.get(_address(tensor), ()):
            if start <= tensor.storage_offset() < stop:
                return min(own, bits)
        return own

    def input(self, layer: str, weight: Tensor) -> int:
        """Of what a layer multiplies with this weight: its input grid's, else 32. Recurrent states have none."""
        bits, states = self._inputs.get(layer, (32, frozenset()))
        return 32 if (_address(weight), weight.storage_offset()) in states else bits


def _states(module: nn.Module) -> frozenset[Any]:
    """Weights of a recurrent layer that read what it made itself: its own state, or the layer below."""
    if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return frozenset()
    return frozenset(
        (_address(parameter), parameter.storage_offset())
        for name, parameter in module.named_parameters(recurse=False)
        if name.removesuffix("_reverse") not in ("weight_ih", "weight_ih_l0")
    )


def _address(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
