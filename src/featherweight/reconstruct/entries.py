# SPDX-License-Identifier: Apache-2.0
"""One layer at every level and pattern: what a database holds of it, solved in one pass and stored as small integers.

ExactOBS removes units in an order, and what is gone at one sparsity is gone at the next. So one elimination answers all
levels, and for each unit it is enough to know the first level at which it is gone: six bits where there are 44 levels.
The weights come back by exact refit. An N:M pattern is one mask, a bit a weight; so is each level where another solver
searches it by itself. A quantized layer is its integers, packed to their bits, and its grid.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight import pack
from featherweight.errors import OptionError
from featherweight.grids import Grid, GridSpec
from featherweight.pack.bits import bytes_of, pack_fields, unpack_fields
from featherweight.patterns import Pattern, parse_pattern
from featherweight.solvers.allocate import ascending
from featherweight.solvers.exact_obs import Elimination, eliminate
from featherweight.solvers.hessian import Damped
from featherweight.solvers.joint import prune_and_quantize
from featherweight.solvers.problem import pruning
from featherweight.solvers.pruning import PRUNERS, prune
from featherweight.solvers.quantizing import Quantized, quantize
from featherweight.solvers.refit import refit_rows
from featherweight.solvers.units import Units, units_of

__all__ = ["Contents", "Made", "Settled", "default_levels", "entries_of", "first_level", "refitted", "settled"]

_TILE_LEVELS, _WEIGHT_LEVELS = 29, 44
# Solvers that leave the weights that are kept as they fell.
_NOT_REFITTED = ("magnitude", "wanda", "sparsegpt")


def _elimination(rows: int, d: int) -> float:
    """1e9 multiply-adds of ExactOBS on rows x d."""
    return 0.41 * rows * d**3 / 1e9


def default_levels(pattern: Pattern) -> tuple[float, ...]:
    """Sparsities whose densities fall by a tenth a level, the paper's: to 0.99 for single weights, to 0.95 for others.

    >>> [round(level, 3) for level in default_levels(parse_pattern("1x4"))[:3]]
    [0.1, 0.19, 0.271]
    """
    most = _WEIGHT_LEVELS if pattern.kind == "weight" else _TILE_LEVELS
    return tuple(1 - 0.9**level for level in range(1, most + 1))


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a database is to hold of each layer, and how it is solved.

    - `patterns`: `weight`, `RxC` tiles and `column` at each of `levels` (sparsities; None: `default_levels`), N:M as it
      is.
    - `bits`: weights on grids of so many bits, asymmetric unless `symmetric`, one scale a row or for every `chunk`
      columns.
    - `joint`: zeros and a grid together: (pattern, sparsity, bits), with None as the sparsity of N:M.
    - `solver`: for zeros. `exact_obs` gives all levels by one elimination and stores them nested. Any other name, or
      `best`, solves and stores each level by itself with its share of `work`.
    - `work`: 1e9 multiply-adds that one elimination may take, and five times what one quantization may. Wider layers
      than that pays for are split into blocks of input channels, each a problem with entries of its own; so are those
      of more than `block` columns.
    - `layers`: globs.
    - `damping`: as in `prune`.

    Raises `OptionError`.

    >>> Contents(patterns=("weight",), levels=(0.5, 0.9), bits=(4,), joint=()).kinds
    ('weight', '4 bit')
    """

    patterns: tuple[str, ...] = ("weight", "2:4", "1x4")
    levels: tuple[float, ...] | None = None
    bits: tuple[int, ...] = (4, 3, 2)
    joint: tuple[tuple[str, float | None, int], ...] = (("2:4", None, 4),)
    symmetric: bool = False
    chunk: int | None = None
    solver: str = "exact_obs"
    layers: tuple[str, ...] = ("*",)
    block: int | None = None
    damping: float = 1e-4
    work: float = 5000.0

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if parse_pattern(pattern).kind in ("row", "neuron"):
                raise OptionError(
                    f"pattern {pattern}: whole outputs are not chosen by a layer's own error; leave it out."
                )
        if self.levels is not None and not (
            self.levels
            and all(0 < level <= 1 for level in self.levels)
            and all(a < b for a, b in itertools.pairwise(self.levels))
        ):
            raise OptionError(f"levels are sparsities above 0 and up to 1, ascending; got {self.levels!r}.")
        if self.solver not in PRUNERS and self.solver != "best":
            raise OptionError(f"solver {self.solver!r} is none of {', '.join(PRUNERS)}, best.")
        for pattern, sparsity, bits in self.joint:
            if (parse_pattern(pattern).kind == "n:m") != (sparsity is None):
                raise OptionError(
                    f"joint {(pattern, sparsity, bits)!r}: N:M takes None as its sparsity, others a number."
                )
            self.spec(bits)
        for bits in self.bits:
            self.spec(bits)
        if len(set(self.kinds)) < len(self.kinds):
            raise OptionError(
                f"what is asked for twice: patterns {self.patterns}, bits {self.bits}, joint {self.joint}."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of entries, in order: `weight`, `2:4`, `4 bit`, `2:4 + 4 bit`, and `weight 0.5 + 4 bit`."""
        joint = [
            (pattern if sparsity is None else f"{pattern} {sparsity:.6g}") + f" + {bits} bit"
            for pattern, sparsity, bits in self.joint
        ]
        return (*self.patterns, *(f"{bits} bit" for bits in self.bits), *joint)

    def widest(self, rows: int, d: int) -> int:
        """The most columns that problems of a layer of rows x d may have."""
        most = d if self.block is None else min(d, self.block)
        if self.solver == "exact_obs" and _elimination(rows, most) * d / most > self.work:
            # Blocks of b columns take rows d b² together.
            most = max(1, math.isqrt(int(self.work / (_elimination(rows, d) / d**2))))
        return most

    def levels_of(self, pattern: Pattern) -> tuple[float, ...]:
        return default_levels(pattern) if self.levels is None else self.levels

    def spec(self, bits: int) -> GridSpec:
        if type(bits) is not int or not 2 <= bits <= 8:  # an entry's zero points are int8
            raise OptionError(f"bits must be 2 to 8; got {bits!r}.")
        return GridSpec(bits, symmetric=self.symmetric, chunk=self.chunk)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """One entry as it was solved: `weights` (rows, d) as they will come back, and what must be kept of it.

    `tensors` go to disk under the entry's name; those of a nested pattern are all with its first level. `bytes` is what
    the weights take in their smallest exact form, `damping` what a refit needs to give them again. `level` counts the
    levels of a nested pattern; None elsewhere.
    """

    kind: str
    asked: float | None = None
    bits: int | None = None
    level: int | None = None
    weights: Tensor
    bytes: int
    solver: str
    damping: float
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        return float((self.weights == 0).double().mean())


@dataclasses.dataclass(frozen=True)
class _Solving:
    W: Tensor
    H: Tensor
    contents: Contents
    options: dict[str, Any]


def entries_of(
    W: Tensor,
    H: Tensor,
    contents: Contents,
    *,
    run: int | None = None,
    budget_bytes: int = 1 << 30,
    judge: Callable[[Tensor], float] | None = None,
) -> Iterator[Made]:
    """Solves W (rows, d) on its layer Hessian H (d, d) for all that `contents` asks for, one entry at a time.

    `run` and `budget_bytes` are as in `prune`; `judge` is the loss of candidate weights on held-out samples, by which
    solvers that compare candidates then choose. Raises `OptionError` and `NumericalError`.

    >>> W = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    >>> contents = Contents(patterns=("weight",), levels=(0.25, 0.5), bits=(), joint=())
    >>> [(made.asked, made.weights.tolist()) for made in entries_of(W, torch.eye(4), contents)]
    [(0.25, [[4.0, 0.0, 3.0, 2.0]]), (0.5, [[4.0, 0.0, 3.0, 0.0]])]
    """
    options: dict[str, Any] = {"damping": contents.damping, "budget_bytes": budget_bytes, "judge": judge}
    solving = _Solving(W, H, contents, options)
    for pattern in contents.patterns:
        yield from _pruned(solving, pattern, run)
    for bits in contents.bits:
        found = quantize(W, H, contents.spec(bits), work=contents.work / 5, **options)
        yield _on_grid(f"{bits} bit", W, found)
    kinds = contents.kinds[len(contents.kinds) - len(contents.joint) :]
    for kind, (pattern, sparsity, bits) in zip(kinds, contents.joint, strict=True):
        found = prune_and_quantize(
            W, H, contents.spec(bits), pattern, sparsity, run=run, work=contents.work / 5, **options
        )
        yield _on_grid(kind, W, found)


def _pruned(solving: _Solving, pattern: str, run: int | None) -> Iterator[Made]:
    W, H, contents, options = solving.W, solving.H, solving.contents, solving.options
    parsed = parse_pattern(pattern)
    levels = (None,) if parsed.kind == "n:m" else contents.levels_of(parsed)
    problem = pruning(
        W, H, pattern, levels[-1], run=run, damping=contents.damping, budget_bytes=options["budget_bytes"]
    )
    solver = contents.solver
    groups = math.ceil(problem.rows / problem.units.rows)
    affords = solver != "exact_obs" or _elimination(groups, problem.d) <= contents.work
    if solver == "exact_obs" and affords and levels[0] is not None:
        yield from _nested(W, problem.W, problem.damped, problem.units, pattern, contents, options["budget_bytes"])
        return
    for level in levels:
        found = prune(
            W,
            H,
            pattern,
            level,
            solver=solver if affords else "best",
            run=run,
            work=contents.work / len(levels),
            **options,
        )
        weights, damping = found.weights, found.damping
        if found.solver in _NOT_REFITTED or bool((W == 0).any()):
            weights = refitted(W, problem.damped, found.pruned, options["budget_bytes"])
            damping = problem.damped.damping
        chosen = problem.units.sums(found.pruned.double()) > 0
        yield Made(
            kind=pattern,
            asked=level,
            weights=weights,
            bytes=_size(weights, parsed),
            solver=found.solver,
            damping=damping,
            tensors={"mask": _fields(chosen, 1)},
            notes=found.notes if affords else (*found.notes, f"{pattern}: work does not pay for exact_obs."),
        )


def _nested(
    W: Tensor, start: Tensor, damped: Damped, units: Units, pattern: str, contents: Contents, budget_bytes: int
) -> Iterator[Made]:
    levels = contents.levels_of(parse_pattern(pattern))
    found = eliminate(start, damped.inverse, units, budget_bytes=budget_bytes)
    first = first_level(found, [round(level * W.numel()) for level in levels], len(W))
    width = len(levels).bit_length()
    tensors = {"first": _fields(first, width)}
    for level, sparsity in enumerate(levels):
        weights = refitted(W, damped, units.mask(first <= level, *W.shape), budget_bytes)
        yield Made(
            kind=pattern,
            asked=sparsity,
            level=level,
            weights=weights,
            bytes=_size(weights, parse_pattern(pattern)),
            solver="exact_obs",
            damping=damped.damping,
            tensors=tensors,
            notes=damped.notes,
        )
        tensors = {}


def first_level(found: Elimination, zeros: list[int], rows: int) -> Tensor:
    """Of each unit (row groups, n) the first of these levels, numbers of zeros, where it is gone; their count if never.

    Level by level what `Elimination.counts` gives: the heap takes steps in the order of their pooled prices, which one
    stable sort has too.

    >>> order, losses = torch.tensor([[1, 0]]), torch.tensor([[0.5, 4.5]])
    >>> first_level(Elimination(order, losses, Units(torch.tensor([[0], [1]]))), [1], rows=1).tolist()
    [[1, 0]]
    """
    order = found.order.long()
    sizes = found.units.weights_of_each(len(order), rows).to(order.device).gather(1, order)
    taken = ascending(found.losses, sizes).flatten().argsort(stable=True)
    before = sizes.flatten()[taken].cumsum(0) - sizes.flatten()[taken]
    level = torch.searchsorted(torch.tensor(zeros).to(order.device), before, right=True)
    step = torch.empty_like(level).scatter_(0, taken, level).view_as(order)
    never = torch.full((len(order), len(found.units.columns)), len(zeros), device=order.device)
    return never.scatter_(1, order, step)


def refitted(W: Tensor, damped: Damped, pruned: Tensor, budget_bytes: int) -> Tensor:
    """W (rows, d) with zeros where `pruned` and all else refitted, as `prune` delivers it.

    Weights of dead inputs stay as they are, and zeros that W came with stay zeros.
    """
    pruned = pruned | (W == 0)
    weights = refit_rows(W.double().masked_fill(damped.dead, 0.0), damped, pruned, budget_bytes).to(W.dtype)
    return torch.where(damped.dead & ~pruned, W, weights)


@dataclasses.dataclass(frozen=True, eq=False)
class Settled:
    """What an entry fixes before any data is seen: which weights are zero, or integers on a grid."""

    pruned: Tensor | None = None
    integers: Tensor | None = None
    grid: Grid | None = None


def settled(
    kind: str,
    bits: int | None,
    level: int | None,
    shape: tuple[int, int],
    run: int,
    contents: Contents,
    tensor: Callable[[str], Tensor],
) -> Settled:
    """Reads an entry back; `tensor` gives what was stored of it by its name."""
    rows, d = shape
    if bits is not None:
        chunk = d if contents.chunk is None else min(contents.chunk, d)
        grid = Grid(tensor("scale"), tensor("zero_point").to(torch.int32), bits, chunk)
        integers = _unpacked(tensor("integers"), (rows, d), bits) + grid.low
        return Settled(integers=integers, grid=grid)
    units = units_of(kind, rows, d, run)
    each = (math.ceil(rows / units.rows), len(units.columns))
    if level is None:
        return Settled(pruned=units.mask(_unpacked(tensor("mask"), each, 1) > 0, rows, d))
    width = len(contents.levels_of(parse_pattern(kind))).bit_length()
    return Settled(pruned=units.mask(_unpacked(tensor("first"), each, width) <= level, rows, d))


def _on_grid(kind: str, W: Tensor, found: Quantized) -> Made:
    grid = found.grid
    zero_point = grid.at(torch.arange(W.shape[1], device=W.device))[1].to(torch.int32)
    integers = torch.where(W == 0, zero_point, found.integers)
    weights = grid.values(integers).to(W.dtype)
    tensors = {
        "integers": _fields(integers - grid.low, grid.bits),
        "scale": grid.scale.cpu().contiguous(),
        "zero_point": grid.zero_point.to(torch.int8).cpu().contiguous(),
    }
    zeros = int((weights == 0).sum())
    # With many zeros a mask and the integers that are left are smaller than all integers.
    sparse = bytes_of(integers.numel(), 1) + bytes_of(integers.numel() - zeros, grid.bits)
    size = min(sparse, tensors["integers"].nbytes) + tensors["scale"].nbytes + tensors["zero_point"].nbytes
    return Made(
        kind=kind,
        bits=grid.bits,
        weights=weights,
        bytes=size,
        solver=found.solver,
        damping=found.damping,
        tensors=tensors,
        notes=found.notes,
    )


def _size(weights: Tensor, pattern: Pattern) -> int:
    hints = {"w": f"nm:{pattern.n}:{pattern.m}:1"} if pattern.kind == "n:m" else {}
    return pack.code({"w": weights.cpu()}, hints)["w"].coded_bytes


def _fields(values: Tensor, width: int) -> Tensor:
    return torch.from_numpy(pack_fields(values.cpu().flatten().to(torch.uint16).numpy(), width))


def _unpacked(packed: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    fields = unpack_fields(packed.numpy(), shape[0] * shape[1], width)
    return torch.from_numpy(fields).to(torch.int32).view(shape)
