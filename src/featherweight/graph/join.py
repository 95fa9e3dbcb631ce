# SPDX-License-Identifier: Apache-2.0
"""What meets position by position is one channel: the two operations that all computing ops come down to.

`join` is for operands that broadcast against each other (add, mul, where, ...). `contract` is for sums of products
(linear, matmul, attention, einsum, and conv over its channels): the same join in the space of all its indices, then the
contracted ones are gone. What pins a channel: an operand that has its size there and no channels of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from featherweight.graph.labels import Labels, best_axis, keep_axis, shrink, varies

__all__ = ["Join", "Value", "aligned", "lane", "vector"]

Planes = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph: its shape, and its planes of labels.

    `uniform` is for tensors of one value throughout that are made to size (zeros, ones): they fit whatever they meet.
    `fits` are the axes along which it is one position expanded, which fits too. `tensor` names the tensor of the model
    that it is, or is moved data of.
    """

    shape: tuple[int, ...]
    planes: Planes = ()
    uniform: bool = False
    fits: frozenset[int] = frozenset()
    tensor: str | None = None

    @property
    def extents(self) -> tuple[int, ...]:
        """Its shape as whatever it meets feels it."""
        return tuple(1 if axis in self.fits else size for axis, size in enumerate(self.shape))


def aligned(value: Value, rank: int) -> Value:
    """With leading axes of size 1, as broadcasting has them."""
    more = (1,) * (rank - len(value.shape))
    planes = tuple(plane.reshape(more + tuple(plane.shape)) for plane in value.planes)
    fits = frozenset(axis + len(more) for axis in value.fits)
    return dataclasses.replace(value, shape=more + value.shape, planes=planes, fits=fits)


