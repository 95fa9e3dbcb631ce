# SPDX-License-Identifier: Apache-2.0
"""When cutting may stop: MACs, parameters, bytes, memory or measured latency, absolute or the share kept.

All but latency follow from counts (`costs.py`). Latency does not follow from anything: it is timed, on copies that are
really cut, side by side with the model as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from featherweight.errors import OptionError, is_number, nearest
from featherweight.sizes import parse_bytes, split_unit

__all__ = ["KINDS", "Goal", "check_until", "goals_of", "words"]

KINDS = ("macs", "parameters", "bytes", "memory", "latency")
_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclasses.dataclass(frozen=True)
class Goal:
    """What one cost is to come down to: `limit`, from `whole`. Milliseconds for latency, elements for memory."""

    kind: str
    limit: float
    whole: float

    def part_way(self, progress: float) -> Goal:
        """The limit at a progress from 0 (as it is) to 1 (the limit)."""
        return dataclasses.replace(self, limit=self.whole + progress * (self.limit - self.whole))


def check_until(me: str, until: object) -> dict[str, str | int | float]:
    """The targets as a dict. Raises `OptionError` for anything that is not one."""
    if not isinstance(until, Mapping) or not until:
        raise OptionError(f"{me}: until says what to come down to, until={{'macs': '50 %'}} say; got {until!r}.")
    for kind, amount in until.items():
        if kind not in KINDS:
            close = ", ".join(nearest(str(kind), KINDS)) or KINDS[0]
            raise OptionError(f"{me}: until has {kind!r}, which is none of {', '.join(KINDS)}. Nearest: {close}.")
        _limit(me, kind, amount, 1.0)
    return dict(until)


def goals_of(me: str, until: Mapping[str, str | int | float], wholes: Mapping[str, float]) -> tuple[Goal, ...]:
    """The goals of a model whose costs are `wholes`.

    >>> goals_of("here", {"macs": "50 %", "latency": "8 ms"}, {"macs": 100.0, "latency": 20.0})
    (Goal(kind='macs', limit=50.0, whole=100.0), Goal(kind='latency', limit=8.0, whole=20.0))
    """
    return tuple(Goal(kind, _limit(me, kind, amount, wholes[kind]), wholes[kind]) for kind, amount in until.items())


def _limit(me: str, kind: str, amount: object, whole: float) -> float:
    number, unit = split_unit(amount)
    if unit == "%" and 0 < number <= 100:
        return whole * number / 100
    if kind == "bytes":
        return float(parse_bytes(cast(str, amount), f"{me}: until bytes"))
    if kind != "latency" and isinstance(amount, float) and 0 < amount < 1:
        raise OptionError(
            f"{me}: until {kind}={amount!r} is less than one; the share kept is written {kind}='{100 * amount:g} %'."
        )
    if is_number(amount) and amount > 0:
        return float(amount)
    table: Mapping[str, float] = _SECONDS if kind == "latency" else _COUNTS
    if unit in table and number > 0 and (unit or kind != "latency"):
        return number * table[unit]
    example = "'8 ms', 8 (milliseconds)" if kind == "latency" else "'1.5 G', 1500000000"
    raise OptionError(f"{me}: until {kind}={amount!r} is neither an amount ({example}) nor the share kept ('50 %').")


def words(kind: str, value: float) -> str:
    """An amount with its unit.

    >>> words("macs", 1234567), words("latency", 8.25)
    ('1.235M MACs', '8.25 ms')
    """
    if kind == "latency":
        return f"{value:.3g} ms"
    name = {"macs": "MACs", "memory": "elements of memory"}.get(kind, kind)
    for unit in ("T", "G", "M", "k"):
        if value >= _COUNTS[unit]:
            return f"{value / _COUNTS[unit]:.4g}{unit} {name}"
    return f"{value:.0f} {name}"
