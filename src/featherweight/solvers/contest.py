# SPDX-License-Identifier: Apache-2.0
"""Several solvers on one layer: which of them a budget of work pays for, and which answer is delivered.

Without a judge the lowest loss on the layer's own H wins. A judge gives the loss of candidate weights on samples that
no solver saw; then the lowest judged loss wins, and since the simple method (magnitude, nearest) always takes part,
nothing worse than it on those samples is ever delivered, whichever solver was asked for. And damping is then tried, not
guessed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from featherweight.errors import NumericalError, OptionError, nearest

__all__ = ["Contest", "Judge", "Rules", "affordable", "climb", "contest", "entrants"]

# The loss of weights (rows, d) in the layer's place on held-out samples.
Judge = Callable[[Tensor], float]

Answer = TypeVar("Answer")

# Beyond this a solver hardly sees how inputs go together. The hair is for tenfold steps that were rounded.
_MOST_DAMPING = 0.1 * (1 + 1e-9)


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """What decides: the `loss` on the layer's H and the `judge`; `simple` is the simple method's name.

    `work` is what each solver costs and `budget` what all may cost, in the same units.
    """

    loss: Callable[[Tensor], float]
    judge: Judge | None
    simple: str
    work: Callable[[str], float]
    budget: float


@dataclasses.dataclass(frozen=True, eq=False)
class Contest(Generic[Answer]):
    """Who won, with what, and the losses of all: on the layer's H, and as judged (empty without a judge)."""

    name: str
    answer: Answer
    losses: Mapping[str, float]
    judged: Mapping[str, float]
    spent: float
    notes: tuple[str, ...] = ()


def entrants(solver: str, best: Callable[[], list[str]], names: Iterable[str], rules: Rules) -> list[str]:
    """The solvers to run: the one that is named, or those of `best`; and the simple method where a judge compares.

    Raises `OptionError` for a name that no solver has.
    """
    known = list(names)
    if solver != "best" and solver not in known:
        close = ", ".join(nearest(solver, [*known, "best"])) or "best"
        raise OptionError(f"solver {solver!r} is none of {', '.join(known)}, best. Nearest: {close}.")
    chosen = best() if solver == "best" else [solver]
    return chosen if rules.judge is None else list(dict.fromkeys([rules.simple, *chosen]))


def affordable(family: Sequence[str], work: Callable[[str], float], budget: float) -> str:
    """Of a family, dearest first, the first solver that the budget pays for; the last whatever it costs.

    >>> affordable(["slow", "quick"], {"slow": 9.0, "quick": 1.0}.__getitem__, 5.0)
    'quick'
    """
    return next((name for name in family if work(name) <= budget), family[-1])


def contest(names: Sequence[str], run: Callable[[str], tuple[Tensor, Answer]], rules: Rules) -> Contest[Answer]:
    """Runs each of `names`, of which `run` gives the weights and whatever else belongs to the answer; the best is kept.

    Equal judged losses (a layer that no held-out sample reached) are told apart by the loss on H. Raises
    `NumericalError` where the judge has a finite loss for none.
    """
    found: Contest[Answer] | None = None
    for name in names:
        one = _single(name, rules.work(name), *run(name), rules)
        found = one if found is None else _better(found, one)
    if found is None:
        raise OptionError("no solver takes part; name at least one.")
    if math.isinf(found.judged.get(found.name, 0.0)):
        raise NumericalError("the judge gives NaN or infinity for every candidate; look at the held-out samples.")
    return dataclasses.replace(found, notes=_overruled(found, rules.simple))


def climb(
    found: Contest[Answer], name: str, run: Callable[[str, float], tuple[Tensor, Answer]], rules: Rules, damping: float
) -> Contest[Answer]:
    """Solver `name`, which took part at `damping`, at ten times as much, and so on while that is judged better.

    Few samples make H nearly singular, and solvers then spend its small eigenvalues, which the held-out samples do not
    have. More damping keeps the weights nearer to W. Stops at a tenth of the mean diagonal or where the budget is
    spent.
    """
    least = found.judged[name]
    damping = 10 * damping if damping else 1e-6
    while damping <= _MOST_DAMPING and found.spent + rules.work(name) <= rules.budget:
        label = f"{name}, damping {damping:g}"
        found = _better(found, _single(label, rules.work(name), *run(name, damping), rules))
        if found.judged[label] >= least:
            break
        least, damping = found.judged[label], 10 * damping
    return dataclasses.replace(found, notes=_overruled(found, rules.simple))


def _single(name: str, work: float, weights: Tensor, answer: Answer, rules: Rules) -> Contest[Answer]:
    judged = {}
    if rules.judge is not None:
        verdict = rules.judge(weights)
        judged = {name: math.inf if math.isnan(verdict) else verdict}
    return Contest(name, answer, {name: rules.loss(weights)}, judged, work)


def _better(one: Contest[Answer], other: Contest[Answer]) -> Contest[Answer]:
    """The winner of the two, with the losses of both. Later solvers are the more thorough and win what is equal."""
    places = [(each.judged.get(each.name, 0.0), each.losses[each.name]) for each in (one, other)]
    winner = other if places[1] <= places[0] else one
    return dataclasses.replace(
        winner,
        losses={**one.losses, **other.losses},
        judged={**one.judged, **other.judged},
        spent=one.spent + other.spent,
    )


def _overruled(found: Contest[Answer], simple: str) -> tuple[str, ...]:
    others = {name: loss for name, loss in found.judged.items() if name != simple}
    if found.name != simple or not others:
        return ()
    best = min(others, key=others.__getitem__)
    return (
        f"on held-out samples {simple} ({found.judged[simple]:.4g}) is better than {best} ({others[best]:.4g}), so "
        f"{simple} was delivered; more calibration samples, or more damping, would help the solver.",
    )
