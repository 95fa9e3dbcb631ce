# SPDX-License-Identifier: Apache-2.0
"""Small layer problems with correlated inputs, and brute-force restatements to hold the solvers against."""

import numpy as np
import torch


def layer(
    rows: int, d: int, samples: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """W (rows, d), H (d, d) and the inputs X (d, samples): rectified mixtures of few strong and many weak sources."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.arange(1, d + 1) ** -0.5
    X = np.maximum(mixing @ rng.standard_normal((d, samples or 6 * d)), 0)
    W = rng.standard_normal((rows, d)) / np.sqrt(d)
    return torch.from_numpy(W), torch.from_numpy(2 * X @ X.T / X.shape[1]), X


def output_error(W: torch.Tensor, V: torch.Tensor, X: np.ndarray) -> float:
    """||(W - V) X||² / samples, from the inputs themselves."""
    return float(np.square((W.double().numpy() - V.double().numpy()) @ X).sum() / X.shape[1])


def best_values(w: np.ndarray, X: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The least-squares row that is zero outside `kept`, by numpy on the inputs."""
    v = np.zeros_like(w)
    v[kept] = np.linalg.lstsq(X[kept].T, X.T @ w, rcond=None)[0]
    return v


def least_loss(w: np.ndarray, H: np.ndarray, removed: list[int]) -> float:
    """The least of ½ (w - v) H (w - v)ᵀ over rows v that are zero on `removed`: a block of H, solved outright."""
    if not removed:
        return 0.0
    kept = np.setdiff1d(np.arange(len(w)), removed)
    schur = H[np.ix_(removed, removed)]
    if len(kept):
        schur = schur - H[np.ix_(removed, kept)] @ np.linalg.solve(H[np.ix_(kept, kept)], H[np.ix_(kept, removed)])
    return float(w[removed] @ schur @ w[removed]) / 2


def greedy(
    rows: np.ndarray,
    H: np.ndarray,
    units: list[list[int]],
    groups: list[int] | None = None,
    quota: list[int] | None = None,
) -> tuple[list[int], list[float]]:
    """Removes from rows that share units the unit that raises the least loss least (by the column), until none is open.

    No update formula: each candidate's problem is solved from the start. Returns the order and the increases.
    """
    gone: list[int] = []
    order: list[int] = []
    losses: list[float] = []
    left = list(quota) if quota else None
    total = 0.0
    while True:
        open_ = [u for u in range(len(units)) if u not in order and (left is None or left[groups[u]] > 0)]
        if not open_:
            return order, losses
        trial = [sum(least_loss(w, H, gone + units[u]) for w in rows) - total for u in open_]
        best = int(np.argmin([t / len(units[u]) for t, u in zip(trial, open_, strict=True)]))
        order.append(open_[best])
        losses.append(trial[best])
        gone += units[open_[best]]
        total += trial[best]
        if left is not None:
            left[groups[open_[best]]] -= 1
