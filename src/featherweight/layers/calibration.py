# SPDX-License-Identifier: Apache-2.0
"""Calibration data, drawn once: a few hundred samples to solve layers on, and some that no solver sees.

The batches are kept in memory for the whole walk. A loader that shuffles or augments would otherwise show other samples
in each pass, let held-out samples slip among the others, and make a resumed run a different one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.task import Task, batches, tensors_in

__all__ = ["Batches", "Calibration", "draw", "numbered"]


class Batches(tuple[Any, ...]):
    """Some of a loader's batches, and their `numbers` there, from 0: what an error has to name."""

    numbers: tuple[int, ...]

    def __new__(cls, found: Sequence[tuple[int, Any]]) -> Batches:
        made = super().__new__(cls, (batch for _, batch in found))
        made.numbers = tuple(number for number, _ in found)
        return made


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Each batch with its number in the loader that it comes from; those of any other iterable are counted.

    >>> list(numbered(Batches([(1, "b"), (3, "d")]))), list(numbered(["a", "b"]))
    ([(1, 'b'), (3, 'd')], [(0, 'a'), (1, 'b')])
    """
    return zip(batches.numbers if isinstance(batches, Batches) else itertools.count(), batches, strict=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Batches to solve on (`fit`) and batches to judge by (`held_out`, maybe none), with their samples counted."""

    fit: Batches
    held_out: Batches
    samples: int
    held_out_samples: int
    notes: tuple[str, ...] = ()


def draw(task: Task, samples: int, held_out: float, seed: int) -> Calibration:
    """The first `samples` samples, in whole batches, of the task's calibration data (else of its training data).

    The share `held_out` of the batches, spread evenly, is set apart; a single batch is cut in two along its first axis
    where all its tensors share one. Fewer samples than asked for are used as they are, and said.

    Raises `DataError` for data that is missing or empty.

    >>> task = Task(torch.nn.Linear(2, 1), (torch.zeros(1, 2),), calibration=[torch.zeros(10, 2)])
    >>> drawn = draw(task, samples=100, held_out=0.2, seed=0)
    >>> drawn.samples, drawn.held_out_samples
    (8, 2)
    """
    name = "train" if task.calibration is None else "calibration"
    found: list[tuple[int, Any]] = []
    count = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number, batch in enumerate(batches(getattr(task, name), name)):
            found.append((number, batch))
            count += size_of(batch)
            if count >= samples:
                break
    notes = [f"Task.{name} held {count} samples of the {samples} asked for."] if count < samples else []
    if held_out and len(found) == 1 and (first := _first_axis(found[0][1])) is not None and first > 1:
        cut = max(1, round(first * (1 - held_out)))
        parts = [slice(0, cut), slice(cut, first)] if cut < first else [slice(0, first)]
        found = [(0, _cut(found[0][1], part)) for part in parts]
    aside = _spread(len(found), held_out)
    if held_out and not aside:
        notes.append(
            f"One batch of {count} samples cannot be cut in two, so nothing is held out: what is kept is judged on the "
            "samples that it was solved on. Give smaller batches."
        )
    fit = Batches([one for i, one in enumerate(found) if i not in aside])
    judges = Batches([one for i, one in enumerate(found) if i in aside])
    return Calibration(fit, judges, sum(map(size_of, fit)), sum(map(size_of, judges)), tuple(notes))


def size_of(batch: Any) -> int:
    """Samples in a batch: the first axis of its first tensor."""
    tensor = next(tensors_in(batch), None)
    return 1 if tensor is None or tensor.ndim == 0 else len(tensor)


def _spread(batches: int, share: float) -> set[int]:
    if not share or batches < 2:
        return set()
    count = min(batches - 1, max(1, round(batches * share)))
    return {(2 * i + 1) * batches // (2 * count) for i in range(count)} if count > 1 else {batches - 1}


def _first_axis(batch: Any) -> int | None:
    """The length of the first axis, if all tensors of the batch have the same."""
    lengths = {len(tensor) if tensor.ndim else None for tensor in tensors_in(batch)}
    return lengths.pop() if len(lengths) == 1 else None


def _cut(batch: Any, part: slice) -> Any:
    take: Callable[[Any], Any] = lambda value: _cut(value, part)  # noqa: E731
    if isinstance(batch, Tensor):
        return batch[part]
    if isinstance(batch, Mapping):
        return {key: take(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(map(take, batch)) if type(batch) in (tuple, list) else tuple(map(take, batch))
    return batch
