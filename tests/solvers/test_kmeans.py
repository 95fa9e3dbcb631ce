# SPDX-License-Identifier: Apache-2.0
"""k-means on a line against all partitions, scikit-learn, and closed forms; what it makes of odd input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featherweight.errors import NumericalError, OptionError
from featherweight.solvers.kmeans import STARTS, kmeans


def least_error(x: NDArray[Any], weight: NDArray[Any], clusters: int, zero: bool) -> float:
    """Of all ways to cut the ordered values into runs, with any one of them at zero if `zero`."""
    order = np.argsort(x)
    x, weight = x[order], weight[order]

    def error(begin: int, end: int, at_zero: bool) -> float:
        own, w = x[begin:end], weight[begin:end]
        if not len(own):
            return 0.0
        middle = 0.0 if at_zero else np.average(own, weights=w)
        return float(w @ (own - middle) ** 2)

    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(x) + 1), clusters - 1):
        runs = list(itertools.pairwise([0, *cuts, len(x)]))
        for at in range(clusters) if zero else [-1]:
            best = min(best, sum(error(begin, end, i == at) for i, (begin, end) in enumerate(runs)))
    return best


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_exact_start_has_the_least_error_of_all_partitions(zero: bool, weighted: bool) -> None:
    chance = np.random.default_rng(0)
    for trial in range(60):
        n, clusters = chance.integers(1, 10), int(chance.integers(1, 5))
        x = chance.normal(size=n) + chance.integers(-1, 2) * 0.5
        x = np.round(2 * x) / 2 if trial % 3 == 0 else x  # some that repeat
        weight = chance.random(n) + 0.01 if weighted else np.ones(n)
        found = kmeans(x, clusters, importance=weight if weighted else None, start="exact", zero=zero)
        least = least_error(x, weight, clusters, zero)
        assert found.error == pytest.approx(least, abs=1e-12)
        assert found.error == pytest.approx(float(weight @ (x - found.values) ** 2), abs=1e-12)
        assert len(found.centroids) <= clusters
        for start in STARTS:
            other = kmeans(x, clusters, importance=weight if weighted else None, start=start, zero=zero, seed=trial)
            assert other.error >= least - 1e-12


@pytest.mark.parametrize("clusters", [2, 7, 32])
def test_no_worse_than_scikit_learn_from_the_same_start_and_exactly_best_of_all(clusters: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    chance = np.random.default_rng(1)
    x, weight = chance.laplace(size=3000), chance.random(3000)
    first = np.linspace(x.min(), x.max(), clusters)[:, None]
    theirs = cluster.KMeans(clusters, init=first, n_init=1, tol=0, max_iter=3000).fit(x[:, None], sample_weight=weight)
    linear = kmeans(x, clusters, importance=weight)
    exact = kmeans(x, clusters, importance=weight, start="exact")
    assert linear.error <= theirs.inertia_ * 1.02  # empty clusters are refilled in another order
    assert exact.error <= min(theirs.inertia_, linear.error) * (1 + 1e-9)
    many = cluster.KMeans(clusters, n_init=5, random_state=0).fit(x[:, None], sample_weight=weight)
    assert exact.error <= many.inertia_ * (1 + 1e-9)


@pytest.mark.parametrize("start", ["linear", "density", "random", "exact"])
def test_every_start_ends_where_each_value_is_nearest_and_each_centroid_is_a_mean(start: str) -> None:
    x = np.random.default_rng(2).normal(size=2000).astype(np.float32)
    found = kmeans(x, 9, start=start, seed=3)
    assert len(found.centroids) == 9 and (np.diff(found.centroids) > 0).all()
    nearest = np.abs(x[:, None] - found.centroids).argmin(1)
    assert np.array_equal(nearest, found.index)
    means = [x[found.index == j].astype(float).mean() for j in range(9)]
    assert np.allclose(means, found.centroids, atol=1e-9)
    shares = np.bincount(found.index) / len(x)
    assert found.bits == pytest.approx(-(shares * np.log2(shares)).sum())


def test_the_first_centroids_are_those_that_the_words_say() -> None:
    """One look before anything moves: of four well separated heaps each start must find its own local optimum."""
    x = np.repeat([0.0, 1.0, 100.0, 101.0], [50, 50, 1, 1])
    assert kmeans(x, 2, start="linear").centroids.tolist() == [0.5, 100.5]
    assert kmeans(x, 4, start="density").error == 0.0  # as many clusters as values
    assert kmeans(x, 3, start="exact").error == pytest.approx(0.5)
    drawn = {tuple(kmeans(np.arange(20.0), 3, start="random", seed=seed).centroids) for seed in range(20)}
    assert len(drawn) > 1
    again = kmeans(np.arange(20.0), 3, start="random", seed=4).centroids
    assert again.tolist() == kmeans(np.arange(20.0), 3, start="random", seed=4).centroids.tolist()


def test_an_importance_counts_as_so_many_values() -> None:
    chance = np.random.default_rng(3)
    x, times = chance.normal(size=200), chance.integers(1, 5, size=200)
    for start in ("linear", "density", "exact"):
        one = kmeans(x, 5, importance=times.astype(float), start=start)
        other = kmeans(np.repeat(x, times), 5, start=start)
        assert np.allclose(one.centroids, other.centroids)
        assert one.error == pytest.approx(other.error)


def test_a_value_that_weighs_nothing_moves_nothing_and_still_gets_the_nearest() -> None:
    x, weight = np.array([0.0, 1.0, 4.0, 9.0]), np.array([1.0, 1.0, 1.0, 0.0])
    found = kmeans(x, 2, importance=weight, start="exact")
    assert found.centroids.tolist() == [0.5, 4.0] and found.values.tolist() == [0.5, 0.5, 4.0, 4.0]
    assert kmeans(x, 2, importance=np.zeros(4)).error == kmeans(x, 2).error  # where nothing weighs, all weigh alike


def test_zeros_keep_zero_for_themselves_and_pull_at_nothing() -> None:
    x = np.concatenate([np.zeros(900), np.random.default_rng(4).normal(size=100)])
    for start in STARTS:
        found = kmeans(x, 6, start=start, zero=True)
        assert 0.0 in found.centroids and len(found.centroids) == 6
        assert (found.values[:900] == 0).all()
        rest = kmeans(x[900:], 6, start=start, zero=True)
        assert np.array_equal(rest.centroids, found.centroids)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_price_on_bits_buys_less_error_for_the_same_bits(weighted: bool) -> None:
    """High-rate theory: an entropy-coded uniform quantizer beats Lloyd's by up to 2.81 dB on a Laplacian (Gish & Pierce 1968)."""
    chance = np.random.default_rng(5)
    x = chance.laplace(size=20_000)
    weight = chance.random(20_000) + 0.5 if weighted else None
    plain = kmeans(x, 8, importance=weight, start="exact")
    best = np.inf
    for rate in np.geomspace(0.02, 0.1, 12):
        priced = kmeans(x, 64, importance=weight, rate=rate)
        if priced.bits <= plain.bits:
            best = min(best, priced.error)
    assert best < 0.75 * plain.error


