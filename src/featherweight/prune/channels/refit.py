# SPDX-License-Identifier: Apache-2.0
"""The layers that read what was cut, refitted to answer as they did: least squares on what is left of their inputs.

In the order of calls, each on inputs that the layers before it, refitted already, give, toward the answers of the dense
model: the loss that structured OBS predicts is the one that remains. Without labels and without training; it costs a
pass over the calibration batches for every step of the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.correct import Moved
from featherweight.layers import Problem, Statistics, call_steps, collect, problems
from featherweight.prune.channels.obs import MOST_COLUMNS
from featherweight.solvers import damp, refit

__all__ = ["refit_consumers"]

_DAMPING = 1e-4


def refit_consumers(
    model: nn.Module,
    reference: nn.Module,
    read: Iterable[str],
    masks: Mapping[nn.Parameter, Tensor],
    batches: Sequence[Any],
    forward: Callable[[Any, Any], Any],
) -> Moved:
    """Refits weights named `read` of your masked model in place to the dense `reference`; what is masked stays zero.

    Both models have the same shapes, since nothing is cut yet. Names what it set, and what it left alone and why.
    """
    found, left = problems(model)
    wanted = set(read)
    chosen = [p for p in found if wanted & {p.weight.name, *p.weight.aliases} and p.weight.kind != "embedding"]
    skipped = {p.weight.name: f"its {p.d} inputs are too many for a Hessian" for p in chosen if p.d > MOST_COLUMNS}
    chosen = [problem for problem in chosen if problem.d <= MOST_COLUMNS]
    skipped |= {name: reason for name, reason in left.items() if name in wanted}
    names: dict[str, None] = {}
    for step in call_steps(model, chosen, forward, batches[0]) if chosen else []:
        statistics = collect(model, step, batches, forward, reference=reference)
        for problem in step:
            if problem.name in statistics:
                _refit(problem, statistics[problem.name], masks)
                names[problem.weight.name] = None
    return Moved(tuple(names), skipped)


def _refit(problem: Problem, statistics: Statistics, masks: Mapping[nn.Parameter, Tensor]) -> None:
    W = problem.matrix().to(statistics.H)
    damped = damp(statistics.H, _DAMPING)
    # The dense answers as weights on all inputs, T H⁻¹, by a ridge toward W; then the best without the masked ones.
    gap = torch.zeros_like(W) if statistics.T is None else statistics.T - W @ statistics.H
    target = W + torch.cholesky_solve(gap.T, damped.factor).T
    mask = masks.get(problem.weight.parameter)
    pruned = torch.zeros_like(W, dtype=torch.bool) if mask is None else problem.matrix(mask).to(W.device)
    problem.write(refit(target, statistics.H, pruned, _DAMPING).to(problem.weight.parameter))
