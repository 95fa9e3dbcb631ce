# SPDX-License-Identifier: Apache-2.0
"""`prune`: one layer's weights with zeros of a pattern where they cost least, by any of the solvers in `PRUNERS`.

The table is the whole dispatch: a name, and a function of one `Pruning` problem to weights and a mask. Work is counted
in units of 1e9 multiply-adds from the layer's shape alone, so that what a budget allows is the same on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.patterns import Pattern
from featherweight.solvers import baselines
from featherweight.solvers.admm import admm_mask
from featherweight.solvers.contest import Judge, Rules, affordable, climb, contest, entrants
from featherweight.solvers.exact_obs import eliminate
from featherweight.solvers.hessian import Damped, damp, layer_loss
from featherweight.solvers.problem import Pruning, pruning
from featherweight.solvers.refit import products_work, refit_rows
from featherweight.solvers.swap import swap
from featherweight.solvers.units import ColumnSets

__all__ = ["PRUNERS", "Pruned", "Pruner", "prune"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned layer: `weights` (rows, d) in W's dtype, `pruned` (True where zero), and what is known of them.

    `loss` is ½ Σ (w - v) H (w - v)ᵀ of the weights as delivered, on the H that was given. `losses` has it for each
    solver that was tried and `judged` the judge's loss, if there was one. `work` is in 1e9 multiply-adds, `damping` is
    what was used, and `notes` are for the user's eyes.
    """

    weights: Tensor
    pruned: Tensor
    loss: float
    solver: str
    losses: Mapping[str, float]
    judged: Mapping[str, float]
    work: float
    damping: float
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pruner:
    """A solver: `run` gives float64 weights and the mask of what is zero, `work` its cost in 1e9 multiply-adds."""

    run: Callable[[Pruning], tuple[Tensor, Tensor]]
    work: Callable[[Pruning], float]
    tiles: bool = True


def prune(
    W: Tensor,
    H: Tensor,
    pattern: str | Pattern | ColumnSets = "weight",
    sparsity: float | None = None,
    *,
    solver: str = "best",
    run: int | None = None,
    damping: float = 1e-4,
    budget_bytes: int = 1 << 30,
    work: float = 1000.0,
    judge: Judge | None = None,
) -> Pruned:
    """Zeros in W (rows, d) where, with all other weights refitted, they raise the layer's error on H (d, d) least.

    Saves multiply-adds and bytes only where a format or a runtime skips zeros. W and H are not changed.

    - `pattern`: `weight`, `N:M` (keeps N of M), `RxC` tiles, `column`, or sets of columns that go together.
    - `sparsity`: share of zeros in the matrix, over all rows together; tiles and columns reach at least that. N:M says
      it itself.
    - `solver`: a key of `PRUNERS`, or `best`: the baselines and the best search that costs no more than ExactOBS would,
      nor than `work` (1e9 multiply-adds); the lowest loss wins.
    - `run`: input channels at one kernel position, which N:M groups and tiles do not cross; columns are those channels.
    - `damping`: relative to H's mean diagonal, a ridge toward W (see `damp`). `budget_bytes`: memory for batches of
      rows.
    - `judge`: the loss of weights (rows, d) in the layer's place on held-out samples. With one, the lowest judged loss
      wins, magnitude is delivered rather than anything that is worse than it, and `best` tries more damping as well.

    Raises `OptionError` and `NumericalError`.

    >>> H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> result = prune(torch.tensor([[1.0, 2.0]]), H, "weight", 0.5, damping=0.0)
    >>> result.weights, round(result.loss, 4)
    (tensor([[0.0000, 2.9000]]), 0.095)
    """
    problem = pruning(W, H, pattern, sparsity, run=run, damping=damping, budget_bytes=budget_bytes)
    dead = problem.damped.dead
    alone = problem.units.rows == 1 and problem.units.quota is None and problem.units.columns.shape == (problem.d, 1)
    if alone and bool(dead.any()) and not bool(dead.all()):
        options = {"solver": solver, "damping": damping, "budget_bytes": budget_bytes, "work": work}
        return _beside_dead(W, H, problem, judge, options)
    rules = Rules(lambda V: layer_loss(W, V, H), judge, _SIMPLE, lambda name: PRUNERS[name].work(problem), work)
    names = entrants(solver, lambda: _best(problem, rules), PRUNERS, rules)

    def solve(name: str, damping: float | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, Damped]]:
        own = problem if damping is None else dataclasses.replace(problem, damped=damp(H, damping))
        weights, pruned = PRUNERS[name].run(own)
        weights = torch.where(own.damped.dead & ~pruned, W, weights.to(W.dtype))
        return weights, (weights, pruned, own.damped)

    found = contest(names, solve, rules)
    if solver == "best" and judge is not None:
        found = climb(found, names[-1], solve, rules, problem.damped.damping)
    weights, pruned, damped = found.answer
    return Pruned(
        weights,
        pruned,
        found.losses[found.name],
        found.name,
        found.losses,
        found.judged,
        found.spent,
        damped.damping,
        (*problem.damped.notes, *_unpaid(solver, names, rules), *found.notes),
    )


