# SPDX-License-Identifier: Apache-2.0
"""Which weights are pruned and which are kept, each with the reason: the one place where this is decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from featherweight.errors import OptionError
from featherweight.layers import (
    Selected,
    Weight,
    check_globs,
    is_named,
    keep_by_name,
    keep_by_rule,
    last_match,
    select,
    selected,
    unwrap,
    weights,
)
from featherweight.prune.chains import given_chains, traced_chains
from featherweight.prune.importance import GRADIENT_BASED
from featherweight.prune.options import PruningOptions
from featherweight.prune.units import misfit, rows, to_units

__all__ = ["Target", "choose_layers"]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A weight to prune: its final sparsity, its cap, and, for neurons, the weight that reads its outputs."""

    weight: Weight
    sparsity: float
    cap: float = 1.0
    consumer: Weight | None = None

    @property
    def block(self) -> int:
        """How many consecutive columns of the consumer one row feeds: the positions of a flattened channel."""
        return 1 if self.consumer is None else self.consumer.columns_per_tap // rows(self.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that goes with a neuron."""
        return getattr(self.weight.module, "bias", None) if self.consumer is not None else None


def choose_layers(
    model: nn.Module,
    options: PruningOptions,
    example_inputs: tuple[Any, ...] | None = None,
    trained: Callable[[nn.Parameter], bool] | None = None,
) -> tuple[list[Target], tuple[Selected, ...]]:
    """What is pruned, and a line for every weight of the model. `trained` says which parameters get gradients.

    Raises `NothingToCompress` for a glob that matches nothing, `OptionError` for one that others override everywhere.
    """
    model = unwrap(model)
    found, left = weights(model)
    _check_globs(model, options, found, left)
    kept = dict(left)
    targets: list[Target] = []
    targeted = list(options.sparsity) if isinstance(options.sparsity, Mapping) else ["*"]
    keep_by_name(found, options.layers, options.keep, {"sparsity": targeted}, kept)
    if options.dense:
        keep_by_rule(model, found, options.dense, example_inputs, kept)
    _keep_by_values(found, options, trained, kept)
    pairs: Mapping[str, Weight] = {}
    if options.pattern == "neuron":
        pairs = _pair(model, found, options, example_inputs, kept)
    for weight in found:
        if weight.name not in kept:
            cap = 1.0 if (given := last_match(weight, options.caps)) is None else given
            targets.append(Target(weight, _target(weight, options), cap, pairs.get(weight.name)))
    aims = {target.weight.name: target for target in targets}
    lines = selected(model, found, kept, lambda weight: _told(weight, options, aims[weight.name]))
    return targets, tuple(lines)


def _target(weight: Weight, options: PruningOptions) -> float:
    if options.parsed.kind == "n:m":
        return 1 - options.parsed.n / options.parsed.m
    share: float | None = last_match(weight, options.sparsity)
    return 0.0 if share is None else share


def _check_globs(model: nn.Module, options: PruningOptions, found: Sequence[Weight], left: Mapping[str, str]) -> None:
    check_globs(found, left, {"layers": options.layers})
    every = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    select(list(every), options.keep, option="keep")
    for option, shares in (("sparsity", options.sparsity), ("caps", options.caps)):
        if not isinstance(shares, Mapping):
            continue
        globs = list(shares)
        check_globs(found, left, {option: globs})
        for i, glob in enumerate(globs):
            named = [weight for weight in found if is_named(weight, [glob])]
            if named and all(is_named(weight, globs[i + 1 :]) for weight in named):
                raise OptionError(
                    f"{option}: {glob!r} decides nothing, because {', '.join(map(repr, globs[i + 1 :]))} after it "
                    f"overrides it everywhere. Put {glob!r} last."
                )


def _keep_by_values(
    found: Sequence[Weight],
    options: PruningOptions,
    trained: Callable[[nn.Parameter], bool] | None,
    kept: dict[str, str],
) -> None:
    for weight in found:
        parameter = weight.parameter.detach()
        if weight.name in kept:
            continue
        if (reason := misfit(weight, options.parsed)) is not None:
            kept[weight.name] = reason
        elif options.importance in GRADIENT_BASED and trained is not None and not trained(weight.parameter):
            kept[weight.name] = f"it is not trained, and importance={options.importance!r} needs its gradient"
        elif parameter.numel() == 0 or len(to_units(weight, options.parsed, parameter)) < 2:
            kept[weight.name] = f"it is a single {options.parsed.kind}, and one always stays"
        elif not bool(parameter.any()):
            kept[weight.name] = "all zeros, as adapters and zero-initialised branches start; nothing to rank"


def _pair(
    model: nn.Module,
    found: Sequence[Weight],
    options: PruningOptions,
    example_inputs: tuple[Any, ...] | None,
    kept: dict[str, str],
) -> dict[str, Weight]:
    """Pairs for neurons; the weights that have none are kept."""
    if example_inputs is None and not options.feeds:
        raise OptionError(
            "pattern='neuron' must know which layer feeds which: give example_inputs, from which the graph is traced, "
            "or feeds={'fc1': 'fc2'}."
        )
    pairs, reasons = ({}, {}) if example_inputs is None else traced_chains(model, example_inputs, found)
    pairs |= given_chains(options.feeds, found)
    for weight in found:
        consumer = pairs.get(weight.name)
        if weight.name in kept:
            continue
        if consumer is None:
            kept[weight.name] = reasons.get(weight.name, "no pair of feeds names it")
        elif is_named(consumer, options.keep):
            kept[weight.name] = f"it feeds {consumer.layer}, which keep={list(options.keep)} names"
        elif options.importance in GRADIENT_BASED and not consumer.parameter.requires_grad:
            kept[weight.name] = f"it feeds {consumer.layer}, which gets no gradient"
    return pairs


def _told(weight: Weight, options: PruningOptions, target: Target) -> tuple[str, float, str]:
    """What a line says of a weight that is pruned: the action, the sparsity, and the reason."""
    zeros = float(to_units(weight, options.parsed, weight.parameter.detach() == 0).all(1).float().mean())
    reason = f"{zeros:.1%} are zero already, more than the target; they stay" if zeros > target.sparsity else ""
    if target.consumer is not None:
        reason = "; ".join(filter(None, (f"with the columns it feeds in {target.consumer.layer}", reason)))
    named = next((glob for glob in reversed(options.layers) if is_named(weight, [glob])), "*")
    return "pruned", target.sparsity, reason or f"layers={named!r} names it"
