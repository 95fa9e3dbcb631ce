# SPDX-License-Identifier: Apache-2.0
"""From scores and targets to the couplings that go: the decision that cutting while training and at once share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from featherweight.graph import Group, Trace
from featherweight.prune.channels.choose import Divide, Ladder, counts_after, ladder, nearest_to, ranked
from featherweight.prune.channels.costs import COSTS, Cost, cost_of
from featherweight.prune.channels.latency import cut_copy, per_coupling, search, timed
from featherweight.prune.channels.options import ChannelOptions
from featherweight.prune.channels.selection import least_of, structure
from featherweight.prune.channels.targets import Goal, goals_of, words

__all__ = ["TOLERANCE", "Decision", "Prices", "decide", "prices_of"]

TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Prices:
    """All that follows from the model alone: costs by kind, milliseconds a coupling where they are asked for, goals."""

    costs: Mapping[str, Cost]
    milliseconds: Mapping[str, float]
    goals: tuple[Goal, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """Which couplings are gone (bool, size) by group, what each goal came to, and whether all were met."""

    gone: dict[str, np.ndarray]
    reached: tuple[tuple[Goal, float], ...]

    @property
    def met(self) -> bool:
        return all(value <= goal.limit * (1 + TOLERANCE) for goal, value in self.reached)

    @property
    def words(self) -> str:
        """`617M of 1.23G MACs (50.1 %)`, for each goal."""
        return "; ".join(
            f"{words(goal.kind, value)} of {words(goal.kind, goal.whole)} ({value / goal.whole:.1%})"
            for goal, value in self.reached
        )


def prices_of(model: nn.Module, trace: Trace, groups: Sequence[Group], options: ChannelOptions, inputs: Any) -> Prices:
    """Counts what the model costs, and times it where a goal or a price is latency."""
    per = "memory" if options.cost == "memory_left" else options.cost
    kinds = [kind for kind in COSTS if kind in options.until or kind == per]
    costs = {kind: cost_of(trace, kind, model) for kind in kinds}
    whole = np.array(list(trace.sizes.values()), dtype=np.float64)
    wholes = {kind: cost.total(whole) for kind, cost in costs.items()}
    if "latency" in options.until:
        wholes["latency"] = timed({"model": cut_copy(model, trace, inputs, {})}, inputs)["model"].median_ms
    milliseconds = per_coupling(model, trace, inputs, groups) if per == "latency" else {}
    return Prices(costs, milliseconds, goals_of(type(options).__name__, options.until, wholes))


def decide(
    model: nn.Module,
    trace: Trace,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    gone: Mapping[str, np.ndarray],
    options: ChannelOptions,
    prices: Prices,
    inputs: Any,
    progress: float = 1.0,
) -> Decision:
    """Which couplings of `groups` are gone once the goals are reached as far as `progress` says.

    What is `gone` stays gone. Groups without scores stay as they are. Changes nothing.
    """
    ranked_groups = [group for group in groups if group.name in scores]
    ladders = [
        ladder(scores[group.name].numpy(), gone[group.name], least_of(group, options), options.multiple)
        for group in ranked_groups
    ]
    spread = _Spread(trace, ranked_groups, gone)
    alike = [structure(group, trace) for group in ranked_groups]
    path = ranked(ladders, options.order, _divide(options.cost, prices, spread, ranked_groups), alike)
    goals = [goal.part_way(progress) for goal in prices.goals]
    counted = [goal for goal in goals if goal.kind != "latency"]
    part = path[:0]
    if counted:
        part = nearest_to(path, ladders, lambda kept: _ratio(counted, prices, spread(kept)), TOLERANCE)
    clocked: dict[str, float] = {}
    for goal in (goal for goal in goals if goal.kind == "latency"):

        def ratios(parts: Sequence[int], goal: Goal = goal) -> list[float]:
            twins = {
                str(n): cut_copy(model, trace, inputs, _after(ranked_groups, ladders, gone, path[:n])) for n in parts
            }
            times = timed({"": cut_copy(model, trace, inputs, {}), **twins}, inputs)
            # Of the model as it is, timed in the same turns: a machine that is busier now than before tells nothing.
            share = goal.whole / times[""].median_ms if _is_share(options, goal) else 1.0
            return [times[str(n)].median_ms * share / goal.limit for n in parts]

        length, ratio = search(len(path), ratios, TOLERANCE)
        clocked["latency"] = ratio * goal.limit
        part = path[:length] if length > len(part) else part
    kept = spread(counts_after(ladders, part))
    reached = [
        (goal, clocked["latency"] if goal.kind == "latency" else prices.costs[goal.kind].total(kept)) for goal in goals
    ]
    return Decision(_after(ranked_groups, ladders, gone, part), tuple(reached))


class _Spread:
    """From couplings kept of the groups that are ranked to those of all groups, in the trace's order."""

    def __init__(self, trace: Trace, groups: Sequence[Group], gone: Mapping[str, np.ndarray]) -> None:
        names = list(trace.sizes)
        taken = [int(gone[name].sum()) if name in gone else 0 for name in names]
        self.base = np.array(list(trace.sizes.values()), dtype=np.float64) - taken
        self.at = np.array([names.index(group.name) for group in groups], dtype=np.intp)

    def __call__(self, kept: np.ndarray) -> np.ndarray:
        full = self.base.copy()
        full[self.at] = kept
        return full

    def few(self, going: np.ndarray) -> np.ndarray:
        full = np.zeros(len(self.base))
        full[self.at] = going
        return full


def _divide(per: str, prices: Prices, spread: _Spread, groups: Sequence[Group]) -> Divide:
    if per == "none":
        return lambda kept, going: going
    if per == "latency":
        each = np.array([prices.milliseconds[group.name] for group in groups])
        return lambda kept, going: each * going
    if per == "memory_left":
        cost = prices.costs["memory"]
        return lambda kept, going: cost.left(spread(kept))[spread.at] * going
    cost = prices.costs[per]
    return lambda kept, going: cost.freed(spread(kept), spread.few(going))[spread.at]


def _ratio(goals: Sequence[Goal], prices: Prices, kept: np.ndarray) -> float:
    return max(prices.costs[goal.kind].total(kept) / goal.limit for goal in goals)


def _is_share(options: ChannelOptions, goal: Goal) -> bool:
    amount = options.until[goal.kind]
    return isinstance(amount, str) and amount.strip().endswith("%")


def _after(
    groups: Sequence[Group], ladders: Sequence[Ladder], gone: Mapping[str, np.ndarray], path: np.ndarray
) -> dict[str, np.ndarray]:
    """What is gone after part of a path, of all groups."""
    found = {name: flags.copy() for name, flags in gone.items()}
    kept = counts_after(ladders, path)
    for group, own, left in zip(groups, ladders, kept, strict=True):
        found[group.name][own.order[: own.kept - int(left)]] = True
    return found
