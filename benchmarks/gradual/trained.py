# SPDX-License-Identifier: Apache-2.0
"""The three experiments on Fashion-MNIST: accuracy against sparsity, dip and recovery, large-sparse against small-dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.gradual import networks
from benchmarks.gradual.paired import drop
from benchmarks.gradual.training import WIDTH, Run, runs

SPARSITIES = (0.5, 0.75, 0.875, 0.95)
Results = dict[str, Any]


def accuracy(steps: int, seeds: int, workers: int) -> Results:
    """Dense against four sparsities, each trained as long, over several seeds."""
    jobs = [Run(sparsity, seed, steps) for sparsity in (0.0, *SPARSITIES) for seed in range(seeds)]
    done = runs(jobs, workers)
    rows = [_row([run for run in done if run["sparsity"] == s], done[:seeds]) for s in (0.0, *SPARSITIES)]
    return {"rows": rows, "runs": done}


def small(steps: int, seeds: int, workers: int, wide: Results) -> Results:
    """The pruned networks of `accuracy` against dense ones that are as much narrower: at least as many non-zeros."""
    sparse = wide["rows"][1:]
    widths = [_width(row["nonzeros"]) for row in sparse]
    done = runs([Run(0.0, seed, steps, width) for width in widths for seed in range(seeds)], workers)
    rows = []
    for width, row in zip(widths, sparse, strict=True):
        pruned = [run for run in wide["runs"] if run["sparsity"] == row["sparsity"]]
        rows.append(_row([run for run in done if run["width"] == width], pruned) | {"wide": row})
    return {"dense": wide["rows"][0], "rows": rows, "runs": done}


def dip(steps: int, workers: int) -> Results:
    """87.5 % in many small updates, in a few large ones, and in one; evaluated just before and just after each."""
    watch, few = max(1, steps // 40), steps // 6
    jobs = [
        Run(0.875, steps=steps, watch=watch),
        Run(0.875, steps=steps, watch=watch, every=few),
        Run(0.875, steps=steps, watch=watch, schedule="one_shot"),
        Run(steps=steps, watch=watch),
    ]
    return {"runs": [{key: value for key, value in run.items() if key != "right"} for run in runs(jobs, workers)]}


def _row(group: Sequence[Results], baseline: Sequence[Results]) -> Results:
    """Runs that differ in nothing but the seed, as one row: means, and the paired drop from the baseline's runs."""
    same = ("sparsity", "width", "layer_sparsity", "network_sparsity", "parameters", "nonzeros", "dense_bytes")
    mean = {key: sum(run[key] for run in group) / len(group) for key in ("test", "packed_bytes", "gzip_bytes")}
    tests = {"tests": [run["test"] for run in group]}
    paired = drop([run["right"] for run in baseline], [run["right"] for run in group])
    return {key: group[0][key] for key in same} | mean | tests | {"drop": paired}


def _width(nonzeros: int) -> int:
    """The narrowest network of the family with at least so many parameters."""
    return next(width for width in range(1, WIDTH + 1) if _size(networks.cnn(width)) >= nonzeros)


def _size(model: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in model.parameters())
