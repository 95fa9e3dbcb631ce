# SPDX-License-Identifier: Apache-2.0
"""Refit where H does not fit into memory: conjugate gradients that see H only as a function V -> V H.

Such a function is the layer run forward and its transpose run back over the samples: twice the layer's own cost, and
the memory of one batch. Rows share H and have masks of their own, so each is a system of its own with a step length of
its own. Exact in as many iterations as a row has free weights; near enough in far fewer where the diagonal
preconditioner is good.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.errors import NumericalError, OptionError

__all__ = ["refit_by_gradients"]


def refit_by_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    pruned: Tensor,
    iterations: int = 50,
    tolerance: float = 1e-6,
    diagonal: Tensor | None = None,
) -> Tensor:
    """V (rows, d) that minimizes ½ tr(V A(V)ᵀ) - tr(V Rᵀ) and is zero where `pruned` (bool, rows x d) is True.

    - `apply`: A, with A(V) = V H for a symmetric, positive semi-definite H (d, d); rows must not mix. A ridge toward W
      is A(V) + λ V, with λ W added to `right`.
    - `right`: R (rows, d); W H (that is, A(W)) asks for what W answers, and the objective is then the layer's loss.
    - `start`: where it begins, W say; a start near the end saves iterations. What is pruned of it is set to zero.
    - `iterations`: at most so many calls of `apply`, and one before them. The objective falls in every one of them.
    - `tolerance`: a row rests once its gradient, weighted by the preconditioner, is that share of its right side.
    - `diagonal`: of H (d,) or of each row's own (rows, d), positive; the preconditioner. None: no preconditioner.

    It works in the dtype of `start`. Raises `OptionError` for shapes that do not fit and `NumericalError` where A is no
    such operator.

    >>> H = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> W = torch.tensor([[1.0, 1.0]])
    >>> refit_by_gradients(lambda V: V @ H, W @ H, W, torch.tensor([[True, False]]))
    tensor([[0.0000, 1.5000]])
    """
    if not right.shape == start.shape == pruned.shape or pruned.dtype != torch.bool:
        raise OptionError(
            f"right, start and the bool mask pruned have one shape (rows, d); got {tuple(right.shape)}, "
            f"{tuple(start.shape)} and {tuple(pruned.shape)}, {pruned.dtype}."
        )
    # Where nothing is preconditioned or there is no input, the gradient itself is the direction.
    inverse = torch.ones_like(start) if diagonal is None else torch.where(diagonal > 0, 1 / diagonal, 1.0).to(start)
    weight = inverse.expand_as(start).masked_fill(pruned, 0.0)
    V = start.masked_fill(pruned, 0.0)
    residual = (right - apply(V)).masked_fill_(pruned, 0.0)
    enough = tolerance**2 * _inner(right * weight, right)
    direction = residual * weight
    size = _inner(direction, residual)
    for _ in range(iterations):
        active = ~(size <= enough)  # NaN is active, and is found below
        if not bool(active.any()):
            break
        curved = apply(direction)
        curvature = _inner(direction, curved)
        _check(curvature, size, active)
        step = torch.where(active & (curvature > 0), size / curvature, 0.0)[:, None].to(V)
        V = V + step * direction
        residual = (residual - step * curved).masked_fill_(pruned, 0.0)
        downhill = residual * weight
        after = _inner(downhill, residual)
        direction = downhill + torch.where(active, after / size, 0.0)[:, None].to(V) * direction
        size = torch.where(active, after, size)
    return V


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Each row's inner product (rows,), summed in float64."""
    return (a * b).sum(1, dtype=torch.float64)


def _check(curvature: Tensor, size: Tensor, active: Tensor) -> None:
    if not bool(torch.isfinite(curvature[active]).all() and torch.isfinite(size[active]).all()):
        raise NumericalError("A(V) holds NaN or infinity: a calibration batch or an activation does.")
    scale = float(curvature.abs().max())
    if float(curvature.min()) < -1e-5 * scale:
        raise NumericalError(
            "A is no V -> V H with H = 2 X Xᵀ / samples: a direction has negative curvature. Is the transpose the layer's own?"
        )
