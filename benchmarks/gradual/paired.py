# SPDX-License-Identifier: Apache-2.0
"""Paired differences on one test split, with a bootstrap interval: what two separate accuracies would not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def drop(baseline: Sequence[str], candidate: Sequence[str], resamples: int = 2000) -> dict[str, Any]:
    """Points of accuracy that the candidate loses, with a 95 % interval; run i of both is of the same seed.

    Runs are given by which images they had right, as hexadecimal bits. Images and seeds are both drawn anew, each with
    replacement, so that the interval covers other test images as well as, from a few seeds, other seeds.
    """
    difference = _bits(baseline) - _bits(candidate)
    seeds, images = difference.shape
    chance = np.random.default_rng(0)
    means = np.empty(resamples)
    for i in range(resamples):
        weights = np.bincount(chance.integers(images, size=images), minlength=images)
        means[i] = (difference[chance.integers(seeds, size=seeds)].sum(0) @ weights) / (seeds * images)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"points": 100 * difference.mean(), "low": 100 * low, "high": 100 * high, "n": images, "seeds": seeds}


def _bits(runs: Sequence[str]) -> np.ndarray:
    return np.stack([np.unpackbits(np.frombuffer(bytes.fromhex(run), np.uint8)) for run in runs]).astype(np.int64)
