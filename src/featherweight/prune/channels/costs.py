# SPDX-License-Identifier: Apache-2.0
"""What is left of a model's cost when couplings go, and what one more of each group would free: pure counting.

A cost is a sum of products of axis sizes, and a size is linear in how many couplings of each group are kept
(`graph.Trace`). So what the next cut frees is a difference of products, for all groups in one pass over arrays, and a
greedy choice can count anew after every removal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from featherweight.graph import Size, Trace

__all__ = ["COSTS", "Cost", "cost_of", "fixed_cost", "terms"]

COSTS = ("macs", "parameters", "bytes", "memory")
Term = tuple[int, tuple[Size, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """A sum of `coefficient` x product of sizes, where sizes are `fixed + each @ kept`; groups in the order of `names`.

    `factors` (terms, most factors) are rows of `fixed` and `each`; the last row of both is the constant 1. `pairs` are
    (term, group) wherever a term depends on a group.
    """

    names: tuple[str, ...]
    constant: float
    coefficient: np.ndarray
    factors: np.ndarray
    fixed: np.ndarray
    each: np.ndarray
    pairs: tuple[np.ndarray, np.ndarray]

    def total(self, kept: np.ndarray) -> float:
        """The cost with `kept` (groups,) couplings of each group."""
        return self.constant + float((self.coefficient * self._sizes(kept)[self.factors].prod(1)).sum())

    def freed(self, kept: np.ndarray, going: np.ndarray | int = 1) -> np.ndarray:
        """What the cost falls by if `going` more couplings of one group went: (groups,), each group by itself."""
        term, group = self.pairs
        sizes = self._sizes(kept)[self.factors[term]]
        steps = self.each[self.factors[term], group[:, None]] * np.broadcast_to(going, len(self.names))[group, None]
        saved = self.coefficient[term] * (sizes.prod(1) - (sizes - steps).prod(1))
        return np.bincount(group, weights=saved, minlength=len(self.names))

    def left(self, kept: np.ndarray) -> np.ndarray:
        """What is left of the terms in which each group has a part: (groups,)."""
        term, group = self.pairs
        values = self.coefficient * self._sizes(kept)[self.factors].prod(1)
        return np.bincount(group, weights=values[term], minlength=len(self.names))

    def _sizes(self, kept: np.ndarray) -> np.ndarray:
        sizes: np.ndarray = self.fixed + self.each @ kept
        return sizes


def cost_of(trace: Trace, kind: str, model: nn.Module) -> Cost:
    """`macs`, `parameters`, `bytes` (of parameters and buffers as they are stored) or `memory` (`Trace.memory`)."""
    return fixed_cost(terms(trace, kind, model), trace.sizes)


def terms(trace: Trace, kind: str, model: nn.Module) -> list[Term]:
    """A cost as a list of coefficients and the sizes that each is multiplied by."""
    if kind == "macs":
        return [op.macs for op in trace.ops if op.macs[0]]
    if kind == "memory":
        return [(1, op.output) for op in trace.ops if op.macs[0] and op.weight is not None]
    if kind == "parameters":
        return [(1, axes) for axes in trace.sizes_of.values()]
    return _bytes(trace, model)


def _bytes(trace: Trace, model: nn.Module) -> list[Term]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    wide = next((p.element_size() for p in tensors.values()), 4)  # of a weight that a parametrization computes
    found = [(tensors[name].element_size() if name in tensors else wide, axes) for name, axes in trace.sizes_of.items()]
    stored = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in stored:
            found.append((buffer.element_size(), _axes(trace, name, tuple(buffer.shape))))
    return found


def _axes(trace: Trace, tensor: str, shape: Sequence[int]) -> tuple[Size, ...]:
    """The axes of a tensor as sizes, from the positions that its members lose."""
    fixed, groups = list(shape), [dict[str, int]() for _ in shape]
    for group in trace.groups:
        for member in group.members:
            if member.tensor == tensor:
                each = member.positions.shape[1]
                fixed[member.axis] -= each * group.size
                groups[member.axis][group.name] = groups[member.axis].get(group.name, 0) + each
    return tuple(Size(f, g) for f, g in zip(fixed, groups, strict=True))


def fixed_cost(terms: Iterable[Term], sizes: Mapping[str, int]) -> Cost:
    """Terms as arrays. `sizes` are the couplings of each group, in the order that all arrays have.

    >>> cost = fixed_cost([(2, (Size(1, {"a": 1}), Size(3)))], {"a": 4})
    >>> cost.total(np.array([4])), cost.freed(np.array([4]))
    (30.0, array([6.]))
    """
    names = tuple(sizes)
    at = {name: i for i, name in enumerate(names)}
    rows: dict[tuple[int, frozenset[tuple[str, int]]], int] = {}  # sizes that are equal are counted once
    known: list[Size] = []
    constant, coefficients, factors = 0.0, [], []
    for coefficient, axes in terms:
        varying = [size for size in axes if size.groups]
        value = float(coefficient * np.prod([size.fixed for size in axes if not size.groups], dtype=np.float64))
        if not varying:
            constant += value
            continue
        indices = []
        for size in varying:
            key = (size.fixed, frozenset(size.groups.items()))
            if key not in rows:
                rows[key] = len(known)
                known.append(size)
            indices.append(rows[key])
        coefficients.append(value)
        factors.append(indices)
    fixed = np.array([*(size.fixed for size in known), 1], dtype=np.float64)
    each = np.zeros((len(known) + 1, len(names)))
    for row, size in enumerate(known):
        for name, count in size.groups.items():
            each[row, at[name]] = count
    most = max(map(len, factors), default=0)
    table = np.array([indices + [len(known)] * (most - len(indices)) for indices in factors], dtype=np.intp)
    table = table.reshape(len(factors), most)
    depends = (each[table] != 0).any(1) if len(factors) else np.zeros((0, len(names)), dtype=bool)
    term, group = depends.nonzero()
    return Cost(names, constant, np.array(coefficients), table, fixed, each, (term, group))
