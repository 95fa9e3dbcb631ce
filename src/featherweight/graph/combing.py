# SPDX-License-Identifier: Apache-2.0
"""`trace`: from a model and inputs to couplings. Labels walk through the graph; the classes left over are couplings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.errors import check_word
from featherweight.graph.capture import capture
from featherweight.graph.couplings import Frozen, Group, Member, Op, Size, Trace
from featherweight.graph.join import lane
from featherweight.graph.limit import limited
from featherweight.graph.rules import RULES
from featherweight.graph.walk import Axis, Extent, Walk, describe

__all__ = ["Assembly", "trace"]


def trace(
    model: nn.Module,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    grain: Literal["heads", "dims"] = "heads",
    seconds: float = 300.0,
) -> Trace:
    """Finds what can be cut out of a model: its couplings, what is frozen and why. Changes nothing.

    `inputs` are the positional arguments of one forward call, or a mapping of keyword arguments; small ones do. `grain`
    says what is cut of attention: whole `heads`, or the same positions of all heads (`dims`). The walk over the graph
    takes time linear in its size; with torch.export's own time it may take `seconds`, then it is stopped.

    The algorithm is Comb's (Comb, Prune, Distill, arXiv 2408.03046) on labels: every channel that a layer makes has
    one, data movement is executed on them, and what meets position by position becomes one class. An op without a rule
    freezes what it touches. Saves nothing by itself: `cut` does.

    Raises `GraphError` for a model that does not run on the inputs, and when time is up.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = trace(model, (torch.zeros(1, 3),))
    >>> [(group.name, group.size) for group in found.groups]
    [('0', 8)]
    >>> [(member.tensor, member.axis, member.role) for member in found["0"].members]
    [('0.weight', 0, 'output'), ('0.bias', 0, 'output'), ('2.weight', 1, 'input')]
    >>> found.parameters(), found.parameters({"0": 4})
    (50, 26)
    """
    check_word("trace", "grain", grain, ("heads", "dims"))
    with limited(seconds, "tracing the model") as deadline:
        walk = Walk(capture(model, inputs), grain, deadline)
        walk.run(RULES)
        return Assembly(walk).trace()


class Assembly:
    """Everything that is told of a finished walk, from the classes of its labels."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        # Tied tensors and those of the model that the forward did not touch keep their size.
        self.own = sorted(walk.axes, key=lambda axis: axis.first)
        self.by_tensor: dict[str, list[Axis]] = {}
        for axis in self.own:
            self.by_tensor.setdefault(axis.tensor, []).append(axis)
        ids = torch.arange(walk.labels.count)
        self.roots = walk.labels.roots(ids)
        self._freeze_unmade()
        self.index = np.full(walk.labels.count, -1)  # by root: the number of its group
        self._classes: list[np.ndarray] = []  # of each group its roots, in order of its couplings
        self.groups = self._group()

    def classes_of(self, name: str) -> np.ndarray:
        """The root of each coupling of a group."""
        return next(roots for group, roots in zip(self.groups, self._classes, strict=True) if group.name == name)

    def _freeze_unmade(self) -> None:
        """Positions that no layer makes (a table's rows that nothing contracts) are nobody's channels."""
        heard = self.walk.heard
        made, layered = np.zeros((2, self.walk.labels.count), dtype=bool)
        for axis in self.own:
            if axis.role in ("output", "scale") and axis.tensor in heard:
                made[self._roots(axis)] = True
            if axis.tensor in self.walk.weights:
                layered[self._roots(axis)] = True
        self.walk.labels.now = None
        for there, why in (
            (made, "no layer makes it, or no output follows from it"),
            (layered, "no layer's weight has it"),
        ):
            self.walk.labels.freeze(torch.from_numpy(np.flatnonzero(~there[self.roots])), why)

    def _roots(self, axis: Axis) -> np.ndarray:
        return self.roots[axis.first : axis.first + axis.size]

    def _group(self) -> tuple[Group, ...]:
        """Classes by the axes of their positions; alike classes are a group, in the order of their first position."""
        where = np.repeat(np.arange(len(self.own)), [axis.size for axis in self.own])
        position = np.concatenate([np.arange(axis.size) for axis in self.own] or [np.empty(0, int)])
        root = np.concatenate([self._roots(axis) for axis in self.own] or [np.empty(0, int)])
        free = ~self.walk.labels.is_frozen(root)
        where, position, root = where[free], position[free], root[free]
        order = np.lexsort((position, where, root))
        where, position, root = where[order], position[order], root[order]
        classes, starts = np.unique(root, return_index=True)
        bounds = [*starts.tolist(), len(root)]
        alike: dict[bytes, list[int]] = {}
        for i in range(len(classes)):
            alike.setdefault(where[bounds[i] : bounds[i + 1]].tobytes(), []).append(i)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for rows in sorted(alike.values(), key=lambda rows: bounds[rows[0]]):
            if len(rows) < 2:
                self._alone(classes[rows[0]])
                continue
            self.index[classes[rows]] = len(found)
            self._classes.append(classes[rows])
            one = where[bounds[rows[0]] : bounds[rows[0] + 1]]
            found.append((one, np.stack([position[bounds[i] : bounds[i + 1]] for i in rows])))
        heads = set(self._touched(torch.cat([torch.empty(0, dtype=torch.int64), *self.walk.joiner.heads])))
        told: dict[int, dict[str, None]] = {}
        for labels, text in self.walk.statistics:
            for i in self._touched(labels):
                told.setdefault(i, {})[text] = None
        taken: dict[str, int] = {}
        return tuple(
            Group(
                self._name(one, taken),
                len(rows),
                tuple(self._members(one, rows)),
                "heads" if i in heads else "channels",
                tuple(told.get(i, ())),
            )
            for i, (one, rows) in enumerate(found)
        )

    def _members(self, where: np.ndarray, rows: np.ndarray) -> Iterable[Member]:
        for i in dict.fromkeys(where.tolist()):
            own = self.own[i]
            yield Member(own.tensor, own.axis, own.role or "scale", rows[:, where == i])

    def _touched(self, labels: Tensor) -> list[int]:
        """The groups that these labels are of."""
        found = np.unique(self.index[self.roots[labels.numpy()]])
        return [int(i) for i in found if i >= 0]

    def _alone(self, root: int) -> None:
        """A group of one channel cannot lose it."""
        self.walk.labels.now = None
        self.walk.labels.freeze(torch.tensor([root]), "it is the only one of its kind")

    def _name(self, where: np.ndarray, taken: dict[str, int]) -> str:
        axes = [self.own[i] for i in dict.fromkeys(where.tolist())]
        makers = [axis.tensor for axis in axes if axis.role == "output" and axis.tensor in self.walk.weights]
        tensor = (makers or [axis.tensor for axis in axes if axis.role == "output"] or [axes[0].tensor])[0]
        layer, _, leaf = tensor.rpartition(".")
        name = layer if leaf == "weight" and layer else tensor
        taken[name] = taken.get(name, 0) + 1
        return name if taken[name] == 1 else f"{name}#{taken[name]}"

    # What follows from the groups ----------------------------------------------------------------------------------

    def trace(self) -> Trace:
        walk = self.walk
        sizes_of = {
            name: self._tensor_sizes(name, tuple(tensor.shape))
            for name, tensor in walk.state.items()
            if isinstance(tensor, nn.Parameter)
        }
        notes = list(walk.captured.notes)
        notes += [f"{op} has no rule ({count} times); what it touches is frozen" for op, count in walk.unknown.items()]
        return Trace(
            groups=self.groups,
            frozen=tuple(self._frozen()),
            ops=tuple(self._ops()),
            coverage=self._coverage(sizes_of),
            front=walk.captured.front,
            notes=tuple(notes),
            shapes={name: tuple(tensor.shape) for name, tensor in walk.state.items()},
            sizes_of=sizes_of,
            grain=walk.joiner.grain,
        )

    def _size(self, labels: np.ndarray | None, extent: int) -> Size:
        if labels is None:
            return Size(extent)
        roots = self.roots[labels]
        group = self.index[roots]
        counts: dict[str, int] = {}
        for i in np.unique(group[group >= 0]).tolist():
            mine = roots[group == i]
            counts[self.groups[i].name] = len(mine) // len(np.unique(mine))
        return Size(extent - int((group >= 0).sum()), counts)

    def _tensor_sizes(self, name: str, shape: tuple[int, ...]) -> tuple[Size, ...]:
        axes = {axis.axis: axis for axis in self.by_tensor.get(name, ())}
        return tuple(
            self._size(np.arange(axes[i].first, axes[i].first + axes[i].size) if i in axes else None, size)
            for i, size in enumerate(shape)
        )

    def _extent(self, extent: Extent) -> Size:
        size, axis, planes = extent
        for plane in planes:
            roots = self.roots[plane.numpy()]  # may have been of several axes before all was rectangular
            if (roots != roots.take([0], axis)).any():
                found = self._size(lane(plane, axis).numpy(), size)
                if found.groups:
                    return found
        return Size(size)

    def _ops(self) -> Iterable[Op]:
        for product in self.walk.products:
            output = tuple(self._extent(extent) for extent in product.output)
            coefficient, factors = product.macs
            if coefficient or any(size.groups for size in output):
                _, source, layer = describe(product.node)
                yield Op(
                    layer,
                    product.op,
                    source,
                    product.weight,
                    output,
                    (coefficient, tuple(self._extent(e) for e in factors)),
                )

    def _frozen(self) -> Iterable[Frozen]:
        labels = self.walk.labels
        for own in self.own:
            roots = self._roots(own)
            # A class may have become frozen, or a group of one, after its label was made.
            causes = Counter(labels.cause(root) for root in roots[self.index[roots] < 0].tolist())
            for cause, positions in causes.items():
                node, why = cause if isinstance(cause, tuple) else (None, "")
                op, source, _ = describe(node)
                yield Frozen(own.tensor, own.axis, positions, op, source, why)

    def _coverage(self, sizes_of: Mapping[str, tuple[Size, ...]]) -> float:
        total = cuttable = 0.0
        for name in self.walk.weights:
            if name not in sizes_of:
                continue
            shape = self.walk.state[name].shape
            elements = float(np.prod(shape))
            kept = float(np.prod([size.fixed / full for size, full in zip(sizes_of[name], shape, strict=True)]))
            total += elements
            cuttable += elements * (1 - kept)
        return cuttable / total if total else 0.0
