# SPDX-License-Identifier: Apache-2.0
"""What goes together, spelt out entry by entry from what the words mean, and masks by sorting: no code of the package.

A place of a weight is (row, conv group, input channel within the group, tap); everything else follows from it.
"""

from __future__ import annotations

import itertools

import numpy as np


def places(kind: str, shape: tuple[int, ...], groups: int = 1) -> dict[int, tuple[int, int, int, tuple[int, ...]]]:
    """Flat index -> (row, conv group, input channel, tap)."""
    found = {}
    for index in itertools.product(*map(range, shape)):
        flat = int(np.ravel_multi_index(index, shape))
        if kind == "conv":
            row, channel, tap = index[0], index[1], index[2:]
            group = row // (shape[0] // groups)
        elif kind == "transposed conv":  # stored (in, out / groups, *kernel)
            group, channel = divmod(index[0], shape[0] // groups)
            row, tap = group * shape[1] + index[1], index[2:]
        else:
            row, channel, tap, group = index[0], index[1], (), 0
        found[flat] = (row, group, channel, tap)
    return found


def grouped(keys: dict[int, tuple[object, ...]]) -> list[list[int]]:
    units: dict[tuple[object, ...], list[int]] = {}
    for flat, key in keys.items():
        units.setdefault(key, []).append(flat)
    return list(units.values())


def units(pattern: str, kind: str, shape: tuple[int, ...], groups: int = 1) -> list[list[int]]:
    """The flat indices of each unit (for N:M: of each group of M)."""
    where = places(kind, shape, groups)
    if pattern == "weight":
        return [[flat] for flat in where]
    if pattern == "row":
        return grouped({flat: (row,) for flat, (row, _, _, _) in where.items()})
    if pattern == "column":
        return grouped({flat: (group, channel) for flat, (_, group, channel, _) in where.items()})
    if ":" in pattern:
        m = int(pattern.split(":")[1])
        return grouped({flat: (row, tap, channel // m) for flat, (row, _, channel, tap) in where.items()})
    r, c = map(int, pattern.split("x"))
    return grouped({flat: (row // r, tap, channel // c) for flat, (row, _, channel, tap) in where.items()})


def lowest_units(scores: np.ndarray, members: list[list[int]], count: int) -> np.ndarray:
    """The mask of the `count` units with the lowest summed scores."""
    order = np.argsort([scores.reshape(-1)[unit].sum() for unit in members], kind="stable")
    mask = np.zeros(scores.size, dtype=bool)
    for i in order[:count]:
        mask[members[i]] = True
    return mask.reshape(scores.shape)


def lowest_of_n_of_m(scores: np.ndarray, members: list[list[int]], n: int, count: int) -> np.ndarray:
    """The `count` lowest of the entries that are among the m - n lowest of their group."""
    flat = scores.reshape(-1)
    candidates = [i for group in members for i in sorted(group, key=lambda i: flat[i])[: len(group) - n]]
    mask = np.zeros(scores.size, dtype=bool)
    mask[sorted(candidates, key=lambda i: flat[i])[:count]] = True
    return mask.reshape(scores.shape)