class Join:
    """Joining under a preference: of a plane that varies along several axes, which one shall stay.

    `heads` keeps the outer one, so that whole attention heads are the unit; `dims` the inner one.
    """

    def __init__(self, labels: Labels, grain: Literal["heads", "dims"]) -> None:
        self.labels, self.grain = labels, grain
        self.heads: list[Tensor] = []

    def settle(self, plane: Tensor, axes: Sequence[int], why: str) -> Tensor | None:
        """Brings a plane down to the preferred one of `axes` that leaves channels apart; freezes it where none does."""
        order = sorted(axes, reverse=self.grain == "dims")
        axis = best_axis(self.labels, plane, order)
        if axis is None:
            self.labels.freeze(plane.reshape(-1), why)
            return None
        return keep_axis(self.labels, plane, axis)

    def pin(self, value: Value, axes: Iterable[int], why: str) -> Value:
        """No channel may be cut along these axes: what varies along others too is united, the rest is frozen."""
        fixed, planes = set(axes), []
        for plane in value.planes:
            along = set(varies(self.labels, plane))
            if not along & fixed:
                planes.append(plane)
                continue
            settled = self.settle(plane, sorted(along - fixed), why)
            if settled is not None:
                planes.append(settled)
        return dataclasses.replace(value, planes=tuple(planes))

    def join(self, operands: Sequence[Value], why: str = "it meets a tensor without channels") -> Planes:
        """The planes of operands that broadcast. All are of one rank."""
        parts = [part for part in operands if not part.uniform]
        planes = [[p for p in part.planes if varies(self.labels, p)] for part in parts]
        for _ in range(8):  # each round brings some plane down an axis, and planes have few
            if not self._bring_down(parts, planes, why):
                break
        found: dict[tuple[int, ...], Tensor] = {}
        for i, mine in enumerate(planes):
            for plane in mine:
                along = varies(self.labels, plane)
                if not along:
                    continue
                for k, part in enumerate(parts):
                    there = all(part.extents[axis] > 1 for axis in along)
                    if k != i and there and not any(varies(self.labels, p) == along for p in planes[k]):
                        self.labels.freeze(plane.reshape(-1), why)
                if along in found:
                    self.labels.unite(found[along], plane)
                else:
                    found[along] = plane
        return tuple(plane for plane in found.values() if varies(self.labels, plane))

    def _bring_down(self, parts: Sequence[Value], planes: list[list[Tensor]], why: str) -> bool:
        """One plane of several axes is brought down, if what it meets asks for that."""
        for i, mine in enumerate(planes):
            for j, plane in enumerate(mine):
                along = varies(self.labels, plane)
                if len(along) < 2:
                    continue
                for k, part in enumerate(parts):
                    if k == i:
                        continue
                    axes = self._asked(along, part, planes[k])
                    if axes is not None:
                        settled = self.settle(plane, axes, why)
                        mine[j : j + 1] = [] if settled is None else [settled]
                        return True
                for other in mine[:j] + mine[j + 1 :]:  # two planes of one tensor share an axis
                    if set(varies(self.labels, other)) & set(along):
                        settled = self.settle(plane, along, why)
                        mine[j : j + 1] = [] if settled is None else [settled]
                        return True
        return False

    def _asked(self, along: tuple[int, ...], part: Value, planes: list[Tensor]) -> tuple[int, ...] | None:
        """To which axes a plane must come down to meet this operand; None where it may stay as it is."""
        there = [axis for axis in along if part.extents[axis] > 1]
        if not there or any(varies(self.labels, p) == along for p in planes):
            return None
        labelled = {axis for p in planes for axis in varies(self.labels, p)}
        return tuple(axis for axis in along if axis not in there or axis in labelled)

    def contract(
        self,
        operands: Sequence[Value],
        letters: Sequence[str],
        output: str,
        why: str = "it reads a tensor without channels, as the model's inputs are",
    ) -> tuple[Value, dict[str, tuple[int, int, Planes]]]:
        """A sum of products in Einstein's notation, one letter an axis.

        Gives the output, and for each letter its extent and the planes along it (what sizes of the operation follow
        from).
        """
        extents: dict[str, int] = {}
        for value, word in zip(operands, letters, strict=True):
            for letter, size in zip(word, value.shape, strict=True):
                extents[letter] = max(extents.get(letter, 1), size)
        order = [*output, *(letter for letter in extents if letter not in output)]
        placed = [_placed(value, word, order) for value, word in zip(operands, letters, strict=True)]
        planes = []
        for plane in self.join(placed, why):
            along = varies(self.labels, plane)
            gone = [axis for axis in along if axis >= len(output)]
            if gone and len(along) > 1:
                settled = self.settle(plane, along, why)
                if settled is None:
                    continue
                plane = settled
            planes.append(plane)
        if not any(value.tensor for value in operands):  # a batch of products: one a head
            shared = [axis for axis, letter in enumerate(output) if all(letter in word for word in letters)]
            self.heads += [p.reshape(-1) for p in planes if set(varies(self.labels, p)) & set(shared)]
        sizes = {
            letter: (extents[letter], axis, tuple(p for p in planes if p.shape[axis] > 1))
            for axis, letter in enumerate(order)
        }
        shape = tuple(extents[letter] for letter in output)
        kept = [p for p in planes if all(axis < len(output) for axis in varies(self.labels, p))]
        return Value(shape, tuple(shrink(_cropped(p, len(output))) for p in kept)), sizes


def _placed(value: Value, word: str, order: Sequence[str]) -> Value:
    """The value with its axes where the letters stand in `order`, size 1 for letters that it lacks."""
    index = [word.index(letter) if letter in word else None for letter in order]

    def place(tensor: Tensor) -> Tensor:
        tensor = tensor.permute([i for i in index if i is not None])
        for axis, i in enumerate(index):
            if i is None:
                tensor = tensor.unsqueeze(axis)
        return tensor

    shape = tuple(1 if i is None else value.shape[i] for i in index)
    fits = frozenset(axis for axis, i in enumerate(index) if i in value.fits)
    return Value(shape, tuple(place(plane) for plane in value.planes), value.uniform, fits)


def _cropped(plane: Tensor, rank: int) -> Tensor:
    for _ in range(plane.ndim - rank):
        plane = plane.select(-1, 0)
    return plane


def lane(plane: Tensor, axis: int) -> Tensor:
    """The labels along one axis, at the first position of all others."""
    for other in reversed(range(plane.ndim)):
        if other != axis:
            plane = plane.select(other, 0)
    return plane


def vector(labels: Labels, value: Value, axis: int) -> Tensor | None:
    """The labels along one axis, or None where it has no channels. The value's planes are settled already."""
    for plane in value.planes:
        if axis in varies(labels, plane):
            return lane(plane, axis)
    return None
