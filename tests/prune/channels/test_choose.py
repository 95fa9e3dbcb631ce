# SPDX-License-Identifier: Apache-2.0
"""The orders in which couplings go, against the plainest loops; and how far to go in them."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.prune.channels.choose import Ladder, counts_after, greedy, ladder, nearest_to, ranked

NONE = np.zeros(6, dtype=bool)


def ladders_of(seed: int, sizes: tuple[int, ...] = (6, 4, 9), **options: int) -> tuple[list[Ladder], list[np.ndarray]]:
    chance = np.random.default_rng(seed)
    scores = [chance.random(size) + 0.01 for size in sizes]
    return [ladder(own, np.zeros(len(own), dtype=bool), **options) for own in scores], scores


def gone_after(ladders: list[Ladder], path: np.ndarray) -> set[tuple[int, int]]:
    kept = counts_after(ladders, path)
    return {
        (g, int(i))
        for g, (own, left) in enumerate(zip(ladders, kept, strict=True))
        for i in own.order[: own.kept - int(left)]
    }


def products(kept: np.ndarray) -> float:
    """A cost of products: each group's channels are read by the next group's."""
    return float(3 * kept[0] + 5 * kept[0] * kept[1] + 2 * kept[1] * kept[2] + kept[2])


def freed(kept: np.ndarray, going: np.ndarray) -> np.ndarray:
    return np.array([products(kept) - products(kept - np.eye(3)[g] * going[g]) for g in range(3)])


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_lowest_score_per_freed_cost_and_counts_anew_each_time(seed: int) -> None:
    ladders, scores = ladders_of(seed)
    left = [set(range(len(own))) for own in scores]
    expected = []
    while any(len(own) > 1 for own in left):
        kept = np.array([len(own) for own in left], dtype=float)
        best = min(
            (
                (scores[g][i] / (products(kept) - products(kept - np.eye(3)[g])), g, i)
                for g in range(3)
                if len(left[g]) > 1
                for i in left[g]
            ),
        )
        expected.append(best[1:])
        left[best[1]].remove(best[2])
    path = greedy(ladders, freed)
    assert len(path) == len(expected)
    for n in range(len(expected) + 1):
        assert gone_after(ladders, path[:n]) == set(expected[:n])


def test_global_does_not_count_anew() -> None:
    ladders, scores = ladders_of(3)
    kept = np.array([6.0, 4.0, 9.0])
    price = freed(kept, np.ones(3))
    ranks = sorted(
        (scores[g][i] / price[g], g, i) for g in range(3) for i in np.argsort(scores[g])[: len(scores[g]) - 1]
    )
    path = ranked(ladders, "global", freed, "abc")
    for n in (1, 5, 11):
        assert gone_after(ladders, path[:n]) == {(g, i) for _, g, i in ranks[:n]}


def test_local_takes_the_same_share_of_each_group() -> None:
    ladders, _ = ladders_of(1, (12, 4, 8))
    path = ranked(ladders, "local", freed, "abc")
    assert counts_after(ladders, path[:12]).tolist() == [6, 2, 4]
    assert counts_after(ladders, path[:18]).tolist() == [3, 1, 2]


def test_structures_lose_the_same_share_and_rank_within_themselves() -> None:
    low, high = np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 6.0, 7.0, 8.0])
    other = np.array([1e6, 2e6, 3e6, 4e6])  # of another structure: its scale does not count
    ladders = [ladder(own, np.zeros(4, dtype=bool)) for own in (low, high, other)]
    path = ranked(ladders, "isomorphic", freed, ("block", "block", "stem"))
    # Half of all: of the two blocks the four lowest, but for the last of the first, which has to stay.
    assert counts_after(ladders, path[:6]).tolist() == [1, 3, 2]
    assert gone_after(ladders, path[:6]) == {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)}


@pytest.mark.parametrize("ranking", ["greedy", "global", "local", "isomorphic"])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_no_ranking_empties_a_group_or_leaves_a_multiple(ranking: str, multiple: int) -> None:
    ladders, scores = ladders_of(2, (6, 4, 9), least=3, multiple=multiple)
    path = ranked(ladders, ranking, freed, "aba")
    for n in range(len(path) + 1):
        kept = counts_after(ladders, path[:n])
        gone = gone_after(ladders, path[:n])
        for g, size in enumerate((6, 4, 9)):
            assert kept[g] == size or (kept[g] >= 3 and kept[g] % multiple == 0)
            lowest = {(g, int(i)) for i in np.argsort(scores[g])[: size - int(kept[g])]}
            assert lowest == {(group, i) for group, i in gone if group == g}
    assert all(k < size + 1 for k, size in zip(counts_after(ladders, path), (6, 4, 9), strict=True))


@pytest.mark.parametrize(
    ("size", "gone", "least", "multiple", "ends"),
    [
        (6, 0, 1, 1, [1, 2, 3, 4, 5]),
        (6, 2, 1, 1, [1, 2, 3]),
        (6, 0, 4, 1, [1, 2]),
        (6, 0, 0, 1, [1, 2, 3, 4, 5]),
        (6, 0, 9, 1, []),
        (6, 0, 1, 4, [2]),
        (6, 0, 1, 6, []),
        (6, 0, 3, 2, [2]),
        (6, 1, 1, 2, [1, 3]),
    ],
)
def test_rungs(size: int, gone: int, least: int, multiple: int, ends: list[int]) -> None:
    made = ladder(np.arange(size, dtype=float)[::-1], np.arange(size) < gone, least, multiple)
    assert made.ends.tolist() == ends
    assert made.order.tolist() == list(range(size - 1, gone - 1, -1))[: max(ends, default=0)]
    assert made.weights.tolist() == np.diff(np.cumsum([0, *range(size)])[[0, *ends]]).tolist()


def test_a_group_that_frees_nothing_goes_last() -> None:
    ladders, _ = ladders_of(0)
    path = greedy(ladders, lambda kept, going: np.array([1.0, 0.0, 1.0]) * going)
    assert path[-3:].tolist() == [1, 1, 1]


def test_the_shortest_part_that_meets_the_target() -> None:
    ladders = [ladder(np.arange(100, dtype=float), np.zeros(100, dtype=bool))]
    path = np.zeros(99, dtype=np.intp)
    assert len(nearest_to(path, ladders, lambda kept: kept[0] / 50, 0.02)) == 50
    assert len(nearest_to(path, ladders, lambda kept: kept[0] / 100, 0.02)) == 0
    assert len(nearest_to(path, ladders, lambda kept: kept[0] / 0.5, 0.02)) == 99  # out of reach: all that may go


def test_a_large_last_rung_gives_way_to_smaller_ones_that_come_nearer() -> None:
    """Group 0's next coupling overshoots by far; group 1 has one of the right size."""
    ladders = [ladder(np.arange(4, dtype=float), NONE[:4]), ladder(np.arange(6, dtype=float), NONE)]
    path = np.array([1, 0, 1, 0, 1, 1, 1, 0])

    def ratio(kept: np.ndarray) -> float:
        return (30 * kept[0] + kept[1]) / 124

    assert nearest_to(path, ladders, ratio, 0.02).tolist() == [1, 1] or ratio(np.array([4, 4])) == 1.0
    best = nearest_to(path, ladders, ratio, 0.001)
    assert abs(ratio(counts_after(ladders, best)) - 1) < 0.01


def test_rungs_of_several_couplings_are_compared_by_their_mean() -> None:
    dear, cheap = np.full(10, 5.0), np.full(10, 3.0)
    ladders = [ladder(own, np.zeros(10, dtype=bool), multiple=4) for own in (dear, cheap)]
    assert [own.weights.tolist() for own in ladders] == [[10.0, 20.0], [6.0, 12.0]]
    assert ranked(ladders, "isomorphic", freed, "aa").tolist() == [1, 1, 0, 0]
    assert ranked(ladders, "global", lambda kept, going: going, "aa").tolist() == [1, 1, 0, 0]
    assert greedy(ladders, lambda kept, going: going).tolist() == [1, 1, 0, 0]
