# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them, in one place: a report must never show the same quantity in two manners.

Decimal units (1 kB = 1000 bytes), three significant digits, a dash for what was not measured. What is not a finite
number says so ("NaN") in place of vanishing.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

__all__ = [
    "MISSING",
    "change",
    "count",
    "digits",
    "figure",
    "metric",
    "milliseconds",
    "mood",
    "number",
    "percent",
    "seconds",
    "sentence",
    "size",
    "zeros",
]

MISSING = "–"


def number(value: Any) -> float | None:
    """The value as a finite float, or None for all else: None, NaN, infinity, text, True.

    >>> number(3), number(float("nan")), number("3"), number(True)
    (3.0, None, None, None)
    """
    if type(value) is float:  # most are, and asking an abstract class costs ten times as much
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def _otherwise(value: Any) -> str:
    """What to show for something that is not a finite number."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    return str(value)


def digits(value: float) -> str:
    """Three significant digits, never in scientific notation for the sizes that occur here."""
    if value == 0:
        return "0"
    value = float(f"{value:.2e}")  # first, since rounding may carry: 99.96 becomes 100, not 100.0
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, 2 - exponent)}f}" if -6 < exponent < 9 else f"{value:.2e}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    index = 0
    # 999.5 is where three digits round up to 1000: 999,600 bytes are 1.00 MB, not 1000 kB.
    while abs(value) >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{digits(value)} {units[index]}".rstrip()


def count(value: Any) -> str:
    """A count: exact below a million, three digits above.

    >>> count(29898), count(4_601_000), count(None)
    ('29,898', '4.60 M', '–')
    """
    found = number(value)
    if found is None:
        return _otherwise(value)
    return f"{found:,.0f}" if abs(found) < 1e6 else _scaled(found, ("", "k", "M", "G", "T", "P"))


def bits(value: Any) -> str:
    """Bits of one number, on average.

    >>> bits(8.0), bits(5.278), bits(None)
    ('8', '5.28', '–')
    """
    found = number(value)
    return _otherwise(value) if found is None else f"{found:.3g}"


def size(value: Any) -> str:
    """Bytes in decimal units.

    >>> size(139_800), size(312), size(1_234_567)
    ('140 kB', '312 B', '1.23 MB')
    """
    found = number(value)
    if found is None:
        return _otherwise(value)
    return f"{found:.0f} B" if abs(found) < 999.5 else _scaled(found, ("B", "kB", "MB", "GB", "TB"))


def milliseconds(value: Any) -> str:
    """A time in milliseconds, three digits.

    >>> milliseconds(0.8412), milliseconds(12.0)
    ('0.841 ms', '12.0 ms')
    """
    found = number(value)
    return _otherwise(value) if found is None else f"{digits(found)} ms"


def seconds(value: Any) -> str:
    """A duration in the units that fit it.

    >>> seconds(12.34), seconds(245), seconds(4350)
    ('12.3 s', '4 min 5 s', '1 h 12 min')
    """
    found = number(value)
    if found is None:
        return _otherwise(value)
    if found < 100:
        return f"{digits(found)} s"
    minutes, rest = divmod(round(found), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def percent(value: Any) -> str:
    """A share as a percentage. What is not quite all is never rounded up to all, nor what is there down to nothing.

    >>> percent(0.9), percent(0.99996), percent(0.00001), percent(1.0)
    ('90.0 %', '>99.9 %', '<0.1 %', '100 %')
    """
    found = number(value)
    if found is None:
        return _otherwise(value)
    if found in (0.0, 1.0):
        return f"{found:.0%}".replace("%", " %")
    if 0.9995 <= found < 1:
        return ">99.9 %"
    return "<0.1 %" if 0 < found < 0.0005 else f"{found * 100:.1f} %"


def figure(value: Any) -> str:
    """A loss, learning rate or difference in its own units, at most four digits.

    >>> figure(0.5), figure(103.71), figure(0.00000477), figure(float("nan"))
    ('0.5', '103.7', '4.77e-06', 'NaN')
    """
    found = number(value)
    if found is None:
        return _otherwise(value)
    return f"{found:,.0f}" if 1e4 <= abs(found) < 1e12 else f"{found:.4g}"


def metric(value: Any) -> str:
    """The user's metric in their own units, always four digits, so that figures line up one below the other.

    >>> metric(0.975), metric(1.0), metric(103.71)
    ('0.9750', '1.000', '103.7')
    """
    found = number(value)
    return figure(value) if not found or not 1e-4 <= abs(found) < 9999.5 else f"{found:#.4g}".rstrip(".")


def zeros(nonzeros: Any, parameters: Any) -> float | None:
    """The share of zeros, or None where either count is missing or there are no parameters."""
    kept, total = number(nonzeros), number(parameters)
    return None if kept is None or not total else 1 - kept / total


def change(before: Any, after: Any) -> str:
    """How much smaller, as a factor; an empty string where that cannot be said.

    >>> change(1200, 140), change(100, 100), change(100, 130)
    ('8.6x smaller', 'same', '1.3x larger')
    """
    old, new = number(before), number(after)
    if not old or not new or old < 0 or new < 0:
        return ""
    factor = max(old, new) / min(old, new)
    if factor < 1.005:
        return "same"
    shown = f"{factor:.2f}" if factor < 1.1 else f"{factor:.1f}" if factor < 100 else f"{factor:.0f}"
    return f"{shown}x {'smaller' if new < old else 'larger'}"


def mood(value: Any, good: str, bad: str, neither: str) -> tuple[str, str]:
    """(name of a look, words) of a yes, a no and a neither: what colour says is always said in words and shape too.

    >>> mood(True, "faster", "slower", "within noise")
    ('good', 'faster')
    """
    return ("good", good) if value is True else ("bad", bad) if value is False else ("flat", neither)


def sentence(said: str) -> str:
    """Words as a sentence: a capital in front, one full stop behind.

    >>> sentence("1.31x faster"), sentence("no faster."), sentence("")
    ('1.31x faster.', 'No faster.', '')
    """
    return f"{said[:1].upper()}{said[1:].rstrip('.')}." if said else ""
