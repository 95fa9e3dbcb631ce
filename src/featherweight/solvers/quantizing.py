# SPDX-License-Identifier: Apache-2.0
"""`quantize`: one layer's weights on a grid where that costs least, by any of the solvers in `QUANTIZERS`.

The table is the whole dispatch: a name, and a function of one `Quantization` problem to integers and their grid. Work
is counted in units of 1e9 multiply-adds from the layer's shape alone, as in `prune`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featherweight.errors import OptionError
from featherweight.grids import Grid, GridSpec, fit_grid
from featherweight.solvers.adaround import STEPS, adaround
from featherweight.solvers.admm import admm_grid
from featherweight.solvers.contest import Judge, Rules, affordable, climb, contest, entrants
from featherweight.solvers.descent import coordinate_descent, set_descent
from featherweight.solvers.gptq import gptq
from featherweight.solvers.hessian import Damped, check_weights, damp, layer_loss, row_losses
from featherweight.solvers.obq import obq
from featherweight.solvers.problem import Quantization
from featherweight.solvers.scales import least_squares_scales

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "check_zero", "quantize"]


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized layer: `integers` (rows, d) on `grid`, the `weights` these are in W's dtype, what is held at zero.

    `loss` is ½ Σ (w - v) H (w - v)ᵀ of the weights as delivered, on the H that was given. `losses` has it for each
    solver that was tried and `judged` the judge's loss, if there was one. `work` is in 1e9 multiply-adds, `damping` is
    what was used, and `notes` are for the user's eyes.
    """

    weights: Tensor
    integers: Tensor
    grid: Grid
    pruned: Tensor
    loss: float
    solver: str
    losses: Mapping[str, float]
    judged: Mapping[str, float]
    work: float
    damping: float
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A solver: `run` gives integers (rows, d) and their grid, `work` its cost in 1e9 multiply-adds."""

    run: Callable[[Quantization], tuple[Tensor, Grid]]
    work: Callable[[Quantization], float]


def quantize(
    W: Tensor,
    H: Tensor,
    grid: Grid | GridSpec,
    *,
    solver: str = "best",
    keep_zeros: bool = True,
    fit_scales: bool = True,
    damping: float = 1e-4,
    budget_bytes: int = 1 << 30,
    work: float = 1000.0,
    judge: Judge | None = None,
) -> Quantized:
    """W (rows, d) on a grid of 2 bits or more, so chosen that the layer's error on H (d, d) rises least.

    Saves 32 / bits of the weights' bytes before scales, and time only where a runtime computes with such integers.
    W and H are not changed.

    - `grid`: a `GridSpec`, fitted to W by itself, or a `Grid` as it is. Solvers that end in `+polish` or `+scales` may
      then improve its scales for the layer's error, unless `fit_scales` is False.
    - `solver`: a key of `QUANTIZERS`, or `best`: nearest, GPTQ and the best search that `work` (1e9 multiply-adds) pays
      for; the lowest loss wins.
    - `keep_zeros`: weights that are zero, pruned ones, stay exactly zero.
    - `damping`, `budget_bytes`, `judge`: as in `prune`; the simple method is nearest.

    Raises `OptionError` and `NumericalError`.

    >>> H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> grid = Grid(torch.tensor([[1.0]]), torch.tensor([[0]], dtype=torch.int32), bits=3, chunk=2)
    >>> W = torch.tensor([[1.4, 1.3]])
    >>> quantize(W, H, grid, solver="nearest").weights, quantize(W, H, grid, fit_scales=False).weights
    (tensor([[1., 1.]]), tensor([[2., 1.]]))
    """
    damped = damp(H, damping)
    check_weights(W, H)
    check_zero(grid)
    grid = fit_grid(W, grid) if isinstance(grid, GridSpec) else grid
    if grid.scale.shape != (len(W), -(-W.shape[1] // grid.chunk)) or grid.zero_point.shape != grid.scale.shape:
        raise OptionError(
            f"the grid has scales for {tuple(grid.scale.shape)} rows and chunks of {grid.chunk}; W is {tuple(W.shape)}."
        )
    held = (W == 0) if keep_zeros else torch.zeros_like(W, dtype=torch.bool)
    problem = Quantization(W.detach().double(), damped, grid, held, fit_scales, budget_bytes)
    rules = Rules(lambda V: layer_loss(W, V, H), judge, _SIMPLE, lambda name: QUANTIZERS[name].work(problem), work)
    names = entrants(solver, lambda: [*_BASELINES, affordable(_SEARCH, rules.work, work)], QUANTIZERS, rules)

    def solve(name: str, damping: float | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, Grid, Damped]]:
        own = problem if damping is None else dataclasses.replace(problem, damped=damp(H, damping))
        integers, grid = QUANTIZERS[name].run(own)
        weights = grid.values(integers).to(W.dtype)
        return weights, (weights, integers, grid, own.damped)

    found = contest(names, solve, rules)
    if solver == "best" and judge is not None:
        found = climb(found, names[-1], solve, rules, damped.damping)
    weights, integers, grid, used = found.answer
    return Quantized(
        weights,
        integers,
        grid,
        held,
        found.losses[found.name],
        found.name,
        found.losses,
        found.judged,
        found.spent,
        used.damping,
        (*damped.notes, *_unpaid(solver, names, rules), *found.notes),
    )


def check_zero(grid: Grid | GridSpec) -> None:
    """Raises `OptionError` for one bit: its grid has no zero, where solvers put what is pruned or dead."""
    if grid.bits == 1:
        raise OptionError("a grid of 1 bit has no zero, which solvers need; give 2 bits or more.")


def _unpaid(solver: str, names: list[str], rules: Rules) -> tuple[str, ...]:
    if solver != "best" or names[-1] == _SEARCH[0]:
        return ()
    return (
        f"a work budget of {rules.budget:g} pays for {names[-1]} only; {_SEARCH[0]} takes {rules.work(_SEARCH[0]):.3g}.",
    )


def search(problem: Quantization) -> tuple[Tensor, Grid]:
    """ADMM, or GPTQ in rows where that is better, and the polish. Rows are independent, so each has its best start."""
    starts = torch.stack((admm_grid(problem), gptq(problem)))
    losses = torch.stack([row_losses(problem.W, problem.grid.values(one), problem.damped.H) for one in starts])
    start = starts.gather(0, losses.argmin(0)[None, :, None].expand(1, -1, problem.d))[0]
    return polish(problem, start)


def polish(problem: Quantization, integers: Tensor) -> tuple[Tensor, Grid]:
    """Single columns and scales in turn, then sets of columns, then both once more; the loss never rises."""
    problem, integers = _rescaled(problem, coordinate_descent(problem, integers))
    problem, integers = _rescaled(problem, set_descent(problem, integers))
    return integers, problem.grid


def _rescaled(problem: Quantization, integers: Tensor) -> tuple[Quantization, Tensor]:
    if problem.free_scales:
        problem = dataclasses.replace(problem, grid=least_squares_scales(problem, integers))
    return problem, coordinate_descent(problem, integers)


def _on_grid(choose: Callable[[Quantization], Tensor]) -> Callable[[Quantization], tuple[Tensor, Grid]]:
    return lambda problem: (choose(problem), problem.grid)


def _polished(choose: Callable[[Quantization], Tensor]) -> Callable[[Quantization], tuple[Tensor, Grid]]:
    return lambda problem: polish(problem, choose(problem))


def _nearest(problem: Quantization) -> Tensor:
    return problem.grid.integers(problem.W.masked_fill(problem.held, 0.0))


def nearest_scales(problem: Quantization) -> tuple[Tensor, Grid]:
    """Learned scales: the nearest integers, and the scales of least loss for them, in turn until neither helps.

    It costs a few products with H and needs no search over integers; rows move only where their loss falls.
    """
    integers = _nearest(problem)
    for _ in range(_TURNS if problem.free_scales else 0):
        problem = dataclasses.replace(problem, grid=least_squares_scales(problem, integers))
        nearest = _nearest(problem)
        old, new = (row_losses(problem.W, problem.grid.values(one), problem.damped.H) for one in (integers, nearest))
        better = new < old
        if not bool(better.any()):
            break
        integers = torch.where(better[:, None], nearest, integers)
    return integers, problem.grid


def _square(problem: Quantization) -> float:
    return problem.rows * problem.d**2 / 1e9


def _gptq_work(problem: Quantization) -> float:
    return (2 / 3 * problem.d**3 + problem.rows * problem.d**2 / 2) / 1e9


def _obq_work(problem: Quantization) -> float:
    held = problem.d * float(problem.held.double().mean())
    return problem.rows * 0.41 * (problem.d - held) ** 3 / 1e9


def _admm_work(problem: Quantization) -> float:
    # A factor and an inverse a stage; iterations in float32 count half.
    return 12 * (problem.d**3 + 10 * problem.rows * problem.d**2) / 2e9


def _adaround_work(problem: Quantization) -> float:
    return STEPS * _square(problem) / 2  # float32


def _polish_work(problem: Quantization) -> float:
    # Three descents that stop after some four sweeps, four passes over sets, two fits of scales.
    return 20 * _square(problem)


_TURNS = 8


QUANTIZERS: dict[str, Quantizer] = {
    "nearest": Quantizer(_on_grid(_nearest), lambda p: p.rows * p.d / 1e9),
    "nearest+scales": Quantizer(nearest_scales, lambda p: 3 * _TURNS * _square(p)),
    "gptq": Quantizer(_on_grid(gptq), _gptq_work),
    "gptq+polish": Quantizer(_polished(gptq), lambda p: _gptq_work(p) + _polish_work(p)),
    "obq": Quantizer(_on_grid(obq), _obq_work),
    "obq+polish": Quantizer(_polished(obq), lambda p: _obq_work(p) + _polish_work(p)),
    "adaround": Quantizer(_on_grid(adaround), _adaround_work),
    "adaround+polish": Quantizer(_polished(adaround), lambda p: _adaround_work(p) + _polish_work(p)),
    "admm": Quantizer(_on_grid(admm_grid), _admm_work),
    "admm+polish": Quantizer(search, lambda p: _admm_work(p) + _gptq_work(p) + _polish_work(p)),
}

# What `best` compares with, and what it chooses from, the dearest first.
_SIMPLE = "nearest"
_BASELINES = (_SIMPLE, "gptq")
_SEARCH = ("admm+polish", "gptq+polish")