def _beside_dead(W: Tensor, H: Tensor, problem: Pruning, judge: Judge | None, options: dict[str, Any]) -> Pruned:
    """Single weights of dead inputs go first, the smallest of them where not all must, and only the live are solved."""
    dead, room = problem.damped.dead, problem.rows * int(problem.damped.dead.sum())
    pruned = dead.expand(W.shape).clone()
    if problem.zeros < room:
        price = torch.where(pruned, W.abs(), torch.inf).flatten()
        lowest = price.argsort(stable=True)[: problem.zeros]
        pruned = torch.zeros_like(price, dtype=torch.bool).scatter_(0, lowest, True).view(W.shape)
    live = (~dead).nonzero()[:, 0]

    def whole(part: Tensor) -> Tensor:
        return W.masked_fill(pruned, 0.0).index_copy(1, live, part.to(W.dtype))

    judged = None if judge is None else lambda part: judge(whole(part))
    share = max(0, problem.zeros - room) / (W.numel() - room)
    found = prune(W[:, live], H[live][:, live], "weight", share, judge=judged, **options)
    notes = problem.damped.notes + tuple(note for note in found.notes if note not in problem.damped.notes)
    pruned[:, live] = found.pruned
    return dataclasses.replace(found, weights=whole(found.weights), pruned=pruned, notes=notes)


def _unpaid(solver: str, names: list[str], rules: Rules) -> tuple[str, ...]:
    if solver != "best" or names[-1].startswith("admm"):
        return ()
    return (
        f"a work budget of {rules.budget:g} pays for {names[-1]} only; the search by ADMM takes {rules.work('admm'):.3g}.",
    )


def _best(problem: Pruning, rules: Rules) -> list[str]:
    """What `best` tries: the baselines, and the dearest search that costs no more than ExactOBS would.

    Or than ADMM, where rows are so few that ExactOBS is the cheaper of the two. It never runs ExactOBS itself: that has
    ended above ADMM on every layer it was held against.
    """
    baselines, search = ([name for name in names if _takes(problem, name)] for names in (_BASELINES, _SEARCH))
    budget = min(rules.budget, max(rules.work("exact_obs"), rules.work("admm")))
    return [*baselines, affordable(search, rules.work, budget)]


def _takes(problem: Pruning, name: str) -> bool:
    return PRUNERS[name].tiles or (problem.units.columns.shape[1] == 1 and problem.units.rows == 1)


def _refitted(choose: Callable[[Pruning], Tensor]) -> Callable[[Pruning], tuple[Tensor, Tensor]]:
    """Refitted weights for the mask (rows, d) that `choose` finds."""

    def solve(problem: Pruning) -> tuple[Tensor, Tensor]:
        pruned = choose(problem)
        return refit_rows(problem.W, problem.damped, pruned, problem.budget_bytes), pruned

    return solve


