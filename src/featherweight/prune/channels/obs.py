# SPDX-License-Identifier: Apache-2.0
"""Structured OBS: what the loss of a group's consumers grows by when a coupling goes and they are refitted.

A consumer is a weight W (rows, d) with its layer Hessian H (`solvers`), and a coupling is a set P of its columns.
Removing it costs ½ Σ_rows w_P ((H⁻¹)_PP)⁻¹ w_Pᵀ (Optimal Brain Compression's block step, arXiv 2208.11580, with one P
for all rows), summed over all consumers of the group, and moves what is left. Couplings of a group go one after the
other, each at its cost when its turn comes; couplings of different groups are priced as if they went alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.graph import Group
from featherweight.layers import Problem, Statistics, problems
from featherweight.prune.channels.gates import positions_of
from featherweight.solvers import damp

__all__ = ["MOST_COLUMNS", "Consumer", "consumers", "elimination", "structured_obs"]

MOST_COLUMNS = 6144  # a Hessian of 302 MB


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """One problem that reads a group: for each coupling the columns (size, c) of W that it is."""

    problem: Problem
    columns: Tensor


def consumers(model: nn.Module, groups: Sequence[Group]) -> tuple[dict[str, list[Consumer]], dict[str, str]]:
    """The consumers of each group, and the groups that have none whose arithmetic is known, each with the reason."""
    found, left = problems(model)
    by_tensor: dict[str, list[Problem]] = {}
    for problem in found:
        for name in (problem.weight.name, *problem.weight.aliases):
            by_tensor.setdefault(name, []).append(problem)
    known: dict[str, list[Consumer]] = {}
    reasons: dict[str, str] = {}
    for group in groups:
        inputs = [member for member in group.members if member.role == "input"]
        unknown = [member.tensor for member in inputs if member.tensor not in by_tensor]
        wide = [p for member in inputs for p in by_tensor.get(member.tensor, []) if p.d > MOST_COLUMNS]
        if not inputs:
            reasons[group.name] = "no layer reads it, so that there is none to refit"
        elif unknown:
            reasons[group.name] = f"it feeds {unknown[0]}: {left.get(unknown[0], 'its arithmetic is not known')}"
        elif wide:
            reasons[group.name] = f"it feeds {wide[0].name}, whose {wide[0].d} inputs are too many for a Hessian"
        else:
            own = [
                Consumer(problem, columns)
                for member in inputs
                for problem in by_tensor[member.tensor]
                if (columns := _columns(problem, member.axis, positions_of(member, torch.device("cpu")))) is not None
            ]
            known[group.name] = own
    return known, reasons


def _columns(problem: Problem, axis: int, positions: Tensor) -> Tensor | None:
    """Which columns (size, c) of a problem's matrix the positions of each coupling are; None where none is."""
    shape = problem.weight.parameter.shape
    labels = torch.full(shape, -1.0, dtype=torch.float64)
    values = torch.arange(len(positions), dtype=torch.float64).repeat_interleave(positions.shape[1])
    along = [1] * len(shape)
    along[axis] = -1
    labels.index_copy_(axis, positions.flatten(), values.view(along).expand(*_with(shape, axis, positions.numel())))
    row = problem.matrix(labels)[0].to(torch.int64)
    order = torch.argsort(row, stable=True)[int((row < 0).sum()) :]
    if len(order) == 0 or len(order) % len(positions):
        return None
    return order.view(len(positions), -1)


def _with(shape: torch.Size, axis: int, length: int) -> list[int]:
    return [length if i == axis else size for i, size in enumerate(shape)]


def structured_obs(
    found: Mapping[str, Sequence[Consumer]],
    statistics: Mapping[str, Statistics],
    gone: Mapping[str, np.ndarray],
    damping: float = 1e-4,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The score of each coupling by group, and the groups whose consumers no batch reached, each with the reason.

    Those `gone` already (bool, size) are taken out first and score infinity.
    """
    scores: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, own in found.items():
        unseen = [consumer.problem.name for consumer in own if consumer.problem.name not in statistics]
        if unseen:
            reasons[name] = f"the calibration data never reached {unseen[0]}, which it feeds"
            continue
        parts = []
        for consumer in own:
            damped = damp(statistics[consumer.problem.name].H, damping)
            W = consumer.problem.matrix().to(damped.H)
            parts.append((W.masked_fill(damped.dead, 0.0), damped.inverse, consumer.columns.to(W.device)))
        order, losses = elimination(parts, gone[name])
        own_scores = torch.full((len(gone[name]),), torch.inf, dtype=torch.float64)
        # Costs in order need not rise; a coupling is never to go before those that went ahead of it.
        own_scores[order] = losses.cummax(0).values
        scores[name] = own_scores
    return scores, reasons


def elimination(parts: Sequence[tuple[Tensor, Tensor, Tensor]], gone: np.ndarray) -> tuple[Tensor, Tensor]:
    """In what order couplings go, and what each adds to the loss, from (W, H⁻¹, columns (size, c)) of each consumer.

    All but those `gone` are in the order. O(size) steps of O(d² c) each.
    """
    state = [(W.clone(), inverse.clone(), columns) for W, inverse, columns in parts]
    for index in np.flatnonzero(gone).tolist():
        for W, inverse, columns in state:
            _remove(W, inverse, columns[index])
    open_ = torch.from_numpy(~gone)
    order, losses = [], []
    for _ in range(int(open_.sum())):
        cost = torch.zeros(len(gone), dtype=torch.float64)
        for W, inverse, columns in state:
            cost += _costs(W, inverse, columns, open_.to(W.device)).cpu()
        index = int(cost.masked_fill(~open_, torch.inf).argmin())
        order.append(index)
        losses.append(float(cost[index]))
        open_[index] = False
        for W, inverse, columns in state:
            _remove(W, inverse, columns[index])
    return torch.tensor(order, dtype=torch.int64), torch.tensor(losses, dtype=torch.float64)


def _costs(W: Tensor, inverse: Tensor, columns: Tensor, open_: Tensor) -> Tensor:
    """½ Σ_rows w_P ((H⁻¹)_PP)⁻¹ w_Pᵀ of each open coupling (size,), zero for the others."""
    cost = torch.zeros(len(columns), dtype=torch.float64, device=W.device)
    at = columns[open_]
    if not len(at):
        return cost
    blocks = inverse[at[:, :, None], at[:, None, :]]
    w = W[:, at].permute(1, 2, 0)  # (open, c, rows)
    cost[open_] = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), w, upper=False).square().sum((1, 2)) / 2
    return cost


def _remove(W: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Takes columns out of W, moving the others to where they do best, and out of H⁻¹; both in place."""
    root = torch.linalg.cholesky(inverse[columns][:, columns])
    u = torch.linalg.solve_triangular(root, inverse[columns], upper=False)
    moved = torch.linalg.solve_triangular(root, W[:, columns].T, upper=False)
    W -= moved.T @ u
    inverse -= u.T @ u
    W[:, columns] = 0.0
    # What is gone is coupled to nothing; ones on its diagonal keep every block factorizable.
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[columns, columns] = 1.0
