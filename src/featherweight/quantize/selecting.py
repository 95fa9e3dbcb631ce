# SPDX-License-Identifier: Apache-2.0
"""Which weights quantization-aware training covers, by the same globs and rules as everywhere, and which it leaves and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featherweight.errors import NumericalError
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

if TYPE_CHECKING:
    from featherweight.quantize.qat import QAT

__all__ = ["Bits", "choose_weights"]

Bits = tuple[tuple[Weight, int], ...]


def choose_weights(
    model: nn.Module, options: QAT, example_inputs: tuple[Any, ...] | None
) -> tuple[Bits, tuple[Selected, ...]]:
    """The weights with their bits, and a line for every weight of the model. Changes nothing.

    Raises `NothingToCompress` for a glob that matches nothing, `NumericalError` for NaN in a weight."""
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
    chosen = tuple((weight, _bits_of(weight, options.bits)) for weight in found if weight.name not in kept)
    return chosen, tuple(_lines(model, found, left, kept, {w.name: bits for w, bits in chosen}))


def _bits_of(weight: Weight, bits: int | Mapping[str, int]) -> int:
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
