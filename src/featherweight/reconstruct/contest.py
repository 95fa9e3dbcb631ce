# SPDX-License-Identifier: Apache-2.0
"""Several solvers on one layer: which of them a budget of work pays for, and which answer is delivered.

Without a judge the lowest loss on the layer's own H wins. A judge gives the loss of candidate weights on samples that no
solver saw; then the lowest judged loss wins, and since the simple method (magnitude, nearest) always takes part, nothing
worse than it on those samples is ever delivered, whichever solver was asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from featherweight.errors import NumericalError, OptionError, nearest

__all__ = ["Contest", "Judge", "affordable", "contest", "entrants"]

# The loss of weights (rows, d) in the layer's place on held-out samples.
Judge = Callable[[Tensor], float]

Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, eq=False)
class Contest(Generic[Answer]):
    """Who won, with what, and the losses of all: on the layer's H, and as judged (empty without a judge)."""

    name: str
    answer: Answer
    losses: Mapping[str, float]
    judged: Mapping[str, float]
    notes: tuple[str, ...]


def entrants(solver: str, best: Callable[[], list[str]], names: Iterable[str], simple: str, judged: bool) -> list[str]:
    """The solvers to run: the one that is named, or those of `best`; and the simple method where a judge compares.

    Raises `OptionError` for a name that no solver has.

    >>> entrants("obq", list, ["nearest", "obq"], simple="nearest", judged=True)
    ['nearest', 'obq']
    """
    known = list(names)
    if solver != "best" and solver not in known:
        close = ", ".join(nearest(solver, [*known, "best"])) or "best"
        raise OptionError(f"solver {solver!r} is none of {', '.join(known)}, best. Nearest: {close}.")
    chosen = best() if solver == "best" else [solver]
    return list(dict.fromkeys([simple, *chosen])) if judged else chosen


def affordable(families: Sequence[Sequence[str]], work: Callable[[str], float], budget: float) -> list[str]:
    """Of each family, dearest first, the first solver that what is left of the budget pays for.

    The last of the first family takes part whatever it costs.

    >>> affordable([["slow", "quick"], ["slower"]], {"slow": 9.0, "quick": 1.0, "slower": 20.0}.__getitem__, 5.0)
    ['quick']
    """
    names: list[str] = []
    for i, family in enumerate(families):
        fits = [name for name in family if work(name) <= budget]
        chosen = fits[:1] or (list(family[-1:]) if i == 0 else [])
        budget -= sum(work(name) for name in chosen)
        names += chosen
    return names


def contest(
    names: Sequence[str],
    run: Callable[[str], tuple[Tensor, Answer]],
    loss: Callable[[Tensor], float],
    judge: Judge | None,
    simple: str,
) -> Contest[Answer]:
    """Runs each of `names`, of which `run` gives the weights and whatever else belongs to the answer; the best is kept.

    Equal judged losses (a layer that no held-out sample reached) are told apart by the loss on H. Raises
    `NumericalError` where the judge has no finite loss even for the simple method.
    """
    losses: dict[str, float] = {}
    judged: dict[str, float] = {}
    best: tuple[tuple[float, float], str, Answer] | None = None
    for name in names:
        weights, answer = run(name)
        losses[name] = loss(weights)
        if judge is not None:
            judged[name] = _finite(judge(weights))
        place = (judged.get(name, 0.0), losses[name])
        # Later solvers are the more thorough, so they win what is equal.
        if best is None or place <= best[0]:
            best = place, name, answer
    if best is None:
        raise OptionError("no solver takes part; name at least one.")
    (least, _), winner, answer = best
    if math.isinf(least):
        raise NumericalError("the judge gives NaN or infinity for every candidate; look at the held-out samples.")
    return Contest(winner, answer, losses, judged, _overruled(names, winner, simple, judged))


def _finite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _overruled(names: Sequence[str], winner: str, simple: str, judged: Mapping[str, float]) -> tuple[str, ...]:
    if not judged or winner != simple or len(names) == 1:
        return ()
    best, loss = min(((name, judged[name]) for name in names if name != simple), key=lambda pair: pair[1])
    return (
        f"on held-out samples {simple} ({judged[simple]:.4g}) is better than {best} ({loss:.4g}), so {simple} was "
        "delivered; more calibration samples, or more damping, would help the solver.",
    )
