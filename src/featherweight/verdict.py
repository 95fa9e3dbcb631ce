# SPDX-License-Identifier: Apache-2.0
"""One sentence and five numbers: what a run came to. A pure function of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featherweight.measure import Comparison, Scorecard, spoken
from featherweight.report import tables, words

__all__ = ["verdict"]


def verdict(
    before: Scorecard, after: Scorecard, comparisons: Mapping[str, Comparison], higher_is_better: bool = True
) -> dict[str, Any]:
    """The head of the report: `{"sentence": ..., "numbers": [five of label, before, after, change, good]}`."""
    numbers = [
        _metric(before, after, higher_is_better),
        _less("on disk", before.dense_bytes, after.packed_bytes or after.dense_bytes, words.size, "smaller", "larger"),
        _less("non-zero parameters", before.nonzeros, after.nonzeros, words.count, "fewer", "more"),
        _less("MACs, counting zeros", before.macs, after.macs, words.count, "fewer", "more"),
        _latency(before, after, comparisons),
    ]
    kept = [number for number in numbers if number is not None]
    return {"sentence": _sentence(before, after, comparisons), "numbers": kept}


def _sentence(before: Scorecard, after: Scorecard, comparisons: Mapping[str, Comparison]) -> str:
    size = before.dense_bytes / max(1, after.packed_bytes or after.dense_bytes)
    parts = [f"{size:.1f}x smaller on disk" if size >= 1.05 else "No smaller on disk"]
    if before.metric is not None and after.metric is not None:
        n = f" (n = {after.samples})" if after.samples else ""
        parts.append(f"{after.metric_name} {words.metric(before.metric)} → {words.metric(after.metric)}{n}")
    names = {name: spoken(name, after.simulated) for name in comparisons}
    faster = [f"{c.ratio:.2f}x faster in {names[name]}" for name, c in comparisons.items() if c.faster]
    slower = [f"{1 / c.ratio:.2f}x slower in {names[name]}" for name, c in comparisons.items() if c.faster is False]
    same = [names[name] for name, c in comparisons.items() if c.faster is None]
    parts += faster + slower
    if same:
        parts.append(f"no faster beyond noise in {_and(same)}")
    return "; ".join(parts) + "."


def _metric(before: Scorecard, after: Scorecard, higher_is_better: bool) -> dict[str, Any] | None:
    if before.metric is None or after.metric is None:
        return None
    change = after.metric - before.metric
    good = None if change == 0 else (change > 0) == higher_is_better
    label = after.metric_name + (f" (n = {after.samples})" if after.samples else "")
    return _number(label, words.metric(before.metric), words.metric(after.metric), f"{change:+.4g}", good)


def _less(label: str, before: float, after: float, spell: Any, fewer: str, more: str) -> dict[str, Any]:
    if before <= 0 or after <= 0 or abs(before / after - 1) < 0.005:
        return _number(label, spell(before), spell(after), "unchanged" if before == after else "about the same", None)
    if before > after:
        return _number(label, spell(before), spell(after), f"{before / after:.1f}x {fewer}", True)
    return _number(label, spell(before), spell(after), f"{after / before:.1f}x {more}", False)


def _latency(before: Scorecard, after: Scorecard, comparisons: Mapping[str, Comparison]) -> dict[str, Any] | None:
    """The runtime in which the result is fastest: the one that a user would take."""
    if not comparisons:
        return None
    name = min(comparisons, key=lambda runtime: after.latency[runtime].median_ms)
    first, second, comparison = before.latency[name], after.latency[name], comparisons[name]
    change = "within noise"
    if comparison.faster is not None:
        change = f"{comparison.ratio:.2f}x faster" if comparison.faster else f"{1 / comparison.ratio:.2f}x slower"
    label = f"median latency, {tables.spoken(name)}, batch {second.batch}"
    return _number(
        label, words.milliseconds(first.median_ms), words.milliseconds(second.median_ms), change, comparison.faster
    )


def _number(label: str, before: str, after: str, change: str, good: bool | None) -> dict[str, Any]:
    return {"label": label, "before": before, "after": after, "change": change, "good": good}


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
