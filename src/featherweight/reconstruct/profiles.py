# SPDX-License-Identifier: Apache-2.0
"""Profiles: which entry of the database each layer gets, uniform or by a budget on the whole model.

A budget is a share of what the whole dense model costs, the layers that nobody compresses included: half the MACs is
the paper's "2x fewer FLOPs". The choice minimises the sum of the layers' losses, each relative to the energy of the
layer's output so that they can be added (SPDY, arXiv 2201.13096, then multiplies each with a sensitivity that it has
learned).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from featherweight.errors import NothingToCompress, OptionError, nearest
from featherweight.layers import select
from featherweight.reconstruct.database import Database, Entry
from featherweight.reconstruct.knapsack import Pick, cheapest, pick

__all__ = ["Profile", "global_loss", "uniform", "within", "within_each"]

Figure = str | Callable[[Entry], float]


@dataclasses.dataclass(frozen=True)
class Profile:
    """An entry for every problem, by its name, with what they cost and lose together.

    `asked` and `share` are the cost wanted and reached, over the dense cost. Where `feasible` is False nothing meets
    what was asked, and this is the nearest that can be reached. `loss` is the sum that was minimised and `bound` the
    least that it could be: the choice is proved best where they are equal.
    """

    name: str
    choice: Mapping[str, Entry]
    asked: float
    share: float
    cost: float
    loss: float
    bound: float
    feasible: bool

    @property
    def sparsities(self) -> dict[str, float]:
        """The share of zeros of each weight that has any, for `Reconstruct(sparsity=..., layers=[*sparsities])`.

        So a profile is realised in a walk with corrected targets, which knows what earlier layers lost. A weight of
        several problems gets their mean.
        """
        parts: dict[str, list[float]] = {}
        for name, entry in self.choice.items():
            parts.setdefault(name.partition("[")[0], []).append(entry.sparsity)
        return {name: sum(shares) / len(shares) for name, shares in parts.items() if any(shares)}

    def __str__(self) -> str:
        if not self.feasible:
            return f"{self.name}: infeasible; the least that can be reached is {self.share:.4g} of the dense cost."
        return f"{self.name}: {self.share:.4g} of the dense cost, loss {self.loss:.4g} (at least {self.bound:.4g})."


def uniform(
    database: Database,
    kind: str,
    sparsity: float | None = None,
    *,
    layers: Sequence[str] = ("*",),
    loss: Figure = "relative",
) -> Profile:
    """The same for all layers that the globs name; the others stay dense.

    `kind` is one of `database.contents.kinds`: `weight`, `2:4`, `4 bit`. A kind with levels takes the lowest level that
    reaches `sparsity`; if none does, the highest, and `feasible` is False. Raises `OptionError`, `NothingToCompress`.
    """
    if kind not in database.contents.kinds:
        close = ", ".join(nearest(kind, database.contents.kinds)) or ", ".join(database.contents.kinds)
        raise OptionError(f"kind {kind!r} is not in the database. Nearest: {close}.")
    chosen, feasible = {}, True
    for name, entries in _offers(database, (kind,), layers).items():
        own = [entry for entry in entries if entry.kind == kind]
        if not own:
            chosen[name] = entries[0]
            continue
        levelled = own[0].asked is not None
        if levelled != (sparsity is not None):
            raise OptionError(
                f"kind {kind!r} "
                + ("has levels; give the sparsity." if levelled else "says its sparsity itself; give none.")
            )
        if sparsity is not None:
            enough = [entry for entry in own if entry.asked is not None and entry.asked >= sparsity - 1e-9]
            feasible = feasible and bool(enough)
            own = enough or own[-1:]
        chosen[name] = own[0]
    total = float(sum(database.layers[name].parameters for name in chosen))
    kept = sum(_kept(database, entry) for entry in chosen.values())
    lost = sum(_reader(database, loss)(entry) for entry in chosen.values())
    title = kind if sparsity is None else f"{kind}, uniform {sparsity:g}"
    asked = kept / total if sparsity is None else 1 - sparsity
    return Profile(title, chosen, asked, kept / total, kept, lost, lost, feasible)


def global_loss(
    database: Database,
    sparsity: float,
    *,
    kinds: Sequence[str] = ("weight",),
    layers: Sequence[str] = ("*",),
    loss: Figure = "relative",
    sensitivity: Mapping[str, float] | None = None,
) -> Profile:
    """The least summed loss at a share of zeros over all weights in the database together. Options as in `within`."""
    offers = _offers(database, kinds, layers)
    total = float(sum(database.layers[name].parameters for name in offers))
    return _solve(
        f"global {sparsity:g}",
        database,
        offers,
        lambda entry: _kept(database, entry),
        1 - sparsity,
        total,
        loss,
        sensitivity,
    )


def within(
    database: Database,
    share: float,
    cost: Figure = "macs",
    *,
    kinds: Sequence[str] | None = None,
    layers: Sequence[str] = ("*",),
    loss: Figure = "relative",
    sensitivity: Mapping[str, float] | None = None,
    rest: float | None = None,
) -> Profile:
    """The least summed loss at `share` of the dense model's cost: 1/2 of its MACs, say. Never overshoots.

    - `cost`: `macs`, `bytes`, `cost` (what the user's function gave when the database was built) or a function of an
      entry.
    - `kinds`: which entries may be taken (None: all); dense always may. `layers`: globs; the others stay dense.
    - `loss`: `relative`, `loss`, `held_out`, `measured` or a function of an entry. `sensitivity`: a factor on it by
      problem name; 1 where none is given.
    - `rest`: the cost of what is not in the database; known for `macs` and `bytes`, 0 elsewhere unless given.

    Where the target cannot be met, the profile has `feasible` False and is the cheapest there is.
    """
    read = _reader(database, cost)
    offers = _offers(database, kinds, layers)
    dense = sum(read(entries[0]) for entries in offers.values())
    whole = {"macs": float(database.macs), "bytes": float(database.bytes)}.get(cost) if isinstance(cost, str) else None
    if rest is not None:
        total = dense + rest
    else:
        total = dense if whole is None else max(whole, dense)
    title = cost if isinstance(cost, str) else "cost"
    return _solve(f"{title} x {share:.4g}", database, offers, read, share, total, loss, sensitivity)


def within_each(
    database: Database, shares: Iterable[float], cost: Figure = "macs", **options: Any
) -> tuple[Profile, ...]:
    """`within` for several shares; those that cannot be met are in the list too, each with the least that can."""
    return tuple(within(database, share, cost, **options) for share in shares)


def _solve(
    title: str,
    database: Database,
    offers: Mapping[str, tuple[Entry, ...]],
    read: Callable[[Entry], float],
    share: float,
    total: float,
    loss: Figure,
    sensitivity: Mapping[str, float] | None,
) -> Profile:
    if not 0 <= share <= 1:
        raise OptionError(f"{title}: a share of the dense cost is from 0 to 1; got {share!r} (for 2x fewer, 1/2).")
    factors = dict(sensitivity or {})
    for name in factors:
        if name not in offers:
            raise OptionError(
                f"sensitivity names {name!r}, which is not in the database. Nearest: {', '.join(nearest(name, offers))}."
            )
    measure = _reader(database, loss)
    costs = [[read(entry) for entry in entries] for entries in offers.values()]
    losses = [[factors.get(name, 1.0) * measure(entry) for entry in entries] for name, entries in offers.items()]
    rest = total - sum(cost[0] for cost in costs)
    found = pick(costs, losses, share * total - rest)
    feasible = found is not None
    best: Pick = cheapest(costs, losses) if found is None else found
    choice = {name: entries[i] for (name, entries), i in zip(offers.items(), best.indices, strict=True)}
    spent = best.cost + rest
    return Profile(title, choice, share, spent / total if total else 1.0, spent, best.loss, best.bound, feasible)


def _offers(database: Database, kinds: Sequence[str] | None, layers: Sequence[str]) -> dict[str, tuple[Entry, ...]]:
    """What each problem may become, dense first."""
    if not database.layers:
        raise NothingToCompress("the database holds no layer: none that was named was reached by the data.")
    known = database.contents.kinds
    for kind in kinds or ():
        if kind not in known:
            raise OptionError(f"kind {kind!r} is not in the database, which has {', '.join(known)}.")
    weights = list(dict.fromkeys(layer.weight for layer in database.layers.values()))
    named = set(select(weights, layers))
    allowed = {"dense", *(known if kinds is None else kinds)}
    return {
        name: tuple(
            entry
            for entry in database.entries(name)
            if entry.kind == "dense" or (layer.weight in named and entry.kind in allowed)
        )
        for name, layer in database.layers.items()
    }


def _kept(database: Database, entry: Entry) -> float:
    return (1 - entry.sparsity) * database.layers[entry.problem].parameters


def _reader(database: Database, figure: Figure) -> Callable[[Entry], float]:
    """A figure of an entry as a function. Raises `OptionError` where the database does not have it."""
    if not isinstance(figure, str):
        return figure
    if figure not in _FIGURES:
        raise OptionError(f"{figure!r} is none of {', '.join(_FIGURES)}; or give a function of an entry.")

    def read(entry: Entry) -> float:
        value = getattr(entry, figure)
        if value is None:
            raise OptionError(f"the database has no {figure!r} of {entry.problem}: build it with {_FIGURES[figure]}.")
        return float(value)

    return read


_FIGURES = {
    "loss": "nothing more",
    "relative": "nothing more",
    "macs": "nothing more",
    "bytes": "nothing more",
    "held_out": "held_out=batches",
    "measured": "evaluate=function of the model",
    "cost": "cost=function of an entry",
}