def _exact_obs(problem: Pruning) -> Tensor:
    found = eliminate(problem.W, problem.damped.inverse, problem.units, budget_bytes=problem.budget_bytes)
    if problem.units.quota is not None:
        return problem.mask(
            found.chosen(torch.full((len(found.order),), found.order.shape[1], device=found.order.device))
        )
    return problem.mask(found.chosen(found.counts(problem.zeros, problem.rows)))


def _baseline(solve: Callable[[Pruning], tuple[Tensor, Tensor]]) -> Callable[[Pruning], tuple[Tensor, Tensor]]:
    def run(problem: Pruning) -> tuple[Tensor, Tensor]:
        weights, chosen = solve(problem)
        return weights, problem.mask(chosen)

    return run


def _kept(problem: Pruning) -> float:
    return problem.d * (1 - problem.zeros / max(1, problem.W.numel()))


def _refit_work(problem: Pruning) -> float:
    smaller = min(_kept(problem), problem.d - _kept(problem))
    masks = 1 if problem.units.rows >= problem.rows else problem.rows / problem.units.rows
    factors = masks * smaller**3 / 3 + problem.rows * problem.d**2
    return min(factors, products_work(problem.rows, problem.d)) / 1e9


def _obs_work(problem: Pruning) -> float:
    # A step is some twenty calls, which take as long as a million multiply-adds: what counts where layers are small.
    calls = len(problem.units.columns) / 1e3
    groups = problem.rows / min(problem.rows, problem.units.rows)
    # What a closed N:M group keeps is dropped with what it loses, so the steps are fewer and the columns fall faster.
    steps = 1.0 if problem.units.quota is None else float(problem.units.quota.sum()) / problem.d
    return groups * 0.41 * steps * problem.d**3 / 1e9 + calls + _refit_work(problem)


def _admm_work(problem: Pruning, stages: int = 12, each: int = 10) -> float:
    # A factor and an inverse a stage; iterations in float32 count half.
    return stages * (problem.d**3 + each * problem.rows * problem.d**2) / 2e9 + _refit_work(problem)


def _swap_work(problem: Pruning, swaps: int = 8) -> float:
    kept = _kept(problem)
    beside = problem.d - kept if problem.units.quota is not None else min(problem.d - kept, max(64, kept / 2))
    # A swap is two updates of the table, which wait for memory and not for arithmetic: eight times what is counted.
    return problem.rows * (kept**3 + 2 * kept**2 * beside + 8 * swaps * 2 * (kept + beside) ** 2) / 1e9


def _cheap(problem: Pruning) -> float:
    return problem.rows * problem.d / 1e9


def _sweep(problem: Pruning) -> float:
    return problem.rows * problem.d**2 / 1e9


PRUNERS: dict[str, Pruner] = {
    "magnitude": Pruner(_baseline(baselines.magnitude), _cheap),
    "wanda": Pruner(_baseline(baselines.wanda), _cheap),
    "sparsegpt": Pruner(_baseline(baselines.sparsegpt), _sweep, tiles=False),
    "magnitude+refit": Pruner(_refitted(lambda p: p.mask(baselines.magnitude(p)[1])), _refit_work),
    "wanda+refit": Pruner(_refitted(lambda p: p.mask(baselines.wanda(p)[1])), _refit_work),
    "sparsegpt+refit": Pruner(
        _refitted(lambda p: p.mask(baselines.sparsegpt(p)[1])), lambda p: _sweep(p) + _refit_work(p), tiles=False
    ),
    "exact_obs": Pruner(_refitted(_exact_obs), _obs_work),
    "exact_obs+swap": Pruner(
        _refitted(lambda p: swap(p, _exact_obs(p))), lambda p: _obs_work(p) + _swap_work(p), tiles=False
    ),
    "admm": Pruner(_refitted(admm_mask), _admm_work),
    "admm+swap": Pruner(
        _refitted(lambda p: swap(p, admm_mask(p))), lambda p: _admm_work(p) + _swap_work(p), tiles=False
    ),
}

# What `best` compares with, and what it chooses from, the dearest first.
_SIMPLE = "magnitude"
_BASELINES = (_SIMPLE, "wanda", "sparsegpt")
_SEARCH = ("admm+swap", "admm", "sparsegpt+refit", "magnitude+refit")
