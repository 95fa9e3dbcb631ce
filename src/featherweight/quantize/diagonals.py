# SPDX-License-Identifier: Apache-2.0
"""The diagonals of layer Hessians: how strongly each weight's input speaks. All that weighs errors one by one needs.

H = 2 X Xᵀ / tokens of a whole layer is d x d numbers and as many products a token; its diagonal is d of each. Every row
of a matrix reads the same input, so that a weight's importance is its column's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.layers import Problem, numbered, unwrap
from featherweight.layers.calls import Use, mask_of, quiet, uses, watch
from featherweight.layers.inputs import Input

__all__ = ["hessian_diagonals"]

_CHUNK = 1 << 20  # numbers of a chunk of patches, which a cache holds


def hessian_diagonals(
    model: nn.Module, problems: Sequence[Problem], batches: Iterable[Any], forward: Callable[[Any, Any], Any]
) -> dict[str, Tensor]:
    """Diagonal (d,) of each problem's H, by its name; an embedding's rows count by how often they are read, (rows, 1).

    Layers that no sample reached are absent. The model is left as it was. Raises `NumericalError` for activations that
    are NaN or infinite.

    >>> from featherweight.layers import problems
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> hessian_diagonals(layer, problems(layer)[0], [x], lambda model, batch: model(batch))
    {'weight': tensor([2., 4.], dtype=torch.float64)}
    """
    model = unwrap(model)
    read_by: dict[int, list[Problem]] = {}
    for problem in problems:
        read_by.setdefault(id(problem.weight.parameter), []).append(problem)
    wanted = [
        use
        for key, found in uses(model).items()
        for use in found
        if key in read_by and (use.kind == "embedding") == (read_by[key][0].weight.kind == "embedding")
    ]
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def take(use: Use, call: int, read: list[Input]) -> None:
        for problem in read_by[id(use.parameter)]:
            one = read[problem.part if len(read) > 1 else 0]
            total = _seen(one, problem) if problem.weight.kind == "embedding" else _squares(one, problem)
            sums[problem.name] = sums[problem.name] + total if problem.name in sums else total
            tokens[problem.name] = tokens.get(problem.name, 0) + one.tokens

    with quiet(model):
        for number, batch in numbered(batches):
            watch(wanted, take, lambda: forward(model, batch), f"batch {number}", mask_of(batch), False)  # noqa: B023
    return {name: total * (2 / tokens[name]) for name, total in sums.items() if tokens[name]}


def _squares(read: Input, problem: Problem) -> Tensor:
    """Σ x² over tokens of each column (d,)."""
    group = problem.part if problem.weight.groups > 1 else 0
    total = torch.zeros(problem.d, dtype=torch.float64, device=read.x.device)
    if read.tokens:
        for X in read.patches([group], problem.channels, _CHUNK):
            total += X[0].square().sum(0, dtype=torch.float64)
    return total


def _seen(read: Input, problem: Problem) -> Tensor:
    rows = len(problem.weight.parameter)
    return torch.bincount(read.x.flatten(), minlength=rows).double()[:, None]