def test_the_price_is_per_bit_and_relative_so_that_scale_does_not_matter() -> None:
    x = np.random.default_rng(6).laplace(size=5000)
    for scale in (1e-30, 1e-3, 1e20):
        found = kmeans(x * scale, 16, rate=0.01, zero=True)
        assert found.bits == pytest.approx(kmeans(x, 16, rate=0.01, zero=True).bits, rel=1e-3)


def test_zeros_stay_zero_however_rare_and_dear_they_are() -> None:
    x = np.concatenate([np.zeros(3), 0.5 + np.random.default_rng(9).random(5000)])
    for weight in (None, np.ones(5003)):
        found = kmeans(x, 8, rate=0.2, zero=True, importance=weight)
        assert (found.values[:3] == 0).all() and (found.values[3:] != 0).mean() > 0.9


def test_importance_and_a_price_together_spend_bits_where_they_matter() -> None:
    """Values that weigh next to nothing go to the cheapest word, and those that weigh much stay apart."""
    chance = np.random.default_rng(10)
    x, weight = chance.normal(size=4000), np.repeat([1e-4, 1.0], 2000)
    found = kmeans(x, 16, rate=0.02, zero=True, importance=weight)
    assert (found.values[:2000] == 0).all() and len(np.unique(found.index[2000:])) > 10
    alike = kmeans(x, 16, rate=0.02, zero=True)
    error, other = (((x - one.values)[2000:] ** 2).mean() for one in (found, alike))
    assert found.bits < 0.7 * alike.bits and error < 1.2 * other


def test_a_higher_price_never_takes_more_bits() -> None:
    x = np.concatenate([np.zeros(5000), np.random.default_rng(7).normal(size=5000)])
    bits = [kmeans(x, 16, rate=rate, zero=True).bits for rate in (0.0, 0.003, 0.01, 0.03, 0.1, 1.0, 100.0)]
    assert bits == sorted(bits, reverse=True) and bits[-1] == 0.0


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_odd_input_has_a_defined_answer(start: str, zero: bool, rate: float) -> None:
    def cluster(values: list[float], clusters: int = 4) -> tuple[list[float], float]:
        found = kmeans(np.array(values), clusters, start=start, zero=zero, rate=rate)
        return found.values.tolist(), found.error

    assert cluster([]) == ([], 0.0)
    assert cluster([0.0, 0.0]) == ([0.0, 0.0], 0.0)
    assert cluster([3.5]) == ([3.5], 0.0)
    values, error = cluster([7.0] * 5)
    assert (values, error) == ([7.0] * 5, 0.0) or rate
    if not rate:
        assert cluster([1.0, -2.0, 1.0]) == ([1.0, -2.0, 1.0], 0.0)  # more clusters than values
        near = [1.0, np.nextafter(1.0, 2.0), -1e-300]
        assert cluster(near) == (near, 0.0)
    assert cluster([1.0, 2.0, 3.0], 1)[0] == ([0.0] * 3 if zero else [2.0] * 3)


def test_what_is_not_finite_or_out_of_range_is_refused() -> None:
    x = np.arange(4.0)
    for bad in (np.nan, np.inf):
        with pytest.raises(NumericalError, match="1 of 4 values"):
            kmeans(np.array([0.0, 1.0, 2.0, bad]), 2)
    for clusters in (0, 65537, 1.5, True):
        with pytest.raises(OptionError, match="clusters"):
            kmeans(x, clusters)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at most 1024"):
        kmeans(x, 1025, start="exact")
    with pytest.raises(OptionError, match="Nearest: linear"):
        kmeans(x, 2, start="linea")
    for weight in (np.ones(3), np.array([1.0, 1, 1, -1]), np.array([1.0, 1, 1, np.nan])):
        with pytest.raises(OptionError, match="importance"):
            kmeans(x, 2, importance=weight)
    for rate in (-1.0, np.nan, np.inf):
        with pytest.raises(OptionError, match="rate"):
            kmeans(x, 2, rate=rate)


def test_of_very_many_values_the_exact_start_is_that_of_a_fine_histogram() -> None:
    x = np.random.default_rng(8).standard_t(3, size=300_000).astype(np.float32)
    exact, linear = kmeans(x, 24, start="exact"), kmeans(x, 24)
    assert exact.error <= linear.error * (1 + 1e-9)
    assert len(exact.index) == len(x) and exact.index.dtype == np.uint8
