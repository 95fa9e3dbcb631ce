# SPDX-License-Identifier: Apache-2.0
"""Measured latency as a target: how far to go along a path of cuts, told by timing copies that are really cut.

No table and no model of the machine: copies are cut, timed call by call in turns with the model as it is, and the part
of the path between the last too slow and the first fast enough is searched again, a few copies at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from featherweight.edits import cut
from featherweight.graph import Group, Trace
from featherweight.measure import Latency, time_callables
from featherweight.prune.channels.masks import couplings_gone

__all__ = ["cut_copy", "on_device", "per_coupling", "search", "timed"]

_RUNS = 50
_AT_ONCE = 4
_ROUNDS = 3


def cut_copy(model: nn.Module, trace: Trace, inputs: Any, gone: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of the model in evaluation mode with the couplings that are gone really cut. The model is not touched."""
    twin = copy.deepcopy(model).eval()
    couplings = couplings_gone([group for group in trace.groups if group.name in gone], gone)
    if couplings:
        cut(twin, couplings, trace=trace, inputs=inputs, verify=False)
    return twin


def timed(models: Mapping[str, nn.Module], inputs: Any, runs: int = _RUNS) -> dict[str, Latency]:
    """Latencies of one forward each on `inputs` (a tuple, or a dict by keyword), taken in turns."""

    def call(model: nn.Module) -> Callable[[], Any]:
        def once() -> Any:
            with torch.inference_mode():
                answer = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
                if torch.cuda.is_available() and next(model.parameters()).is_cuda:
                    torch.cuda.synchronize()
                return answer

        return once

    return time_callables({name: call(model) for name, model in models.items()}, warmup=5, runs=runs)


def search(length: int, ratios: Callable[[Sequence[int]], Sequence[float]], tolerance: float) -> tuple[int, float]:
    """The shortest part of a path with a measured ratio of at most 1, and its ratio; all of it where none has one.

    `ratios(parts)` measures several parts of the path, given by their lengths, side by side.

    >>> search(1000, lambda parts: [2 - part / 400 for part in parts], tolerance=0.02)
    (400, 1.0)
    """
    low, high = 0, length
    known: dict[int, float] = {}
    for _ in range(_ROUNDS):
        points = sorted({low + round((high - low) * (i + 1) / (_AT_ONCE + 1)) for i in range(_AT_ONCE)} | {high})
        points = [point for point in points if point not in known]
        if not points:
            break
        known.update(zip(points, ratios(points), strict=True))
        reached = [point for point in sorted(known) if known[point] <= 1 + tolerance / 2]
        if not reached:
            return length, known[length]
        high = reached[0]
        low = max((point for point in known if point < high), default=0)
    return high, known[high]


def per_coupling(
    model: nn.Module, trace: Trace, inputs: Any, groups: Sequence[Group], share: float = 0.5
) -> dict[str, float]:
    """Milliseconds that a coupling of each group costs: of copies with a share of that group alone cut, timed in turns.

    Measured once, on the model as it is. What is lost in the clock's noise counts as a hundredth of the median group.
    """
    models: dict[str, nn.Module] = {"": cut_copy(model, trace, inputs, {})}
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.name] = max(1, int(group.size * share))
        gone = np.arange(group.size) >= group.size - counts[group.name]
        models[group.name] = cut_copy(model, trace, inputs, {group.name: gone})
    times = timed(models, inputs)
    saved = {name: (times[""].median_ms - times[name].median_ms) / count for name, count in counts.items()}
    usual = [value for value in saved.values() if value > 0]
    floor = float(np.median(usual)) / 100 if usual else 1.0
    return {name: max(value, floor) for name, value in saved.items()}


def on_device(inputs: Any, model: nn.Module) -> Any:
    """The inputs on the model's device."""
    tensors: Iterable[torch.Tensor] = [*model.parameters(), *model.buffers()]
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
