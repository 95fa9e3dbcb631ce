# SPDX-License-Identifier: Apache-2.0
"""From targets to masks: the decision that gradual and one-shot pruning share.

Each target becomes a one-dimensional problem (`choose`), whose answer becomes masks of parameters again. What is held
already stays held, entry by entry, also where it lies scattered over units that are not pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from featherweight.errors import NumericalError, OptionError
from featherweight.layers import Weight
from featherweight.patterns import Pattern
from featherweight.plan import Plan
from featherweight.prune.choose import Problem, candidates_n_of_m, choose, choose_globally, most
from featherweight.prune.importance import entry_scores, unit_scores
from featherweight.prune.options import PruningOptions
from featherweight.prune.selection import Target
from featherweight.prune.units import from_units, to_units

__all__ = ["Masks", "check_reach", "choose_masks", "held_shares", "involved", "plan_of", "refuse_not_finite"]

Masks = dict[nn.Parameter, Tensor]
_COLUMN = Pattern("column")


def involved(targets: Sequence[Target]) -> dict[str, Weight]:
    """The weights that pruning reads and writes, by name: the targets and, for neurons, what they feed."""
    return {w.name: w for target in targets for w in (target.weight, target.consumer) if w is not None}


def refuse_not_finite(targets: Sequence[Target], when: str) -> None:
    """Raises `NumericalError` that names the first weight with NaN or infinity."""
    for name, weight in involved(targets).items():
        values = weight.parameter.detach()
        # A sum costs a hundredth of looking at each value. It is finite only if all of them are.
        if not bool(values.sum().isfinite()) and (bad := int((~values.isfinite()).sum())):
            raise NumericalError(
                f"{name} has {bad} of {values.numel()} values that are NaN or infinite {when}, so that nothing can be "
                "ranked. Masks are as they were. Lower the learning rate, or start from a checkpoint before this."
            )


def held_shares(targets: Sequence[Target], options: PruningOptions, held: Mapping[nn.Parameter, Tensor]) -> list[float]:
    """The share of units that are held already, for each target; with global ranking that of all weights together."""
    problems = [_problem(target, options, held) for target in targets]
    counts = [int(problem.settled.count_nonzero()) for problem in problems]
    if options.ranking == "global":
        total = sum(p.units * p.size for p in problems)
        return [sum(n * p.size for n, p in zip(counts, problems, strict=True)) / total] * len(targets)
    return [n / p.units for n, p in zip(counts, problems, strict=True)]


def check_reach(targets: Sequence[Target], options: PruningOptions, held: Mapping[nn.Parameter, Tensor]) -> None:
    """Raises `OptionError` where the caps leave too little for a global target, and says what they leave."""
    if options.ranking != "global":
        return
    problems = [_problem(target, options, held) for target in targets]
    limits = [most(problem, target.cap) for problem, target in zip(problems, targets, strict=True)]
    total = sum(p.units * p.size for p in problems)
    reach = sum(limit * p.size for limit, p in zip(limits, problems, strict=True))
    goal = round(targets[0].sparsity * total)
    if reach + max(p.size for p in problems) / 2 < goal:
        tight = [(t, limit * p.size, p) for t, limit, p in zip(targets, limits, problems, strict=True)]
        tight.sort(key=lambda line: line[1] - line[2].units * line[2].size)
        shown = ", ".join(f"{t.weight.name} {most_} of {p.units * p.size}" for t, most_, p in tight[:5])
        raise OptionError(
            f"sparsity={targets[0].sparsity:g} of {total} weights is {goal} zeros, but caps let go of {reach} at most "
            f"({shown}). Raise the caps, or give sparsity={reach / total:.4g} or less."
        )


def choose_masks(
    targets: Sequence[Target],
    options: PruningOptions,
    goals: Sequence[float],
    held: Mapping[nn.Parameter, Tensor],
    gathered: Mapping[str, Tensor],
    step: int = 0,
) -> Masks:
    """What is pruned (True) when target i is to be `goals[i]` sparse; with global ranking all goals are the same.

    The masks contain what is `held`. `gathered` holds the sums that gradient-based importance ranks by.
    """
    scores = {
        name: entry_scores(name, w.parameter, options.importance, options.parsed, gathered, options.seed, step)
        for name, w in involved(targets).items()
    }
    problems = [_problem(target, options, held, scores) for target in targets]
    if options.ranking == "global":
        limits = [most(problem, target.cap) for problem, target in zip(problems, targets, strict=True)]
        chosen = choose_globally(problems, limits, goals[0])
    else:
        chosen = [choose(p, min(round(goal * p.units), most(p))) for p, goal in zip(problems, goals, strict=True)]
    masks: Masks = {}
    for target, units in zip(targets, chosen, strict=True):
        weight, consumer, bias = target.weight, target.consumer, target.bias
        _add(masks, held, weight.parameter, from_units(weight, options.parsed, units))
        if consumer is not None:
            _add(masks, held, consumer.parameter, from_units(consumer, _COLUMN, units, target.block))
        if bias is not None:
            _add(masks, held, bias, units)
    return masks


def plan_of(targets: Sequence[Target], pattern: Pattern) -> Plan:
    """Hints for the codecs: `nm:N:M:AXIS` for weights all of whose groups keep N or fewer. Zeros need no hint."""
    formats = {}
    for target in targets if pattern.kind == "n:m" else ():
        weight = target.weight
        groups = to_units(weight, pattern, weight.parameter.detach() != 0).view(-1, pattern.m)
        if int(groups.sum(1).max()) <= pattern.n:
            axis = 0 if weight.kind.startswith("transposed") else 1
            formats[weight.name] = f"nm:{pattern.n}:{pattern.m}:{axis}"
    return Plan(formats=formats)


def _add(masks: Masks, held: Mapping[nn.Parameter, Tensor], parameter: nn.Parameter, mask: Tensor) -> None:
    before = masks.get(parameter, held.get(parameter))
    masks[parameter] = mask if before is None else mask | before.to(mask.device)


def _problem(
    target: Target,
    options: PruningOptions,
    held: Mapping[nn.Parameter, Tensor],
    scores: Mapping[str, Tensor] | None = None,
) -> Problem:
    pattern, weight, consumer = options.parsed, target.weight, target.consumer

    def units(tensors: Mapping[str, Tensor]) -> Tensor:
        own = to_units(weight, pattern, tensors[weight.name])
        if consumer is None:
            return own
        # A neuron is the row and the column that it feeds, as one unit.
        read = to_units(consumer, _COLUMN, tensors[consumer.name], target.block)
        return torch.cat([own, read.to(own.device)], dim=1)

    parameters = {w.name: w.parameter.detach() for w in (weight, consumer) if w is not None}
    masks = {name: _held(involved([target])[name].parameter, held) for name in parameters}
    is_held = units(masks).all(1)
    zero = units({name: value == 0 for name, value in parameters.items()}).all(1)
    if scores is None:
        ranked = is_held.new_zeros(is_held.shape, dtype=torch.float32)
    else:
        ranked = unit_scores(units(scores))
    size = weight.parameter.numel() // len(ranked)
    allowed = None
    if pattern.kind == "n:m":
        allowed = candidates_n_of_m(ranked, is_held, zero, pattern.n, pattern.m)
    return Problem(ranked, is_held, zero, allowed, size)


def _held(parameter: nn.Parameter, held: Mapping[nn.Parameter, Tensor]) -> Tensor:
    mask = held.get(parameter)
    return torch.zeros_like(parameter, dtype=torch.bool) if mask is None else mask.to(parameter.device)
