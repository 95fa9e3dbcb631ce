# SPDX-License-Identifier: Apache-2.0
"""Labels: position by position, which channel is this? And the union-find that says which channels are one.

A label is a whole number; 0 stands for "no channel". A tensor carries **planes**: each is a tensor of labels of the
tensor's own rank, with size 1 along every axis on which it does not vary. One plane says which channel a position
belongs to along one axis (a conv's output varies along axis 1); a weight has one plane an axis; and a product of two
labelled axes, such as channels x hidden tokens of a mixer, is simply two planes. Straight after a view, a plane may
vary along several axes (heads x positions in a head): what removes a channel must leave a tensor rectangular, so such a
plane is brought down to one axis as soon as an operation needs to know which (`settle`), and all that are left at the
end.

Labels are frozen rather than joined to 0, so that each remembers what froze it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Labels", "best_axis", "expand", "free_along", "keep_axis", "shrink", "tidy", "varies"]

Shape = tuple[int, ...]


class Labels:
    """The union-find over labels. All operations are vectorised and take time linear in the labels that they touch."""

    def __init__(self) -> None:
        self.count = 1
        self._parent = np.zeros(1024, dtype=np.int64)
        self._cause = np.zeros(1024, dtype=np.int32)  # by root: 0 free, else number of the cause + 1
        self._cause[0] = 1
        self.causes: list[object] = [None]  # what froze something; entry 0 is the label 0 itself
        self.now: object = None  # what is being worked on, to be named as a cause

    def fresh(self, count: int) -> Tensor:
        """So many new labels, a channel each."""
        first, self.count = self.count, self.count + count
        while self.count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
            self._cause = np.concatenate([self._cause, np.zeros_like(self._cause)])
        self._parent[first : self.count] = np.arange(first, self.count)
        return torch.arange(first, self.count)

    def roots(self, labels: Tensor) -> np.ndarray:
        """The class of each label, whether frozen or not."""
        ids = labels.numpy()
        found: np.ndarray = self._parent[ids]
        while True:
            further = self._parent[found]
            if np.array_equal(further, found):
                break
            found = further
        self._parent[ids] = found
        return found

    def classes(self, labels: Tensor) -> Tensor:
        """The class of each label that is free, 0 for what is frozen."""
        roots = self.roots(labels)
        return torch.from_numpy(np.where(self._cause[roots] == 0, roots, 0))

    def cause(self, root: int) -> object:
        return self.causes[self._cause[root] - 1] if self._cause[root] else None

    def is_frozen(self, roots: np.ndarray) -> np.ndarray:
        return np.asarray(self._cause[roots] != 0)

    def freeze(self, labels: Tensor, why: str) -> None:
        """These may not be cut, because of what is being worked on."""
        roots = np.unique(self.roots(labels))
        roots = roots[self._cause[roots] == 0]
        if len(roots):
            self.causes.append((self.now, why))
            self._cause[roots] = len(self.causes)

    def unite(self, a: Tensor, b: Tensor, why: str = "it meets positions that are no channels") -> None:
        """Position by position (the shapes broadcast), these are one channel. What meets label 0 is frozen."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        pairs = _distinct(a, b)
        plain = (pairs == 0).any(axis=1)
        if plain.any():
            self.freeze(torch.from_numpy(pairs[plain].max(axis=1)), why)
        left, right = pairs[~plain, 0], pairs[~plain, 1]
        before = self.roots(torch.from_numpy(np.unique(pairs[~plain])))
        frozen = before[self._cause[before] != 0]
        while len(left):
            left, right = self.roots(torch.from_numpy(left)), self.roots(torch.from_numpy(right))
            apart = left != right
            left, right = left[apart], right[apart]
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))
        # What was frozen freezes the class that it came into; the first cause wins.
        for root, was in sorted(zip(self.roots(torch.from_numpy(frozen)).tolist(), frozen.tolist(), strict=True)):
            if self._cause[root] == 0 or self._cause[was] < self._cause[root]:
                self._cause[root] = self._cause[was]


