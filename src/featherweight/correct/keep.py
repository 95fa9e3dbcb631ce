# SPDX-License-Identifier: Apache-2.0
"""A correction is an attempt: it stays only where the model then answers held-out samples better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from featherweight.correct.surroundings import restore, snapshot
from featherweight.errors import NumericalError

__all__ = ["Correction", "Moved", "keep_if_better"]


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a correction did: names of the tensors that it set, and what it left alone, each with the reason."""

    names: tuple[str, ...] = ()
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def note(self) -> str:
        """For a report: `3 tensors corrected; left alone: fc (has no bias)`."""
        done = (
            f"{len(self.names)} tensor{'s' * (len(self.names) > 1)} corrected" if self.names else "nothing to correct"
        )
        if self.left and not self.names:
            done = "nothing corrected"
        few = [f"{name} ({reason})" for name, reason in list(self.left.items())[:5]]
        more = f" and {len(self.left) - 5} more" if len(self.left) > 5 else ""
        return f"{done}; left alone: {', '.join(few)}{more}" if few else done


@dataclasses.dataclass(frozen=True)
class Correction:
    """One correction that was tried: the held-out output error `before` and `after` it, and whether it was `kept`.

    `after` is what the attempt reached, also where it was undone (infinity: it gave NaN). See `output_error`.
    """

    name: str
    before: float
    after: float
    kept: bool
    note: str

    @property
    def error(self) -> float:
        """The held-out output error that the model is left with."""
        return self.after if self.kept else self.before

    @property
    def words(self) -> str:
        """The same as a sentence, without a full stop."""
        done = "kept" if self.kept else "not kept"
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: held-out output error {self.before:.4g} -> {self.after:.4g}, {done}{note}"


def keep_if_better(
    name: str, attempt: Callable[[], Moved], tensors: Iterable[Tensor], error: Callable[[], float], before: float
) -> Correction:
    """Tries a correction of your model in place; keeps it where `error()` falls below `before`, else undoes it.

    `tensors` are all that the attempt may change: they are copied, and hold their old bits again where the error did
    not fall, where it is no number any more, and where anything is raised, Ctrl-C included.

    >>> import torch
    >>> weight = torch.tensor([3.0])
    >>> def shrink() -> Moved:
    ...     weight.mul_(0.5)
    ...     return Moved(("weight",))
    >>> keep_if_better("shrink", shrink, [weight], lambda: float((weight - 1).abs()), before=2.0).kept, weight
    (True, tensor([1.5000]))
    >>> keep_if_better("shrink", shrink, [weight], lambda: float((weight - 1).abs()), before=0.1).kept, weight
    (False, tensor([1.5000]))
    """
    saved = snapshot(tensors)
    try:
        moved = attempt()
        if not moved.names:
            return Correction(name, before, before, False, moved.note)
        note = moved.note
        try:
            after = error()
        except NumericalError as failure:
            after, note = math.inf, f"{note}; undone: {failure}"
        kept = after < before
        if not kept:
            restore(saved)
        return Correction(name, before, after, kept, note)
    except BaseException:
        restore(saved)
        raise
