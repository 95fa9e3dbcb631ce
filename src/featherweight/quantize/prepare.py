# SPDX-License-Identifier: Apache-2.0
"""Structure before rounding: BatchNorm folded, torch's attention opened, so that each product is a layer of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from featherweight.edits import apply, fold_factors, foldable
from featherweight.edits.effective import reshape_in_place
from featherweight.errors import DataError, EditError
from featherweight.layers import Weight
from featherweight.plan import Edit, Fold, Swap
from featherweight.quantize.chosen import Chosen
from featherweight.quantize.rounding import Rounding, on_grid, scale_rows
from featherweight.task import describe

__all__ = ["fold_norms", "folds_of", "open_attention"]


def open_attention(model: nn.Module, chosen: Chosen) -> tuple[list[Edit], dict[str, str], list[str]]:
    """Swaps each MultiheadAttention with a weight to round for four linear layers, in your model.

    Returns the edits, the new names of weights with those that they had, and what could not be done.
    """
    edits: list[Edit] = []
    renamed: dict[str, str] = {}
    notes: list[str] = []
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        if type(module) is not nn.MultiheadAttention or not any(w.startswith(prefix) for w in chosen.roundings):
            continue
        fused = module.in_proj_weight is not None
        edit = Swap(name, to="attention")
        try:
            apply(model, edit)
        except EditError as error:
            notes.append(f"What {name or 'the attention'} reads stays float: {error}")
            continue
        edits.append(edit)
        for part in "qkv":
            renamed[f"{prefix}{part}.weight"] = prefix + ("in_proj_weight" if fused else f"{part}_proj_weight")
        renamed[f"{prefix}out.weight"] = f"{prefix}out_proj.weight"
    return edits, renamed, notes


def fold_norms(model: nn.Module, example_inputs: tuple[Any, ...], chosen: Chosen) -> tuple[list[Edit], list[str]]:
    """Folds each BatchNorm that alone reads a layer whose weight is to be rounded into it, in your model.

    A weight that lies on a grid stays on one: its scales are multiplied. Returns the edits and what stayed, and why.
    """
    folds, left = folds_of(model, example_inputs)
    by_layer = {weight.layer: (weight, how) for weight, how in chosen.weights(model)}
    wanted = [edit for edit in folds if edit.layer in by_layer]
    for edit in wanted:
        _fold(model, edit, *by_layer[edit.layer])
    few = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5]) + (" ..." if len(left) > 5 else "")
    notes = [f"{len(left)} BatchNorm layer{'s' * (len(left) > 1)} not folded: {few}."] if left else []
    return list(wanted), notes


def folds_of(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[tuple[Fold, ...], dict[str, str]]:
    """`foldable` by one forward of `example_inputs`. Changes nothing. Raises `DataError` if the model refuses them."""
    try:
        return foldable(model, lambda: model(*example_inputs))
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise DataError(
            f"The model cannot be called with example_inputs {describe(example_inputs)}: {error}"
        ) from error


def _fold(model: nn.Module, edit: Fold, weight: Weight, how: Rounding) -> None:
    before = weight.parameter.detach().clone()
    grid = on_grid(weight, how)
    factor, _ = fold_factors(weight.module, model.get_submodule(edit.norm))
    apply(model, edit)
    if grid is not None:
        with torch.no_grad():
            reshape_in_place(weight.parameter, before)
        scale_rows(weight, grid, factor)
