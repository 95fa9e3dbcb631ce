# SPDX-License-Identifier: Apache-2.0
"""What single attention heads are worth: the two tables of Michel et al. (2019, arXiv 1905.10650), as data.

A head is switched off by zeros in the columns that read it, which is its gate at 0; weights are put back to the last
bit. Nothing is cut: `PruneChannels(importance="heads")` does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight.errors import NothingToCompress
from featherweight.graph import Group, Trace
from featherweight.layers import unwrap
from featherweight.prune.channels.gates import gate_members, positions_of
from featherweight.prune.channels.selection import is_told, why

__all__ = ["HeadTables", "head_groups", "head_tables", "only_best", "without_each"]

Evaluate = Callable[[nn.Module], float]


@dataclasses.dataclass(frozen=True)
class HeadTables:
    """The metric of the whole model, of it without each single head, and with only the best head of one layer kept.

    `without[layer]` has the metric for each head of that layer removed alone (the paper's Table 1); `best[layer]` is
    the head whose layer does best with it alone, and the metric then (Table 2). A head of grouped-query attention is a
    key-value head with its queries.
    """

    metric: float
    without: Mapping[str, tuple[float, ...]]
    best: Mapping[str, tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def head_groups(trace: Trace) -> list[Group]:
    """The groups whose couplings are whole heads. Raises `NothingToCompress` where there are none, with a reason."""
    found = [group for group in trace.groups if group.kind == "heads"]
    if not found:
        told = [f"{f.tensor} axis {f.axis}: {why(f)}" for f in trace.frozen if is_told(f, trace)]
        reasons = f" Frozen: {'; '.join(told[:3])}." if told else ""
        raise NothingToCompress(
            f"No attention heads can be told apart here: {len(trace.groups)} groups, all of them channels.{reasons}"
        )
    return found


def head_tables(
    model: nn.Module,
    trace: Trace,
    evaluate: Evaluate,
    scores: Mapping[str, Sequence[float]] | None = None,
    higher_is_better: bool = True,
) -> HeadTables:
    """Both tables. One evaluation for the model, one for each head, and one for each layer (with `scores`, the best
    head is the one that they rank highest) or each head again (the best is found by trying)."""
    model = unwrap(model)
    metric = _evaluated(model, evaluate)
    without = without_each(model, trace, evaluate)
    return HeadTables(metric, without, only_best(model, trace, evaluate, scores, higher_is_better))


def without_each(model: nn.Module, trace: Trace, evaluate: Evaluate) -> dict[str, tuple[float, ...]]:
    """The metric with each single head removed, by group. The model is left as it was."""
    model = unwrap(model)
    found = {}
    for group in head_groups(trace):
        metrics = []
        for head in range(group.size):
            with _without(model, group, np.arange(group.size) == head):
                metrics.append(_evaluated(model, evaluate))
        found[group.name] = tuple(metrics)
    return found


def only_best(
    model: nn.Module,
    trace: Trace,
    evaluate: Evaluate,
    scores: Mapping[str, Sequence[float]] | None = None,
    higher_is_better: bool = True,
) -> dict[str, tuple[int, float]]:
    """For each group its best head, and the metric with all others of that group removed. The model stays as it was."""
    model = unwrap(model)
    found = {}
    for group in head_groups(trace):
        tried = range(group.size) if scores is None else [int(np.argmax(np.asarray(scores[group.name])))]
        metrics = {}
        for head in tried:
            with _without(model, group, np.arange(group.size) != head):
                metrics[head] = _evaluated(model, evaluate)
        best = (max if higher_is_better else min)(metrics, key=lambda head: metrics[head])
        found[group.name] = (best, metrics[best])
    return found


@contextlib.contextmanager
def _without(model: nn.Module, group: Group, off: np.ndarray) -> Iterator[None]:
    """The model with some heads' gates at 0."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    members = [member for member in gate_members(group) if member.tensor in parameters]
    saved = [(parameters[member.tensor], parameters[member.tensor].detach().clone()) for member in members]
    try:
        with torch.no_grad():
            for member in members:
                parameter = parameters[member.tensor]
                positions = positions_of(member, parameter.device)[torch.from_numpy(off).to(parameter.device)]
                parameter.index_fill_(member.axis, positions.flatten(), 0.0)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in reversed(saved):
                parameter.copy_(values)


def _evaluated(model: nn.Module, evaluate: Evaluate) -> float:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            return float(evaluate(model))
    finally:
        for module, mode in modes.items():
            module.training = mode
