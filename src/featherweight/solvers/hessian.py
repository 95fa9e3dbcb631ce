# SPDX-License-Identifier: Apache-2.0
"""The layer Hessian: checked, damped and factorized once, then shared by every solver of this room.

Convention, stated here once: X is (d, samples), H = 2 X Xᵀ / samples, W is (rows, d) and a row w keeps the same H.
The loss of V in W's place is ½ Σ_rows (w - v) H (w - v)ᵀ = ||(W - V) X||² / samples, the layer's true error.

Inputs that were never active are found before damping hides them. Damping is relative to the mean of the live diagonal
and grows tenfold until the Cholesky factor exists; how far it grew is kept and said. Solvers work on the damped H, that
is, on the loss plus ½ λ ||W - V||²: a ridge toward W. Losses that are reported use the H that was given.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from featherweight.errors import NumericalError, OptionError

__all__ = ["Damped", "damp", "layer_loss"]

_MOST_DAMPING = 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class Damped:
    """A positive definite layer Hessian in float64 with its lower Cholesky factor.

    `damping` is what was added to the diagonal, relative to the mean of its live part; `asked` is what the caller
    wanted. `dead` marks inputs that were never active.
    """

    H: Tensor
    factor: Tensor
    dead: Tensor
    damping: float
    asked: float

    @functools.cached_property
    def inverse(self) -> Tensor:
        """H⁻¹ (d, d), made on first use."""
        # It comes column by column and is symmetric: transposed, its rows lie together and copies keep it so.
        return torch.cholesky_inverse(self.factor).mT

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in words: damping that had to grow, inputs that were never active."""
        notes = []
        if self.damping != self.asked:
            notes.append(
                f"damping grew from {self.asked:g} to {self.damping:g} of the mean diagonal before H could be factorized: "
                "its inputs are collinear or the samples too few; more calibration samples would help."
            )
        if count := int(self.dead.sum()):
            notes.append(
                f"{count} of {len(self.dead)} inputs were zero in every sample; their weights cost nothing to remove."
            )
        return tuple(notes)


def damp(H: Tensor, damping: float = 1e-4) -> Damped:
    """Checks H (d, d), finds dead inputs, adds `damping` times the mean live diagonal, factorizes; H is not changed.

    If the Cholesky factor does not exist, damping grows tenfold (from 1e-8 if it was 0) until it does, and
    `Damped.notes` says so. A dead input keeps just the damping (or, where there is none, the mean diagonal), so that it
    is coupled to nothing and free to remove.

    Raises `OptionError` for a shape or a damping that makes no sense and `NumericalError` for NaN, infinity, or a
    matrix that is no Gram matrix (not symmetric, negative on the diagonal).

    >>> x = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]])  # rank 1, and the third input is dead
    >>> damped = damp(x.T @ x, damping=0.0)
    >>> damped.dead.tolist(), damped.damping
    ([False, False, True], 1e-08)
    """
    if not 0 <= damping <= _MOST_DAMPING:
        raise OptionError(
            f"damping is relative to the mean diagonal of H, from 0 to {_MOST_DAMPING:g}; got {damping!r}."
        )
    _check(H)
    H = H.detach().to(torch.float64)
    H = (H + H.T) / 2
    diagonal = H.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    asked, damping = float(damping), float(damping)
    while True:
        damped = H.clone()
        # A dead row is zero but for rounding; leave it no coupling at all.
        damped[dead] = 0.0
        damped[:, dead] = 0.0
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = (damping or 1.0) * mean
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and _well_posed(factor):
            return Damped(damped, factor, dead, damping, asked)
        damping = damping * 10 if damping else 1e-8
        if damping > _MOST_DAMPING:
            raise NumericalError(
                f"H ({len(H)} x {len(H)}) has no Cholesky factor even with {_MOST_DAMPING:g} of its mean diagonal added: "
                "it is not 2 X Xᵀ / samples. Accumulate it again in float64."
            )


def layer_loss(W: Tensor, V: Tensor, H: Tensor) -> float:
    """½ Σ_rows (w - v) H (w - v)ᵀ in float64: the layer's squared output error per sample, with V in W's place.

    >>> layer_loss(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    4.0
    """
    return float(row_losses(W, V, H).sum())


def row_losses(W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """The same for each row (rows,)."""
    change = W.to(torch.float64) - V.to(torch.float64)
    return ((change @ H.to(torch.float64)) * change).sum(1) / 2


def check_weights(W: Tensor, H: Tensor) -> Tensor:
    """W (rows, d) in float64, once it is known to fit H. Raises `OptionError` or `NumericalError`."""
    if W.ndim != 2 or not W.is_floating_point():
        raise OptionError(f"W must be a floating-point matrix (rows, d); got {_words(W)}.")
    if W.shape[1] != len(H):
        raise OptionError(f"W has {W.shape[1]} columns and H {len(H)}; they must be the same inputs.")
    if W.device != H.device:
        raise OptionError(f"W is on {W.device} and H on {H.device}; move one of them.")
    if not bool(torch.isfinite(W).all()):
        raise NumericalError(f"W ({W.shape[0]} x {W.shape[1]}) holds NaN or infinity.")
    return W.detach().to(torch.float64)


def _well_posed(factor: Tensor) -> bool:
    # Rounding can carry a singular matrix through the factorization with a pivot of pure noise.
    pivots = factor.diagonal()
    return bool((pivots**2).min() > len(factor) * torch.finfo(torch.float64).eps * (pivots**2).max())


def _check(H: Tensor) -> None:
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.shape[0] == 0 or not H.is_floating_point():
        raise OptionError(f"H must be a floating-point matrix (d, d), 2 X Xᵀ / samples; got {_words(H)}.")
    least, most = torch.aminmax(H)  # NaN where there is one
    largest = max(-float(least), float(most))
    if not math.isfinite(float(most) - float(least)):
        raise NumericalError(
            f"H ({len(H)} x {len(H)}) holds NaN or infinity: a calibration batch or an activation does."
        )
    if float((H - H.T).max()) > 1e-3 * largest or float(H.diagonal().min()) < -1e-6 * largest:
        raise NumericalError(
            f"H ({len(H)} x {len(H)}) is not symmetric with a diagonal >= 0, so it is not 2 X Xᵀ / samples."
        )


def _words(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
