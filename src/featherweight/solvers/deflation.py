# SPDX-License-Identifier: Apache-2.0
"""Refit of many rows with their own masks by products alone: conjugate gradients with H's strong directions deflated.

A factorization for each row costs kept³ / 3 and keeps one core busy; here all rows take d² an iteration together, at
the speed of a matrix product. Layer Hessians have few strong directions and many alike, so with H near U Uᵀ + D
(Nyström's U of rank r, D diagonal) a row's system is near U_S U_Sᵀ + D_S, which Woodbury's identity inverts by one
matrix (r, r) a row; those of all rows come from one product of the masks with the pairs of U's columns. Some fifteen
iterations then do. Iterations run in float32, on residuals in float64, until what is left to gain is beneath the
tolerance in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.solvers.hessian import Damped

__all__ = ["ITERATIONS", "Deflated"]

# What the whole refit of a row costs, set-up included, in float32 products with H: typical, and what is counted.
ITERATIONS = 24
# A row rests once what is left to gain is this share of its loss: estimated from what the last iterations gained, and
# how much less that was than what those before them had. Or once next to nothing of its energy is left.
_TOLERANCE, _LAST, _FLOOR = 1e-6, 3, 1e-12
_ROUNDS, _MOST = 3, 60


class Deflated:
    """A damped H (d, d) made ready for rows of any mask: U (d, r), D (d,) and the products of U's columns."""

    def __init__(self, damped: Damped) -> None:
        H = damped.H
        d = len(H)
        rank = max(1, min(128, d // 16))
        draw = torch.randn(d, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(H.device)
        for _ in range(2):
            draw = torch.linalg.qr(H @ draw).Q
        reached = H @ draw
        # Nyström: U Uᵀ = (H Q) (Qᵀ H Q)⁻¹ (H Q)ᵀ, which lies beneath H, so that D is not negative.
        factor = torch.linalg.cholesky(draw.T @ reached)
        U = torch.linalg.solve_triangular(factor, reached.T, upper=False).T
        rest = H.diagonal() - U.square().sum(1)
        self.exact, self.H = H, H.float()
        self.U = U.float()
        self.D = rest.clamp_min(1e-6 * H.diagonal()).float()
        self._i, self._j = torch.triu_indices(rank, rank, device=H.device)
        columns = self.U.T.contiguous()
        self._pairs = (columns[self._i] * columns[self._j]).div_(self.D)

    def bytes_of_row(self) -> int:
        """Peak bytes that one row of a batch takes."""
        d, rank = self.U.shape
        return int(4 * (3 * rank * rank + 8 * d) + 8 * 4 * d)

    def refit(self, W: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """V (rows, d) of least loss with zeros where `pruned` is True, and which rows (rows,) got within tolerance."""
        kept = (~pruned).float()
        small = self._small(kept)
        V = W.masked_fill(pruned, 0.0)
        floor = _FLOOR * (W.square() * self.exact.diagonal()).sum(1)
        rests, ended = torch.zeros(len(W), dtype=torch.bool, device=W.device), torch.zeros_like(floor)
        for left in reversed(range(_ROUNDS + 1)):
            change = W - V
            residual = change @ self.exact
            loss = (change * residual).sum(1)
            residual.masked_fill_(pruned, 0.0)
            # In float32 a residual of any size is as good as one of size 1.
            size = residual.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            right, unit = (residual / size).float(), size[:, 0].square()
            start = self._solve(right, kept, small)
            steepness = _inner(right, start) * unit
            # Rounding may have left more of the gradient than the iterations saw.
            done = (rests & (steepness <= 4 * ended)) | (steepness <= floor)
            if not left or bool(done.all()):
                break
            move, rests, ended = self._iterate(right, start, kept, small, loss / unit)
            ended *= unit
            V = V + torch.where(done[:, None], 0.0, move.double() * size)
        return V, done

    def _small(self, kept: Tensor) -> Tensor:
        """Each row's (I + U_Sᵀ D_S⁻¹ U_S)⁻¹ (rows, r, r)."""
        rank = self.U.shape[1]
        found = kept.new_empty(len(kept), rank, rank)
        pairs = kept @ self._pairs.T
        found[:, self._i, self._j] = pairs
        found[:, self._j, self._i] = pairs
        found.diagonal(dim1=1, dim2=2).add_(1.0)
        # Where the factor fails in float32, its row ends beyond the tolerance and is told apart by that.
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(found).L)

    def _solve(self, residual: Tensor, kept: Tensor, small: Tensor) -> Tensor:
        """Each row's residual times (U_S U_Sᵀ + D_S)⁻¹; both are zero outside the row's kept columns."""
        over: Tensor = residual / self.D
        inner = torch.bmm((over @ self.U)[:, None], small)[:, 0]
        over -= (inner @ self.U.T).div_(self.D)
        over *= kept
        return over

    def _iterate(
        self, right: Tensor, start: Tensor, kept: Tensor, small: Tensor, loss: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x with x H_SS near `right`, by conjugate gradients from 0, whose first direction is `start`.

        `loss` is twice what each row loses at x = 0. Also gives which rows came to rest, and the gradient's last size.
        """
        x, residual, direction = torch.zeros_like(right), right.clone(), start.clone()
        size = _inner(residual, start)
        gains: list[Tensor] = []
        rests = size == 0
        for _ in range(_MOST):
            curved = direction @ self.H
            step = torch.where(rests, 0.0, size / _inner(direction, curved))
            gains.append(step * size)
            loss = loss - gains[-1]
            move = step.float()[:, None]
            x.addcmul_(direction, move)
            residual.sub_(curved.mul_(kept).mul_(move))
            downhill = self._solve(residual, kept, small)
            after = _inner(residual, downhill)
            direction = torch.addcmul(downhill, direction, torch.where(rests, 0.0, after / size).float()[:, None])
            size = torch.where(rests, size, after)
            rests = rests | (_left(gains) <= _TOLERANCE * loss) | (size == 0)
            if bool((rests | size.isnan()).all()):
                break
        return x, rests, size


def _left(gains: list[Tensor]) -> Tensor:
    """What each row has yet to gain, were gains to fall on as they did from iterations before the last to the last."""
    if len(gains) < 2 * _LAST:
        return torch.full_like(gains[0], torch.inf)
    before, last = (torch.stack(part).sum(0) for part in (gains[-2 * _LAST : -_LAST], gains[-_LAST:]))
    return torch.where(before > last, last.square() / (before - last), torch.inf)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Each row's inner product (rows,), summed in float64."""
    return (a * b).sum(1, dtype=torch.float64)
