# SPDX-License-Identifier: Apache-2.0
"""From tensors to codebooks: which values are clustered together, and the tensors that stand for them afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featherweight.errors import NumericalError
from featherweight.layers import Weight, from_matrix, to_matrix
from featherweight.solvers.kmeans import kmeans

__all__ = ["Clustered", "How", "Want", "fit", "refuse_not_finite"]

Array = NDArray[np.floating]
# So many values show whether a tensor has more different ones than asked for, but for one in a thousand.
_PEEK = 1 << 12


@dataclasses.dataclass(frozen=True)
class How:
    """How clusters are found, as `kmeans` and `Cluster` name it."""

    start: str
    keep_zeros: bool
    rate: float
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Want:
    """A tensor that is to take at most `clusters` different values; `importance` broadcasts to its (rows, d)."""

    name: str
    parameter: nn.Parameter
    clusters: int
    weight: Weight | None = None
    importance: Tensor | None = None

    def matrix(self) -> Array:
        """(rows, d) in float32, or float64 where the tensor is; of a vector (1, n)."""
        values = self.parameter.detach()
        matrix = values.reshape(1, -1) if self.weight is None else to_matrix(self.weight, values)
        return matrix.to("cpu", torch.promote_types(values.dtype, torch.float32)).numpy()

    def tensor(self, matrix: Tensor) -> Tensor:
        """A matrix as the tensor has it."""
        if self.weight is None:
            return matrix.reshape(self.parameter.shape)
        return from_matrix(self.weight, matrix)


@dataclasses.dataclass(frozen=True, eq=False)
class Clustered:
    """What `fit` made of a tensor: `values` in its shape and dtype, of `entries` different numbers.

    `error` is Σ (value - before)² / Σ before². `changed` is False where it had few enough values already.
    """

    want: Want
    values: Tensor
    entries: int
    error: float
    changed: bool

    @property
    def name(self) -> str:
        return self.want.name

    @property
    def action(self) -> str:
        return "clustered" if self.changed else "kept"

    @property
    def words(self) -> str:
        """What was done, for the report."""
        if not self.changed:
            return f"it has no more than {self.want.clusters} different values already"
        return f"{self.entries} values, {self.error:.2g} of the weights' square lost"

    @torch.no_grad()
    def write(self) -> None:
        """Puts the values into the tensor, in place."""
        if self.changed:
            self.want.parameter.copy_(self.values)


def refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises `NumericalError` that names the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        values = tensor.detach()
        if bad := int((~values.isfinite()).sum()):
            raise NumericalError(
                f"{name} has {bad} of {values.numel()} values that are NaN or infinite, so that nothing can be clustered. "
                "The model is as it was. Start from a checkpoint before this."
            )


def fit(wants: Sequence[Want], how: How, group: int | None = None) -> Iterator[Clustered]:
    """Clusters tensors that share one codebook, or one tensor by each `group` of its rows. Changes none of them."""
    matrices = [want.matrix() for want in wants]
    if group is None:
        pieces = [(np.concatenate([matrix.reshape(-1) for matrix in matrices]), _spread(wants, matrices))]
    else:
        [matrix], weight = matrices, _spread(wants, matrices)
        weights = None if weight is None else weight.reshape(matrix.shape)
        pieces = [
            (matrix[i : i + group].reshape(-1), None if weights is None else weights[i : i + group].reshape(-1))
            for i in range(0, len(matrix), group)
        ]
    clusters = wants[0].clusters
    parts = []
    for values, weight in pieces:
        if _has_no_more(values, clusters):
            parts.append(values)
            continue
        zero = how.keep_zeros and not values.all()
        found = kmeans(values, clusters, importance=weight, start=how.start, zero=zero, rate=how.rate, seed=how.seed)
        parts.append(found.values)
    flat = np.concatenate(parts)
    at = 0
    for want, matrix in zip(wants, matrices, strict=True):
        yield _clustered(want, matrix, flat[at : at + matrix.size].reshape(matrix.shape))
        at += matrix.size


def _spread(wants: Sequence[Want], matrices: Sequence[Array]) -> Array | None:
    """Importance of all values, one after the other; None where no tensor has any."""
    if all(want.importance is None for want in wants):
        return None
    shown = [np.ones((1, 1)) if want.importance is None else want.importance.cpu().numpy() for want in wants]
    return np.concatenate([np.broadcast_to(w, m.shape).reshape(-1) for w, m in zip(shown, matrices, strict=True)])


def _has_no_more(values: Array, clusters: int) -> bool:
    """Whether there are no more different values than clusters; ordinary floats show it in a glance."""
    return len(np.unique(values[:_PEEK])) <= clusters and len(np.unique(values)) <= clusters


def _clustered(want: Want, before: Array, after: Array) -> Clustered:
    values = torch.from_numpy(np.ascontiguousarray(after)).to(want.parameter.dtype)  # as it will be stored
    gap = values.double().numpy() - before
    square = float(np.square(before, dtype=np.float64).sum())
    lost = float(np.square(gap).sum())
    entries = len(np.unique(after))
    return Clustered(want, want.tensor(values), entries, lost / square if square else 0.0, bool(gap.any()))
