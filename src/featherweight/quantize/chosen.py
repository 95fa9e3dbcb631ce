# SPDX-License-Identifier: Apache-2.0
"""Which weights are rounded, to what, and which layers get a grid on what they read; and why the others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from featherweight.layers import (
    Selected,
    Weight,
    check_globs,
    keep_by_name,
    keep_by_rule,
    last_match,
    names_of,
    selected,
    weights,
)
from featherweight.quantize.rounding import Rounded, Rounding

if TYPE_CHECKING:
    from featherweight.quantize.method import Quantize

__all__ = ["Chosen", "choose", "reading_layers"]

_DYNAMIC = ("linear", "transposed linear", "recurrent")


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """A line for every weight of the model as it was given, and by name to what weights are to be rounded.

    `sources` are the names that weights had before the model's structure changed.
    """

    lines: tuple[Selected, ...]
    roundings: Mapping[str, Rounding]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def weights(self, model: nn.Module) -> list[tuple[Weight, Rounding]]:
        """The weights to round in this model, or in a copy of it."""
        return [(w, self.roundings[w.name]) for w in weights(model)[0] if w.name in self.roundings]

    def renamed(self, model: nn.Module, names: Mapping[str, str]) -> Chosen:
        """The same choice for a model in which some weights have other names: new name -> the one it had."""
        if not names:
            return self
        old = {weight.name: names.get(weight.name, weight.name) for weight in weights(model)[0]}
        roundings = {name: self.roundings[before] for name, before in old.items() if before in self.roundings}
        return Chosen(self.lines, roundings, names)

    def told(self, rounded: Mapping[str, Rounded]) -> Iterator[Selected]:
        """The lines once it is known what became of each weight."""
        became = {self.sources.get(name, name): one for name, one in rounded.items()}
        for line in self.lines:
            one = became.get(line.name)
            if one is None:
                yield line
            else:
                action = "kept" if not one.hint else "quantized"
                yield dataclasses.replace(line, action=action, reason=one.reason)


def choose(model: nn.Module, options: Quantize, example_inputs: tuple[Any, ...] | None) -> Chosen:
    """Decides by globs and rules. Changes nothing. Raises `NothingToCompress` for a glob that matches nothing."""
    found, left = weights(model)
    kept = dict(left)
    globs = {"bits": list(options.bits)} if isinstance(options.bits, Mapping) else {}
    check_globs(found, left, {"layers": options.layers, "keep": options.keep, **globs})
    keep_by_name(found, options.layers, options.keep, globs, kept)
    if options.dense:
        keep_by_rule(model, found, options.dense, example_inputs, kept)
    for weight in found:
        if weight.name not in kept and not weight.parameter.numel():
            kept[weight.name] = "it is empty"
    roundings = {
        weight.name: _rounding(options, last_match(weight, options.bits)) for weight in found if weight.name not in kept
    }
    lines = selected(model, found, kept, lambda weight: ("quantized", 0.0, _words(roundings[weight.name])))
    return Chosen(tuple(lines), roundings)


def _rounding(options: Quantize, bits: int | str) -> Rounding:
    if isinstance(bits, str):
        return Rounding(None, bits)
    return Rounding(options.spec(bits), whole=options.per == "tensor")


def _words(how: Rounding) -> str:
    return how.half if how.spec is None else f"{how.spec.bits} bits"


def reading_layers(
    model: nn.Module, rounded: Sequence[Weight], mode: str
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose first input gets a grid, and for others whose weights are rounded why theirs stays float.

    Embeddings read indices and are in neither; a layer that has a grid on its input keeps that.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, nn.Module] = {}
    floating: dict[str, str] = {}
    for weight in rounded:
        for name in names_of(weight):
            layer = name.rpartition(".")[0]
            module = modules[layer]
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "input_grid" in module._modules:
                continue
            if any(module is other for other in layers.values()):  # one module under two names
                continue
            if reason := _stays_float(model, module, weight, mode):
                floating[layer] = reason
            else:
                layers[layer] = module
    return layers, floating


def _stays_float(model: nn.Module, module: nn.Module, weight: Weight, mode: str) -> str:
    inside = any(isinstance(m, nn.MultiheadAttention) and m.out_proj is module for m in model.modules())
    if weight.kind == "attention" or isinstance(module, nn.MultiheadAttention) or inside:
        return "its attention could not be opened into linear layers"
    kind = next((w.kind for w in weights(module)[0] if w.layer == ""), "bare")
    if kind == "bare":
        return f"a parameter of {type(module).__name__}, which uses it in its own code"
    if mode == "dynamic" and kind not in _DYNAMIC:
        return "dynamic grids are for linear and recurrent layers; give activations='static'"
    return ""
