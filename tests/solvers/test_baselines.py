# SPDX-License-Identifier: Apache-2.0
"""The baselines are what their papers say, restated in numpy with every inverse taken anew."""

import numpy as np
import pytest

from featherweight.errors import OptionError
from featherweight.solvers import baselines
from featherweight.solvers.problem import pruning
from tests.solvers.problems import layer


def test_magnitude_removes_the_smallest_weights_of_the_layer() -> None:
    W, H, _ = layer(5, 12)
    V, _ = baselines.magnitude(pruning(W, H, "weight", 0.4))
    smallest = np.sort(np.abs(W.numpy()).ravel())[24]
    assert np.array_equal(V.numpy(), np.where(np.abs(W.numpy()) < smallest, 0, W.numpy()))


def test_wanda_removes_as_many_in_each_row_by_weight_times_input_norm() -> None:
    W, H, X = layer(5, 12)
    V, _ = baselines.wanda(pruning(W, H, "weight", 0.5, damping=0.0))
    metric = np.abs(W.numpy()) * np.linalg.norm(X, axis=1)
    expected = W.numpy().copy()
    np.put_along_axis(expected, np.argsort(metric, axis=1)[:, :6], 0.0, axis=1)
    assert np.array_equal(V.numpy(), expected)


def sweep(W: np.ndarray, H: np.ndarray, zeros: int, block: int, group: int | None = None, keep: int = 0) -> np.ndarray:
    """SparseGPT with the inverse of what lies to the right taken anew at each column."""
    W = W.copy()
    d = len(H)
    masks = np.zeros(W.shape, bool)
    pivots = [np.linalg.inv(H[j:, j:])[0, 0] for j in range(d)]
    for j in range(d):
        if group is None and j % block == 0:
            stop = min(j + block, d)
            count = zeros * stop // d - zeros * j // d
            scores = W[:, j:stop] ** 2 / pivots[j:stop]
            masks[:, j:stop] = (scores.ravel().argsort().argsort() < count).reshape(scores.shape)
        if group is not None and j % group == 0:
            scores = W[:, j : j + group] ** 2 / pivots[j : j + group]
            masks[:, j : j + group] = scores.argsort(1).argsort(1) < scores.shape[1] - keep
        inverse = np.linalg.inv(H[j:, j:])
        error = np.where(masks[:, j], W[:, j], 0) / inverse[0, 0]
        W[:, j:] -= np.outer(error, inverse[0])
    return np.where(masks, 0, W)


@pytest.mark.parametrize("block", [5, 64])
def test_sparsegpt_is_its_algorithm_with_inverses_taken_anew(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(baselines, "_BLOCK", block)
    W, H, _ = layer(4, 24)
    problem = pruning(W, H, "weight", 0.6)
    V, _ = baselines.sparsegpt(problem)
    assert np.allclose(V.numpy(), sweep(W.numpy(), problem.damped.H.numpy(), problem.zeros, block), atol=1e-10)


@pytest.mark.parametrize("block", [5, 64])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 4), (2, 6)])
def test_sparsegpt_chooses_within_groups(monkeypatch: pytest.MonkeyPatch, block: int, keep: int, group: int) -> None:
    monkeypatch.setattr(baselines, "_BLOCK", block)
    W, H, _ = layer(4, 24)
    problem = pruning(W, H, f"{keep}:{group}")
    V, _ = baselines.sparsegpt(problem)
    assert np.allclose(V.numpy(), sweep(W.numpy(), problem.damped.H.numpy(), 0, block, group, keep), atol=1e-10)


def test_sparsegpt_refuses_tiles_and_says_what_takes_them() -> None:
    W, H, _ = layer(4, 24)
    with pytest.raises(OptionError, match="exact_obs"):
        baselines.sparsegpt(pruning(W, H, "1x4", 0.5))
