# SPDX-License-Identifier: Apache-2.0
"""`stitch`: the entries that were chosen, as weights of the model they were made of.

Integers on a grid are read as they are. Zeros get their layer's Hessian once more, layer batch by layer batch within
the byte budget, and all other weights are refitted exactly: a forward pass or a few instead of a dense copy an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import OptionError, nearest
from featherweight.layers import Problem, Statistics, collect, passes, tensors_and_ties
from featherweight.reconstruct.building import named_problems, row_scale
from featherweight.reconstruct.database import Database, Entry
from featherweight.reconstruct.entries import Settled, refitted
from featherweight.solvers.hessian import damp

__all__ = ["stitch"]


def stitch(
    database: Database,
    model: nn.Module,
    choice: Mapping[str, Entry],
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any],
    *,
    budget_bytes: int = 2 << 30,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> None:
    """Writes chosen entries into your model, which must have the dense weights that the database was built of.

    Problems that `choice` (a `Profile.choice`) does not name stay dense. On the batches of `build_database` the weights
    are those that `prune` and `quantize` gave there. The model changes only once all weights are known: an error leaves
    it as it was. Takes the memory of one copy of the chosen weights; saves nothing that the entries do not.

    Raises `ArtefactError` for another model's database and `OptionError` for a choice that is not of this database.

    >>> import tempfile
    >>> from featherweight.reconstruct.building import build_database
    >>> from featherweight.reconstruct.entries import Contents
    >>> def forward(model, batch): return model(batch)
    >>> model, data = nn.Sequential(nn.Linear(8, 4)), [torch.randn(32, 8)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     database = build_database(model, data, forward, folder, Contents(patterns=("2:4",), bits=(), joint=()))
    ...     stitch(database, model, {"0.weight": database.entry("0.weight", "2:4")}, data, forward)
    >>> int((model[0].weight == 0).sum())
    16
    """
    for name, entry in choice.items():
        if name not in database.layers:
            raise OptionError(f"{name!r} is not in the database. Nearest: {', '.join(nearest(name, database.layers))}.")
        if entry not in database.entries(name):
            raise OptionError(f"{name}: {entry.label!r} of {entry.problem} is not an entry of this database.")
    database.check(tensors_and_ties(model)[0])
    found = {problem.name: problem for problem in named_problems(model, database.contents)[0]}
    chosen = [(found[name], entry) for name, entry in choice.items() if entry.kind != "dense"]
    answers: dict[str, Tensor] = {}
    sparse: dict[str, tuple[Problem, Entry]] = {}
    for problem, entry in chosen:
        settled = database.settled(entry)
        if settled.integers is not None and settled.grid is not None:
            dense = problem.matrix()
            answers[problem.name] = settled.grid.values(settled.integers).to(dense)
        else:
            sparse[problem.name] = problem, entry
    for group in passes([problem for problem, _ in sparse.values()], max(1, budget_bytes // 2), False):
        statistics = collect(model, group, batches, forward)
        for problem in group:
            if problem.name not in statistics:
                raise OptionError(
                    f"{problem.name}: no batch reached it, so its weights cannot be refitted; the model is as it was. "
                    "Give the batches that the database was built with."
                )
            entry = sparse[problem.name][1]
            answers[problem.name] = _refitted(
                problem, database.settled(entry), statistics.pop(problem.name), entry.damping, budget_bytes // 2
            )
            report({"kind": "step", "step": len(answers), "total": len(chosen)})
    for problem, _ in chosen:
        problem.write(answers[problem.name])


def _refitted(problem: Problem, settled: Settled, statistics: Statistics, damping: float, budget_bytes: int) -> Tensor:
    H = statistics.H
    dense = problem.matrix()
    scale = row_scale(statistics, problem.height)
    W = (dense.to(H.device) * scale).to(dense.dtype)
    pruned = torch.zeros_like(W, dtype=torch.bool) if settled.pruned is None else settled.pruned.to(H.device)
    return (refitted(W, damp(H, damping), pruned, budget_bytes) / scale).to(dense)
