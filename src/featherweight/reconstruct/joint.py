# SPDX-License-Identifier: Apache-2.0
"""Zeros and a grid together: one search decides both, and nothing that was pruned is wasted on rounding, or the reverse.

Three ways to the same form are tried and the lowest loss wins. In turn, by OBQ (or GPTQ): first all zeros, then all
roundings, each making up for all before it, so that for ExactOBS it is one elimination from first to last. In turn, with the
search of `quantize` for the second half. And joint: ADMM projects on zeros and grid at once and can take back either.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from featherweight.grids import GridSpec, fit_grid
from featherweight.patterns import Pattern
from featherweight.reconstruct.admm import admm_joint
from featherweight.reconstruct.hessian import layer_loss
from featherweight.reconstruct.problem import Quantization, pruning
from featherweight.reconstruct.pruning import prune
from featherweight.reconstruct.quantizing import QUANTIZERS, Quantized, polish
from featherweight.reconstruct.units import ColumnSets

__all__ = ["prune_and_quantize"]


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
) -> Quantized:
    """W (rows, d) with zeros of a pattern and all else on a grid, at the least error on H (d, d) that was found.

    Options are those of `prune` and `quantize`; `work` is halved between the two. `losses` names the three ways. The scales are fitted to the
    pruned weights, which are larger than W's, having taken over what the zeros did.

    Raises `OptionError` and `NumericalError`.

    >>> import torch
    >>> result = prune_and_quantize(torch.tensor([[2.0, 0.1, -1.0, 0.2]]), torch.eye(4), GridSpec(bits=3), "2:4")
    >>> result.pruned
    tensor([[False,  True, False,  True]])
    """
    problem = pruning(W, H, pattern, sparsity, run=run, damping=damping, budget_bytes=budget_bytes)
    sparse = prune(W, H, pattern, sparsity, run=run, damping=damping, budget_bytes=budget_bytes, work=work / 2)
    fitted = fit_grid(sparse.weights, grid)
    held = Quantization(problem.W, problem.damped, fitted, sparse.pruned, True, budget_bytes)
    greedy = "obq" if QUANTIZERS["obq"].work(held) <= work / 2 else "gptq"
    integers, pruned = admm_joint(problem, fitted)
    answers = {
        f"in turn, {greedy}": (*QUANTIZERS[greedy].run(held), sparse.pruned),
        "in turn, admm+polish": (*QUANTIZERS["admm+polish"].run(held), sparse.pruned),
        "joint": (*polish(dataclasses.replace(held, held=pruned), integers), pruned),
    }
    weights = {name: scales.values(q).to(W.dtype) for name, (q, scales, _) in answers.items()}
    losses = {name: layer_loss(W, V, H) for name, V in weights.items()}
    best = min(losses, key=losses.__getitem__)
    integers, scales, pruned = answers[best]
    spent = sparse.work + 2 * QUANTIZERS["admm+polish"].work(held) + QUANTIZERS[greedy].work(held)
    damped = problem.damped
    return Quantized(
        weights[best], integers, scales, pruned, losses[best], best, losses, spent, damped.damping, damped.notes
    )
