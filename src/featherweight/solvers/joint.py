# SPDX-License-Identifier: Apache-2.0
"""Zeros and a grid together: one search decides both, and nothing pruned is wasted on rounding, or the reverse.

Three ways to the same form are tried and the lowest loss wins, or the lowest judged one. In turn, by OBQ (or GPTQ):
first all zeros, then all roundings, each making up for all before it, so that for ExactOBS it is one elimination from
first to last. In turn, with the search of `quantize` for the second half. And joint: ADMM projects on zeros and grid at
once and can take back either. The simple method, magnitude's zeros and then nearest, is there to be compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from featherweight.grids import Grid, GridSpec, fit_grid
from featherweight.patterns import Pattern
from featherweight.solvers.admm import admm_joint
from featherweight.solvers.baselines import magnitude
from featherweight.solvers.contest import Judge, Rules, contest
from featherweight.solvers.hessian import damp, layer_loss
from featherweight.solvers.problem import Pruning, Quantization, pruning
from featherweight.solvers.pruning import prune
from featherweight.solvers.quantizing import QUANTIZERS, Quantized, check_zero, polish
from featherweight.solvers.units import ColumnSets

__all__ = ["prune_and_quantize"]

_SIMPLE = "magnitude, nearest"


def prune_and_quantize(
    W: Tensor,
    H: Tensor,
    grid: GridSpec,
    pattern: str | Pattern | ColumnSets = "weight",
    sparsity: float | None = None,
    *,
    run: int | None = None,
    damping: float = 1e-4,
    budget_bytes: int = 1 << 30,
    work: float = 1000.0,
    judge: Judge | None = None,
) -> Quantized:
    """W (rows, d) with zeros of a pattern and all else on a grid, at the least error on H (d, d) that was found.

    Options are those of `prune` and `quantize`; `work` is halved between the two. `losses` names the ways. The scales
    are fitted to the pruned weights, which are larger than W's, having taken over what the zeros did.

    Raises `OptionError` and `NumericalError`.

    >>> import torch
    >>> result = prune_and_quantize(torch.tensor([[2.0, 0.1, -1.0, 0.2]]), torch.eye(4), GridSpec(bits=3), "2:4")
    >>> result.pruned
    tensor([[False,  True, False,  True]])
    """
    check_zero(grid)
    problem = pruning(W, H, pattern, sparsity, run=run, damping=damping, budget_bytes=budget_bytes)
    sparse = prune(
        W, H, pattern, sparsity, run=run, damping=damping, budget_bytes=budget_bytes, work=work / 2, judge=judge
    )
    # What the judge said of damping when it saw the zeros holds for the grid as well.
    problem = dataclasses.replace(problem, damped=damp(H, sparse.damping))
    fitted = fit_grid(sparse.weights, grid)
    held = Quantization(problem.W, problem.damped, fitted, sparse.pruned, True, budget_bytes)
    greedy = "obq" if QUANTIZERS["obq"].work(held) <= work / 2 else "gptq"
    ways: dict[str, Callable[[], tuple[Tensor, Grid, Tensor]]] = {
        _SIMPLE: lambda: _simple(problem, grid),
        f"in turn, {greedy}": lambda: (*QUANTIZERS[greedy].run(held), sparse.pruned),
        "in turn, admm+polish": lambda: (*QUANTIZERS["admm+polish"].run(held), sparse.pruned),
        "joint": lambda: _joint(problem, held),
    }

    def solve(name: str) -> tuple[Tensor, tuple[Tensor, Tensor, Grid, Tensor]]:
        integers, scales, pruned = ways[name]()
        weights = scales.values(integers).to(W.dtype)
        return weights, (weights, integers, scales, pruned)

    work_of = {_SIMPLE: 0.0, f"in turn, {greedy}": QUANTIZERS[greedy].work(held)}
    dear = QUANTIZERS["admm+polish"].work(held)
    rules = Rules(lambda V: layer_loss(W, V, H), judge, _SIMPLE, lambda name: work_of.get(name, dear), work)
    found = contest(list(ways), solve, rules)
    return Quantized(
        *found.answer,
        found.losses[found.name],
        found.name,
        found.losses,
        found.judged,
        sparse.work + found.spent,
        problem.damped.damping,
        (*problem.damped.notes, *found.notes),
    )


def _simple(problem: Pruning, grid: GridSpec) -> tuple[Tensor, Grid, Tensor]:
    weights, chosen = magnitude(problem)
    scales = fit_grid(weights, grid)
    return scales.integers(weights), scales, problem.mask(chosen)


def _joint(problem: Pruning, held: Quantization) -> tuple[Tensor, Grid, Tensor]:
    integers, pruned = admm_joint(problem, held.grid)
    return (*polish(dataclasses.replace(held, held=pruned), integers), pruned)
