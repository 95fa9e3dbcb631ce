# SPDX-License-Identifier: Apache-2.0
"""One problem of one layer, solved: statistics in, weights and what is known of them out.

The layer is to answer as the dense one did, whatever its inputs have become: with H = 2 X Xᵀ and T = 2 Y Xᵀ over
tokens, ||Y - V X||² is a constant plus ½-quadratics around W' = T H⁻¹, so every solver of (W, H) serves as solver of
(W', H) (target correction, as in GPTAQ, arXiv 2504.02692, and Qronos, arXiv 2505.11695). W' fits the calibration
samples closely, noise included; a ridge toward W holds it back, of the strength that answers best on held-out samples.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import NumericalError
from featherweight.grids import GridSpec
from featherweight.layers import Problem, Statistics
from featherweight.solvers.hessian import damp
from featherweight.solvers.joint import prune_and_quantize
from featherweight.solvers.pruning import Pruned, prune
from featherweight.solvers.quantizing import Quantized, quantize
from featherweight.solvers.refit import refit

__all__ = ["NOTHING", "Answer", "Want", "corrected", "error_of", "simple_weights", "solve"]

# A share of the output's energy that is nothing but rounding: a layer that lacks no more is answered by W itself.
NOTHING = 1e-12
# Strengths of the ridge toward W, relative to the mean diagonal of H.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True)
class Want:
    """What is asked of a layer: zeros, a grid, both, or (neither) its best weights around the zeros that it has."""

    pattern: str = "weight"
    sparsity: float | None = None
    grid: GridSpec | None = None
    solver: str = "best"
    damping: float = 1e-4
    budget_bytes: int = 1 << 30
    work: float = 1000.0

    @property
    def prunes(self) -> bool:
        """Whether zeros are asked for; N:M says their number itself."""
        return self.sparsity is not None or ":" in self.pattern


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """Weights (rows, d) for one problem; their loss, energy being that of the output: error = loss / energy.

    `fit` and `held_out` are (loss, energy) on the samples solved on and on others. `simple` is the loss of magnitude or
    nearest rounding, `losses` that of every solver that was tried: on held-out samples where there are any.
    """

    weights: Tensor
    solver: str
    fit: tuple[float, float]
    held_out: tuple[float, float] | None
    simple: float
    losses: Mapping[str, float]
    damping: float
    ridge: float | None
    seconds: float
    tokens: int
    notes: tuple[str, ...] = ()


def error_of(V: Tensor, W: Tensor, statistics: Statistics) -> tuple[float, float]:
    """||Y - V X||² and ||Y||² over tokens, of weights V (rows, d) where the dense layer has W.

    >>> statistics = Statistics(torch.eye(2).double(), None, 0.0, 1, 1, None)
    >>> error_of(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]), statistics)
    (2.0, 2.5)
    """
    loss, W = _judged(V, W, statistics), W.double()
    energy = statistics.energy if statistics.T is not None else float(((W @ statistics.H) * W).sum())
    return loss, energy / 2


def solve(
    problem: Problem,
    dense: Tensor,
    fit: Statistics,
    held_out: Statistics | None,
    want: Want,
    zeros: Tensor | None = None,
) -> Answer:
    """Weights for one problem whose dense weights are `dense` (rows, d), as near to the dense outputs as can be found.

    `zeros` (rows, d) stay zero, by default those of `dense`. Never worse, on held-out samples where there are any, than
    magnitude or rounding to nearest. Raises `OptionError` and `NumericalError`, which names the layer.
    """
    began = time.perf_counter()
    try:
        answer = _solve(problem, dense, fit, held_out, want, dense == 0 if zeros is None else zeros.clone())
    except NumericalError as error:
        raise NumericalError(f"{problem.name}: {error}") from error
    return dataclasses.replace(answer, seconds=time.perf_counter() - began)


def _solve(
    problem: Problem, dense: Tensor, fit: Statistics, held_out: Statistics | None, want: Want, zeros: Tensor
) -> Answer:
    W = dense.to(fit.H.device, torch.float64)
    if fit.scale is not None:
        return _by_rows(problem, W, fit, want, zeros, dense.dtype)
    judge_by = held_out or (fit if fit.T is not None else None)
    judge = None if judge_by is None else functools.partial(_judged, W=W, statistics=judge_by)
    target, ridge = corrected(W, fit, held_out)
    if bool(zeros.any()):
        target = refit(target, fit.H, zeros, damping=want.damping, budget_bytes=want.budget_bytes)
    options: dict[str, Any] = {"damping": want.damping, "budget_bytes": want.budget_bytes, "judge": judge}
    found: Pruned | Quantized
    if want.prunes and want.grid is not None:
        found = prune_and_quantize(
            target, fit.H, want.grid, want.pattern, want.sparsity, run=problem.run, work=want.work, **options
        )
    elif want.grid is not None:
        found = quantize(target, fit.H, want.grid, solver=want.solver, work=want.work, **options)
    elif want.prunes:
        found = prune(
            target, fit.H, want.pattern, want.sparsity, run=problem.run, solver=want.solver, work=want.work, **options
        )
    else:
        found_losses = {"refit": _judged(target, W, held_out or fit)}
        simple = W.masked_fill(zeros, 0.0)
        least = _judged(simple, W, held_out or fit)
        return _answer(target.to(dense.dtype), W, fit, held_out, "refit", found_losses, least, want.damping, ridge, ())
    weights = found.weights
    if bool((weights[zeros] != 0).any()):
        # Zero is on every grid; where there is none, what the zeros did is taken over by the weights that are left.
        weights = (
            weights.masked_fill(zeros, 0.0)
            if want.grid is not None
            else refit(target, fit.H, found.pruned | zeros, damping=want.damping, budget_bytes=want.budget_bytes)
        )
    simple = simple_weights(W.masked_fill(zeros, 0.0), fit.H, want, problem.run)
    name, notes = found.solver, found.notes
    final = held_out or fit
    least = _judged(simple, W, final)
    if least < _judged(weights, W, final):
        weights, name = simple, "nearest" if want.grid is not None else "magnitude"
        notes = (*notes, "the simple method was no worse on held-out samples, and was kept")
    return _answer(
        weights.to(dense.dtype),
        W,
        fit,
        held_out,
        name,
        found.judged or found.losses,
        least,
        found.damping,
        ridge,
        notes,
    )


def corrected(W: Tensor, fit: Statistics, held_out: Statistics | None) -> tuple[Tensor, float | None]:
    """The target W' (rows, d) and the ridge used; W itself if the layer sees what the dense one saw, or answers alike.

    W' = (T + λ W) (H + λ I)⁻¹, the least of ½ tr(V H Vᵀ) - tr(V Tᵀ) + ½ λ ||V - W||², with λ relative to the mean of
    H's live diagonal. Held-out samples choose among strengths and W itself; without them λ is 0.01.
    """
    if fit.T is None:
        return W, None
    live = fit.H.diagonal()[fit.H.diagonal() > 0]
    if not len(live):
        return W, None
    mean = float(live.mean())
    best, ridge = W, None
    if _judged(W, W, fit) <= NOTHING * fit.energy:
        return W, None
    least = float("inf") if held_out is None else _judged(W, W, held_out)
    index, step = _RIDGES.index(1e-2), 1
    while 0 <= index < len(_RIDGES):
        strength = _RIDGES[index]
        damped = damp(fit.H, strength)
        trial = torch.cholesky_solve((fit.T + damped.damping * mean * W).mT, damped.factor).mT
        if held_out is None:
            return trial, strength
        loss = _judged(trial, W, held_out)
        if loss < least:
            best, ridge, least = trial, strength, loss
        elif step > 0:
            # Not stronger, then: weaker, from where the search began.
            index, step = _RIDGES.index(1e-2), -1
        else:
            break
        index += step
    return best, ridge


def _judged(V: Tensor, W: Tensor, statistics: Statistics) -> float:
    """The loss alone, in one product with H."""
    V, H = V.double(), statistics.H
    if statistics.T is None:
        change = W.double() - V
        return float(((change @ H) * change).sum()) / 2
    loss = statistics.energy - 2 * float((V * statistics.T).sum()) + float(((V @ H) * V).sum())
    return max(loss, 0.0) / 2


def simple_weights(W: Tensor, H: Tensor, want: Want, run: int) -> Tensor:
    """What simple methods make of dense weights (rows, d): magnitude, then rounding to nearest. H is not looked at."""
    found = W
    if want.prunes:
        found = prune(found, H, want.pattern, want.sparsity, run=run, solver="magnitude").weights
    if want.grid is not None:
        found = quantize(found, H, want.grid, solver="nearest").weights
    return found.masked_fill(W == 0, 0.0)


def _by_rows(problem: Problem, W: Tensor, fit: Statistics, want: Want, zeros: Tensor, dtype: torch.dtype) -> Answer:
    """An embedding: rows looked up often weigh more. Rows that calibration never saw count as seen half a time."""
    seen = torch.ones(len(W)) if fit.scale is None else fit.scale
    scale = (seen.double().square() + 0.5 / max(1, fit.tokens)).sqrt().to(W.device)[:, None]
    plain = Statistics(fit.H, None, 0.0, fit.samples, fit.tokens, None)
    answer = _solve(problem, W * scale, plain, None, want, zeros)
    weights = (answer.weights / scale).to(dtype)
    return dataclasses.replace(answer, weights=weights.masked_fill(zeros, 0.0), tokens=fit.tokens)


def _answer(
    V: Tensor,
    W: Tensor,
    fit: Statistics,
    held_out: Statistics | None,
    solver: str,
    losses: Mapping[str, float],
    simple: float,
    damping: float,
    ridge: float | None,
    notes: tuple[str, ...],
) -> Answer:
    return Answer(
        weights=V,
        solver=solver,
        fit=error_of(V, W, fit),
        held_out=None if held_out is None else error_of(V, W, held_out),
        simple=simple,
        losses=losses,
        damping=damping,
        ridge=ridge,
        seconds=0.0,
        tokens=fit.tokens,
        notes=notes,
    )
