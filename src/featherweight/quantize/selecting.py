# SPDX-License-Identifier: Apache-2.0
"""What quantization-aware training covers, decided before anything is changed: weights, inputs, norms to fold, and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featherweight.edits import FakeQuantize, foldable
from featherweight.errors import DataError, NumericalError
from featherweight.layers import (
    Selected,
    Weight,
    is_named,
    keep_by_name,
    keep_by_rule,
    names_of,
    select,
    weights,
)
from featherweight.plan import Edit, FakeQuant
from featherweight.task import describe

if TYPE_CHECKING:
    from featherweight.quantize.qat import QAT

__all__ = ["Chosen", "bits_of", "choose"]

# Layers that are one product of their weight with their first input.
_PRODUCTS = ("linear", "conv", "transposed conv", "transposed linear")
_BETWEEN = (
    "additions, concatenations, pooling and outputs stay float here; export places their grids on the graph, from "
    "ranges recorded there"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """Weights with their bits, layers whose input has a grid (`new_grids` of which `edits` place), and what to say."""

    weights: tuple[tuple[Weight, int], ...]
    grids: tuple[str, ...]
    new_grids: tuple[str, ...]
    edits: tuple[Edit, ...]
    selection: tuple[Selected, ...]
    notes: tuple[str, ...]


def choose(model: nn.Module, options: QAT, example_inputs: tuple[Any, ...] | None) -> Chosen:
    """Changes nothing. Raises `NothingToCompress` for a glob that matches nothing, `NumericalError` for NaN in a weight."""
    found, left = weights(model)
    kept = dict(left)
    globs = list(options.bits) if isinstance(options.bits, Mapping) else ["*"]
    every = [name for weight in found for name in names_of(weight)] + list(left)
    for option, patterns in (("layers", options.layers), ("keep", options.keep), ("bits", globs)):
        if every:
            select(every, patterns, option=option)
    keep_by_name(found, options.layers, options.keep, {"bits": globs}, kept)
    if options.dense:
        keep_by_rule(model, found, options.dense, example_inputs, kept)
    for weight in found:
        if weight.name not in kept and (reason := _misfit(weight)):
            kept[weight.name] = reason
    chosen = [(weight, bits_of(weight, options.bits)) for weight in found if weight.name not in kept]
    folds, unfolded = _folds(model, options, example_inputs)
    grids, new, floating = _grids(model, options, [weight for weight, _ in chosen])
    edits: list[Edit] = [*folds, *new]
    notes = [*unfolded, *_coverage(options, grids, floating)]
    return Chosen(
        tuple(chosen),
        tuple(grids),
        tuple(edit.layer for edit in new),
        tuple(edits),
        tuple(_lines(model, found, left, kept, {w.name: bits for w, bits in chosen})),
        tuple(notes),
    )


def bits_of(weight: Weight, bits: int | Mapping[str, int]) -> int:
    """The bits of the last glob that names the weight."""
    if not isinstance(bits, Mapping):
        return bits
    return next(bits[glob] for glob in reversed(list(bits)) if is_named(weight, [glob]))


def _misfit(weight: Weight) -> str:
    values = weight.parameter.detach()
    if not values.numel():
        return "it is empty"
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).sum())
        raise NumericalError(
            f"{weight.name} has {bad} of {values.numel()} values that are NaN or infinite; nothing was changed. Start from "
            "a checkpoint before this."
        )
    if not bool(values.any()):
        return "all zeros, as adapters and zero-initialised branches start; a grid would hold it there"
    if getattr(weight.module, "sparse", False):
        return "its gradients are sparse (sparse=True), and a step learns from all of them"
    return ""


def _folds(
    model: nn.Module, options: QAT, example_inputs: tuple[Any, ...] | None
) -> tuple[list[Edit], Iterator[str] | list[str]]:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not options.fold or not norms:
        return [], []
    if example_inputs is None:
        text = (
            "BatchNorm was not folded: which layer each follows is seen in a forward. Give attach(..., example_inputs)."
        )
        return [], [text]
    try:
        folds, left = foldable(model, lambda: model(*example_inputs))
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise DataError(
            f"The model cannot be called with example_inputs {describe(example_inputs)}: {error}"
        ) from error
    return list(folds), [f"{name} was not folded: {reason}." for name, reason in left.items()]


def _grids(
    model: nn.Module, options: QAT, chosen: Sequence[Weight]
) -> tuple[list[str], list[FakeQuant], dict[str, str]]:
    """Layers whose first input is on a grid, the edits that place those that are not there yet, and what stays float."""
    if options.activation_bits is None:
        return [], [], {}
    modules = dict(model.named_modules())
    inside = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    grids: list[str] = []
    new: list[FakeQuant] = []
    floating: dict[str, str] = {}
    for weight in chosen:
        for name in names_of(weight):
            layer = name.rpartition(".")[0]
            module = modules[layer]
            there = getattr(module, "input_grid", None)
            if layer in grids or isinstance(module, nn.Embedding | nn.EmbeddingBag):
                continue
            if isinstance(there, FakeQuantize):
                if not getattr(there, "dynamic", False):
                    grids.append(layer)
            elif id(module) in inside or weight.kind == "attention":
                floating[layer] = "attention that torch fuses; apply Swap(layer, to='attention') first"
            elif weight.kind == "recurrent":
                floating[layer] = "recurrent: it reads its own states too"
            elif weight.kind == "bare" or not _is_product(module):
                floating[layer or type(model).__name__] = "it computes with its weight in code of its own"
            else:
                grids.append(layer)
                new.append(FakeQuant(layer, options.activation_bits, options.activation_symmetric))
    return grids, new, floating


def _is_product(module: nn.Module) -> bool:
    own = weights(module)[0]
    return any(weight.layer == "" and weight.kind in _PRODUCTS for weight in own)


def _coverage(options: QAT, grids: Sequence[str], floating: Mapping[str, str]) -> Iterator[str]:
    if options.activation_bits is None:
        yield "Weights alone are quantized; all activations stay float (activation_bits=8 trains with them too)."
        return
    what = "1 layer's input is" if len(grids) == 1 else f"{len(grids)} layers' inputs are"
    yield f"{what} on a grid while training; {_BETWEEN}."
    for layer, reason in list(floating.items())[:8]:
        yield f"{layer}: its input stays float ({reason}); its weights are quantized."
    if len(floating) > 8:
        yield f"... and the inputs of {len(floating) - 8} more layers like these."


def _lines(
    model: nn.Module,
    found: Sequence[Weight],
    left: Mapping[str, str],
    kept: Mapping[str, str],
    bits: Mapping[str, int],
) -> Iterator[Selected]:
    tensors = dict(model.named_parameters())
    for name in left:
        shape = () if isinstance(tensors[name], nn.parameter.UninitializedParameter) else tuple(tensors[name].shape)
        yield Selected(name, "computed", shape, torch.Size(shape).numel(), "kept", 0.0, left[name])
    for weight in found:
        shape, count = tuple(weight.parameter.shape), weight.parameter.numel()
        if weight.name in kept:
            yield Selected(weight.name, weight.kind, shape, count, "kept", 0.0, kept[weight.name])
        else:
            yield Selected(weight.name, weight.kind, shape, count, "quantized", 0.0, f"{bits[weight.name]} bits")