def _distinct(a: Tensor, b: Tensor) -> np.ndarray:
    """The distinct pairs of unequal labels, (n, 2)."""
    # Axes along which neither varies are stride 0 in both, and need be looked at only once.
    for axis in range(a.ndim):
        if a.stride(axis) == 0 and b.stride(axis) == 0 and a.shape[axis] > 1:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
    unequal = x != y
    x, y = x[unequal], y[unequal]
    if not len(x):
        return np.empty((0, 2), dtype=np.int64)
    keys = np.unique(x * (2**31) + y)
    return np.stack([keys // 2**31, keys % 2**31], axis=1)


def varies(labels: Labels, plane: Tensor) -> tuple[int, ...]:
    """The axes along which a plane's classes differ."""
    classes = labels.classes(plane.contiguous())
    return tuple(
        axis
        for axis in range(plane.ndim)
        if plane.shape[axis] > 1 and bool((classes != classes.narrow(axis, 0, 1)).any())
    )


def shrink(plane: Tensor) -> Tensor:
    """The plane with size 1 along the axes on which its labels do not vary."""
    for axis in range(plane.ndim):
        if plane.shape[axis] > 1:
            first = plane.narrow(axis, 0, 1)
            if plane.stride(axis) == 0 or bool((plane == first).all()):
                plane = first
    return plane.contiguous()


def tidy(labels: Labels, plane: Tensor) -> Tensor:
    """The plane with size 1 along the axes on which its classes do not vary (any more)."""
    if sum(size > 1 for size in plane.shape) > 1:
        along = varies(labels, plane)
        for axis in range(plane.ndim):
            if axis not in along and plane.shape[axis] > 1:
                plane = plane.narrow(axis, 0, 1)
    return plane


def expand(plane: Tensor, shape: Sequence[int]) -> Tensor:
    """The plane at the tensor's full shape, without memory for the axes on which it does not vary."""
    return plane.expand(tuple(shape))


def keep_axis(labels: Labels, plane: Tensor, axis: int) -> Tensor:
    """Makes a plane vary along one axis only, by uniting all labels that share a position of it."""
    if plane.shape[axis] == 1 and plane.numel() > 1:
        labels.unite(plane.reshape(-1), plane.reshape(-1)[:1])
    else:
        first = plane
        for other in range(plane.ndim):
            if other != axis and plane.shape[other] > 1:
                first = first.narrow(other, 0, 1)
        labels.unite(plane, first)
        plane = first
    return plane if plane.shape[axis] > 1 else plane.reshape(-1)[:1].reshape((1,) * plane.ndim)


def best_axis(labels: Labels, plane: Tensor, axes: Iterable[int]) -> int | None:
    """Of these axes the first that would leave two or more free channels apart; None where there is none."""
    for axis in axes:
        if free_along(labels, plane, axis) > 1:
            return axis
    return None


def free_along(labels: Labels, plane: Tensor, axis: int) -> int:
    """How many free channels a plane would have if it were brought down to this axis."""
    classes = labels.classes(plane.contiguous())
    rows = classes.movedim(axis, 0).reshape(plane.shape[axis], -1).numpy()
    uniques, flat = np.unique(rows, return_inverse=True)
    flat = flat.reshape(rows.shape)
    parent = np.arange(len(uniques))
    changed = True
    while changed:  # all classes of a row are one; spread the smallest until nothing changes
        mapped = parent[flat]
        low = mapped.min(axis=1, keepdims=True)
        new = parent.copy()
        np.minimum.at(new, mapped.reshape(-1), np.broadcast_to(low, mapped.shape).reshape(-1))
        new = new[new]
        changed = not np.array_equal(new, parent)
        parent = new
    frozen = {int(parent[i]) for i in range(len(uniques)) if uniques[i] == 0}
    return len(set(parent.tolist()) - frozen)
