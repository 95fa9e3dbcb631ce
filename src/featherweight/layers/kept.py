# SPDX-License-Identifier: Apache-2.0
"""Which weights a method leaves alone, each with the reason: by name and by rule, the same for every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from featherweight.errors import DataError, NothingToCompress
from featherweight.layers.order import call_order
from featherweight.layers.select import matches, select
from featherweight.layers.weights import Weight
from featherweight.task import describe

__all__ = [
    "RULES",
    "Selected",
    "check_globs",
    "is_named",
    "keep_by_name",
    "keep_by_rule",
    "last_match",
    "names_of",
    "refuse_nothing",
    "selected",
]

RULES = ("first", "depthwise", "output")


@dataclasses.dataclass(frozen=True)
class Selected:
    """One weight of the model: what becomes of it (`pruned`, `quantized`..., or `kept`), to which sparsity, and why.

    With `ranking="global"` the sparsity is that of all pruned layers together.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    action: str
    sparsity: float
    reason: str


def names_of(weight: Weight) -> tuple[str, ...]:
    """All names of a weight, the canonical one first."""
    return (weight.name, *weight.aliases)


def is_named(weight: Weight, globs: Iterable[str]) -> bool:
    """Whether a glob names the weight, by any of its names."""
    globs = tuple(globs)
    return any(matches(name, globs) for name in names_of(weight))


def last_match(weight: Weight, values: Any) -> Any:
    """What the last glob of `{glob: value}` that names the weight says, None where none does; or one value for all."""
    if not isinstance(values, Mapping):
        return values
    return next((values[glob] for glob in reversed(list(values)) if is_named(weight, [glob])), None)


def check_globs(
    found: Sequence[Weight], left: Iterable[str], options: Mapping[str, Sequence[str]], others: Iterable[str] = ()
) -> None:
    """Raises `NothingToCompress` for a glob of these options that names none of the weights, or of what else has names.

    `found` and `left` are those of `weights`. A model without any of them is for `refuse_nothing` to refuse.
    """
    names = [name for weight in found for name in names_of(weight)] + [*left, *others]
    for option, globs in options.items():
        if names:
            select(names, globs, option=option)


def keep_by_name(
    found: Sequence[Weight],
    layers: Sequence[str],
    keep: Sequence[str],
    targets: Mapping[str, Sequence[str]],
    kept: dict[str, str],
) -> None:
    """Notes in `kept` what the globs of `layers` do not name, what those of `keep` do, and bare parameters.

    `targets` are options that may name layers too, each with its globs: a weight that one of them does not name is
    kept.
    """
    named_by = [*layers, *(glob for globs in targets.values() for glob in globs)]
    for weight in found:
        missed = next((option for option, globs in targets.items() if not is_named(weight, globs)), None)
        by = next((glob for glob in keep if is_named(weight, [glob])), None)
        if not is_named(weight, layers):
            kept[weight.name] = "no glob of layers names it"
        elif missed is not None:
            kept[weight.name] = f"no glob of {missed} names it"
        elif weight.kind == "bare" and not is_named(weight, [glob for glob in named_by if glob.strip("*")]):
            kept[weight.name] = (
                f"a parameter of {type(weight.module).__name__}, which may or may not be a weight; "
                f"name it to prune it: layers=['*', '{weight.name}']"
            )
        elif by is not None:
            kept[weight.name] = f"keep={by!r} names it"


def keep_by_rule(
    model: nn.Module,
    found: Sequence[Weight],
    rules: Sequence[str],
    example_inputs: tuple[Any, ...] | None,
    kept: dict[str, str],
) -> None:
    """Notes in `kept` what the rules say: `first` (if the first layer is a convolution), `depthwise`, `output`.

    First and last are those of one forward call of `example_inputs`; without them, of the order of definition, which
    the reason then says. Raises `DataError` where the model cannot be called with them.
    """
    order, unsure = _order(model, found, example_inputs)
    places = {w.name: [order[layer] for layer in _layers(w) if layer in order] for w in found if w.kind != "bare"}
    seen = [place for each in places.values() for place in each]
    hint = "; give example_inputs to see the order of calls" if unsure else ""
    where = " in definition order" if unsure else ""
    for weight in found:
        own = places.get(weight.name, [])
        if weight.name in kept:
            continue
        if "first" in rules and weight.kind in ("conv", "transposed conv") and min(seen, default=-1) in own:
            kept[weight.name] = f"first layer{where}, a convolution{hint}; dense=() prunes it too"
        elif "depthwise" in rules and weight.depthwise:
            kept[weight.name] = "depthwise; dense=() prunes it too"
        elif "output" in rules and max(seen, default=-1) in own:
            what = "last in definition order" if unsure else "output layer"
            kept[weight.name] = f"{what}{hint}; dense=() prunes it too"


def selected(
    model: nn.Module,
    found: Sequence[Weight],
    kept: Mapping[str, str],
    told: Callable[[Weight], tuple[str, float, str]],
) -> Iterator[Selected]:
    """A line for every weight of the model: kept, with the reason, or the action, sparsity and reason that are `told`.

    `kept` may have parameters that are no weights to `weights`, computed or without rows: they come first.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    known = {weight.name for weight in found}
    for name in kept:
        if name not in known:
            shape = () if isinstance(tensors[name], nn.parameter.UninitializedParameter) else tuple(tensors[name].shape)
            yield Selected(name, "computed", shape, torch.Size(shape).numel(), "kept", 0.0, kept[name])
    for weight in found:
        action, sparsity, reason = ("kept", 0.0, kept[weight.name]) if weight.name in kept else told(weight)
        parameter = weight.parameter
        yield Selected(weight.name, weight.kind, tuple(parameter.shape), parameter.numel(), action, sparsity, reason)


def refuse_nothing(selected: Sequence[Selected], what: str = "prune") -> None:
    """Raises `NothingToCompress`, with the reasons, where every weight is kept."""
    if any(line.action != "kept" for line in selected):
        return
    if not selected:
        raise NothingToCompress(f"Nothing to {what}: the model has no weights (parameters of two axes or more).")
    shown = "; ".join(f"{line.name}: {line.reason}" for line in selected[:5])
    more = f"; and {len(selected) - 5} more" if len(selected) > 5 else ""
    raise NothingToCompress(f"Nothing to {what}: all {len(selected)} weights are kept. {shown}{more}.")


def _order(
    model: nn.Module, found: Sequence[Weight], example_inputs: tuple[Any, ...] | None
) -> tuple[dict[str, int], bool]:
    """When each layer with weights runs, and whether this is only the order of definition."""
    if example_inputs is None:
        return {layer: i for i, weight in enumerate(found) for layer in _layers(weight)[:1]}, True
    try:
        calls = {layer: i for i, layer in enumerate(call_order(model, example_inputs))}
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise DataError(
            f"The model cannot be called with example_inputs {describe(example_inputs)}: {error}"
        ) from error
    order = {}
    for layer in (layer for weight in found for layer in _layers(weight)):
        # MultiheadAttention never calls the module that holds its output projection.
        for name in (layer, layer.rpartition(".")[0]):
            if name in calls:
                order[layer] = calls[name]
                break
    return order, False


def _layers(weight: Weight) -> list[str]:
    return [name.rpartition(".")[0] for name in names_of(weight)]
