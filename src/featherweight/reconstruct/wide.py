# SPDX-License-Identifier: Apache-2.0
"""A layer too wide for its Hessian, in blocks of its input channels: block coordinate descent on the same objective.

One block at a time is pruned or rounded by any solver, its target being what the other blocks, as they are by then,
leave of the layer's answer. Once all blocks are sparse each is refitted once more, around its zeros. Cost: one pass
over the data a block and sweep; memory: one block's Hessians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featherweight.layers import Problem, Statistics, split
from featherweight.reconstruct.answer import NOTHING, Answer, Want, corrected, error_of, simple_weights, solve
from featherweight.solvers.refit import refit

__all__ = ["most_columns", "solve_wide"]

_WIDTH = 2048
Collected = tuple[dict[str, Statistics], dict[str, Statistics]]


def most_columns(budget_bytes: int) -> int:
    """The largest d whose solvers keep within the budget: they hold some eight matrices of H's size in float64."""
    return max(64, int((budget_bytes / 64) ** 0.5))


def solve_wide(
    whole: Problem,
    dense: Tensor,
    most: int,
    collect: Callable[[Sequence[Problem]], Collected],
    want: Want,
    zeros: Tensor,
) -> Answer | None:
    """Weights for a problem in blocks of at most `most` columns; None if the layer was never reached.

    `collect` gives statistics, with targets, of blocks of the model that `whole` belongs to, and sees what is written
    there. `dense` (rows, d) are the reference's weights; `zeros` (rows, d) stay zero. The weights of `whole` are as
    they were when this returns. Never worse than magnitude or rounding to nearest, on held-out samples where there are
    any.
    """
    began = time.perf_counter()
    before = whole.matrix()
    try:
        return _solve(whole, dense, zeros, most, collect, want, began)
    finally:
        whole.write(before)


def _solve(
    whole: Problem,
    dense: Tensor,
    zeros: Tensor,
    most: int,
    collect: Callable[[Sequence[Problem]], Collected],
    want: Want,
    began: float,
) -> Answer | None:
    # One channel is enough to see the loss of the whole layer: its target is all that the others leave of the answer.
    probe = split(whole, whole.taps)[0]
    # The cost of a layer in blocks grows with the square of their width.
    blocks = split(whole, max(whole.taps, min(most, _WIDTH)))
    whole.write(zeros.to(dense.dtype))
    held = [block.matrix() != 0 for block in blocks]
    whole.write(dense)
    originals = [block.matrix() for block in blocks]
    dense = dense.masked_fill(zeros, 0.0)

    def loss_now() -> tuple[tuple[float, float], tuple[float, float] | None, int]:
        fit, held_out = (part.get(probe.name) for part in collect([probe]))
        now = probe.matrix()
        judged = None if held_out is None else error_of(now, now, held_out)
        return (0.0, 0.0) if fit is None else error_of(now, now, fit), judged, 0 if fit is None else fit.tokens

    whole.write(dense.new_zeros(dense.shape))
    silent, silent_held_out, tokens = loss_now()
    if not tokens:
        return None
    whole.write(dense)
    for block, original in zip(blocks, originals, strict=True):
        alike = torch.eye(block.d, device=original.device)
        block.write(simple_weights(original.double(), alike, want, block.run))
    simple = whole.matrix().masked_fill(zeros, 0.0)
    whole.write(simple)
    simple_fit, simple_held_out, _ = loss_now()
    whole.write(dense)
    answers = _sweep(blocks, originals, held, collect, want)
    if want.grid is None:
        _refit(blocks, originals, collect, want)
    fit, held_out, _ = loss_now()
    found = answers[-1]
    name, weights = f"{found.solver}, {len(blocks)} blocks", whole.matrix()
    tried = {"simple": (simple_held_out or simple_fit)[0], found.solver: (held_out or fit)[0]}
    # Blocks that are each no worse than the simple method can be worse together.
    if tried["simple"] < tried[found.solver]:
        name, weights, fit, held_out = "simple", simple, simple_fit, simple_held_out
    return Answer(
        weights=weights,
        solver=name,
        fit=(fit[0], silent[0]),
        held_out=None if held_out is None or silent_held_out is None else (held_out[0], silent_held_out[0]),
        simple=tried["simple"],
        losses=tried,
        damping=max(answer.damping for answer in answers),
        ridge=found.ridge,
        seconds=time.perf_counter() - began,
        tokens=tokens,
        notes=(
            f"{whole.d} inputs are too many for one Hessian within the byte budget: solved in {len(blocks)} blocks",
        ),
    )


def _sweep(
    blocks: Sequence[Problem],
    originals: Sequence[Tensor],
    held: Sequence[Tensor],
    collect: Callable[[Sequence[Problem]], Collected],
    want: Want,
) -> list[Answer]:
    """Solves each block against what all others leave, and writes it."""
    answers = []
    for block, original, zeros in zip(blocks, originals, held, strict=True):
        fit, held_out = collect([block])
        answers.append(solve(block, original, fit[block.name], held_out.get(block.name), want, zeros))
        block.write(answers[-1].weights)
    return answers


def _refit(
    blocks: Sequence[Problem],
    originals: Sequence[Tensor],
    collect: Callable[[Sequence[Problem]], Collected],
    want: Want,
) -> None:
    """Refits each block around its zeros, and keeps that where it answers better."""
    for block, original in zip(blocks, originals, strict=True):
        fit, held_out = (part.get(block.name) for part in collect([block]))
        if fit is None:
            continue
        now, judge = block.matrix(), held_out or fit
        loss, energy = error_of(now, original, judge)
        if loss <= NOTHING * energy:
            continue
        target, _ = corrected(original.double(), fit, held_out)
        trial = refit(target, fit.H, now == 0, damping=want.damping, budget_bytes=want.budget_bytes).to(now.dtype)
        if error_of(trial, original, judge)[0] < loss:
            block.write(trial)
