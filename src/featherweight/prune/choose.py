# SPDX-License-Identifier: Apache-2.0
"""Which units go: pure functions of scores, counts and what is zero already. No model, no schedule, no options.

What is held stays held, what is zero goes before anything that is not, then the lowest scores; equal scores go in order
of position, so that a count is met exactly and each rank of a distributed run chooses the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Problem", "candidates_n_of_m", "choose", "choose_globally", "most"]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One layer's choice: units with `scores`, those `held`, those whose entries all are `zero`, and who may go.

    All four have shape (units,); `size` is the number of weights in a unit.
    """

    scores: Tensor
    held: Tensor
    zero: Tensor
    allowed: Tensor | None = None
    size: int = 1

    @property
    def units(self) -> int:
        return self.scores.numel()

    @property
    def settled(self) -> Tensor:
        """Those that are gone for good and count towards the target."""
        return self.held if self.allowed is None else self.held & self.allowed


def candidates_n_of_m(scores: Tensor, held: Tensor, zero: Tensor, n: int, m: int) -> Tensor:
    """The m - n units of each m consecutive ones that may go: held ones first, then zeros, then the lowest scores.

    >>> scores = torch.tensor([3.0, 1.0, 2.0, 4.0])
    >>> none = torch.zeros(4, dtype=torch.bool)
    >>> candidates_n_of_m(scores, none, none, 2, 4).tolist()
    [False, True, True, False]
    """
    ranked = _zeros_first(scores, zero).masked_fill(held, -torch.inf).view(-1, m)
    order = ranked.argsort(dim=1, stable=True)
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order[:, : m - n], True)
    return chosen.view(-1)


def most(problem: Problem, cap: float = 1.0) -> int:
    """How many units may go at most: `cap` of them, one less than all, those allowed; but what is held stays."""
    free = problem.units - 1 if problem.allowed is None else int(problem.allowed.count_nonzero())
    # A cap of 0.1 of 30 units is 3, though 0.1 * 30 is a little more and 0.7 * 10 a little less than a whole number.
    limit = min(free, int(cap * problem.units + 1e-9))
    return max(limit, int(problem.settled.count_nonzero()))


def choose(problem: Problem, count: int) -> Tensor:
    """The `count` units that go (more where more are held), as a mask of shape (units,).

    >>> none = torch.zeros(4, dtype=torch.bool)
    >>> choose(Problem(torch.tensor([2.0, 1.0, 1.0, 1.0]), held=none, zero=none), 2).tolist()
    [False, True, True, False]
    """
    held = problem.settled
    free = ~held if problem.allowed is None else ~held & problem.allowed
    missing = min(count - int(held.count_nonzero()), int(free.count_nonzero()))
    if missing <= 0:
        return held
    scores = _zeros_first(problem.scores, problem.zero & free)
    # The lowest k unsorted cost a seventh of a sort; the largest of them is the threshold.
    threshold = scores[free].topk(missing, largest=False, sorted=False).values.max()
    below, ties = free & (scores < threshold), free & (scores == threshold)
    missing -= int(below.count_nonzero())
    if missing < int(ties.count_nonzero()):
        positions = ties.nonzero()[:missing, 0]
        ties = torch.zeros_like(ties).index_fill_(0, positions, True)
    return held | below | ties


def choose_globally(problems: Sequence[Problem], limits: Sequence[int], sparsity: float) -> list[Tensor]:
    """One threshold over all layers: `sparsity` of all their weights goes, and of layer i at most `limits[i]` units.

    Where units differ in size between layers, the sum is met to within half a unit. Scores may lie on several devices.
    """
    device = problems[0].scores.device
    # Only what a layer's own limit leaves can go, so that the one threshold never meets a limit.
    allowed = [choose(p, limit).to(device) for p, limit in zip(problems, limits, strict=True)]
    joint = Problem(
        torch.cat([p.scores.to(device) for p in problems]),
        torch.cat([p.settled.to(device) for p in problems]),
        torch.cat([p.zero.to(device) for p in problems]),
        torch.cat(allowed),
    )
    sizes = [p.size for p in problems]
    goal = sparsity * sum(p.units * p.size for p in problems)
    if len(set(sizes)) == 1:
        chosen = choose(joint, round(goal / sizes[0]))
    else:
        counts = torch.tensor([p.units for p in problems], device=device)
        chosen = _choose_by_weight(joint, torch.tensor(sizes, device=device).repeat_interleave(counts), goal)
    parts = torch.split(chosen, [p.units for p in problems])
    return [part.to(p.scores.device) for part, p in zip(parts, problems, strict=True)]


def _choose_by_weight(problem: Problem, sizes: Tensor, goal: float) -> Tensor:
    """The lowest units whose summed sizes come closest to `goal`."""
    chosen = problem.settled.clone()
    free = ~chosen if problem.allowed is None else ~chosen & problem.allowed
    positions = free.nonzero()[:, 0]
    positions = positions[_zeros_first(problem.scores, problem.zero)[positions].argsort(stable=True)]
    sums = torch.cat([sizes.new_zeros(1), sizes[positions].cumsum(0)]) + sizes[chosen].sum()
    chosen[positions[: int((sums - goal).abs().argmin())]] = True
    return chosen


def _zeros_first(scores: Tensor, zero: Tensor) -> Tensor:
    return scores.masked_fill(zero, torch.finfo(scores.dtype).min) if int(zero.count_nonzero()) else scores
