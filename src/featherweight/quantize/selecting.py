# SPDX-License-Identifier: Apache-2.0
"""Which weights quantization-aware training covers, by globs and rules as everywhere, and which it leaves and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from featherweight.errors import NumericalError
from featherweight.layers import (
    Selected,
    Weight,
    check_globs,
    keep_by_name,
    keep_by_rule,
    last_match,
    selected,
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
    check_globs(found, left, {"layers": options.layers, "keep": options.keep, "bits": globs})
    keep_by_name(found, options.layers, options.keep, {"bits": globs}, kept)
    if options.dense:
        keep_by_rule(model, found, options.dense, example_inputs, kept)
    for weight in found:
        if weight.name not in kept and (reason := _misfit(weight)):
            kept[weight.name] = reason
    chosen = tuple((weight, last_match(weight, options.bits)) for weight in found if weight.name not in kept)
    told = {weight.name: ("quantized", 0.0, f"{bits} bits") for weight, bits in chosen}
    return chosen, tuple(selected(model, found, kept, lambda weight: told[weight.name]))


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
