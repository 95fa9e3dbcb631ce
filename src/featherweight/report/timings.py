# SPDX-License-Identifier: Apache-2.0
"""Latency as distributions: for each runtime the baseline's strip above the compressed model's, on one axis.

Medians alone hide whether two models differ by more than the machine's own unrest; the strips show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from featherweight.report import charts, words
from featherweight.report.tables import part, spoken, text

__all__ = ["strips"]

LABELS = {"before": "baseline", "after": "compressed"}


def strips(report: Mapping[str, Any], runtime: str, limit: int) -> dict[str, Any]:
    """What the page shows of one runtime; at most `limit` samples a strip."""
    timed = {when: part(report, when, "latency", runtime) for when in LABELS}
    samples = {when: _samples(row) for when, row in timed.items()}
    axis = _axis(timed.values(), samples.values())
    pictures = []
    for when, row in timed.items():
        if row:
            numbers = [(name, words.milliseconds(row.get(f"{name}_ms"))) for name in ("median", "p90")]
            numbers.append(("n", words.count(row.get("n"))))
            said = ", ".join(f"{name} {value}" for name, value in numbers)
            marks = words.number(row.get("median_ms")), words.number(row.get("p90_ms"))
            svg = charts.strip(
                _spread(samples[when], limit), axis, f"{spoken(runtime)}, {LABELS[when]}: {said}", when, *marks
            )
            pictures.append({"label": LABELS[when], "kind": when, "numbers": numbers, "svg": svg})
    compared = part(report, "comparisons", runtime)
    look = words.mood(compared.get("faster"), "faster", "slower", "no difference claimed")
    return {
        "name": spoken(runtime),
        "strips": pictures,
        "scale": charts.scale(axis, words.milliseconds),
        "mood": look if compared else ("", ""),
        "words": _sentence(compared),
        "from_zero": axis.low == 0,
        "beyond": sum(value > axis.high for value in itertools.chain(*samples.values())),
    }


def _axis(timed: Iterable[Mapping[str, Any]], samples: Iterable[Sequence[float]]) -> charts.Axis:
    """From zero where the two differ that much, else from the fastest run; the slowest few may lie beyond its end.

    One hiccup of the machine would squeeze all the rest into a line: the axis ends at p90 plus four times the way
    from median to p90, or at the slowest run if that comes first.
    """
    known: list[float] = []
    ends: list[float] = []
    for row, values in zip(timed, samples, strict=True):
        median, p90 = words.number(row.get("median_ms")), words.number(row.get("p90_ms"))
        if len(values) >= 10:
            ordered = sorted(values)
            median, p90 = ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10]
        known += [*values, *(value for value in (median, p90) if value is not None)]
        if median is not None and p90 is not None:
            ends.append(p90 + 4 * max(p90 - median, 0.0))
    slowest, fastest = max(known, default=1.0), min(known, default=0.0)
    end = max(min(slowest, max(ends)), fastest) if ends else slowest
    return charts.axis_for([0.0 if 0 <= fastest < 0.5 * end else fastest, end], ticks=4)


def _samples(timed: Mapping[str, Any]) -> list[float]:
    found = timed.get("samples_ms")
    values = [words.number(value) for value in found] if isinstance(found, list | tuple) else []
    return [value for value in values if value is not None]


def _spread(samples: Sequence[float], limit: int) -> list[float]:
    """At most `limit` samples at evenly spaced ranks: the same distribution, extremes included."""
    if len(samples) <= limit:
        return list(samples)
    ordered = sorted(samples)
    return [ordered[i * (len(ordered) - 1) // (limit - 1)] for i in range(limit)]


def _sentence(compared: Mapping[str, Any]) -> str:
    """What the comparison says in its own words, or else its numbers."""
    said = text(compared.get("words"))
    if said:
        return words.sentence(said)
    ratio, low, high = (words.number(compared.get(key)) for key in ("ratio", "low", "high"))
    if ratio is None:
        return ""
    interval = "" if low is None or high is None else f", interval {words.digits(low)} to {words.digits(high)}"
    return f"Baseline over compressed {words.digits(ratio)}{interval}."
