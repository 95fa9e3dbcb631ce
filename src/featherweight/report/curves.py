# SPDX-License-Identifier: Apache-2.0
"""The papers' figures: sparsity, metric, loss and learning rate against training step, on one axis of steps.

Stages follow one another; each keeps its own step numbers in `history`, so a stage that starts over is set behind the
one before. What matters in gradual pruning is what happens at a mask update, so updates are ruled through all panels
and the deepest dip at one is ringed and named.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from featherweight.report import charts, tables, words

__all__ = ["Curves", "curves"]

# What stands beside the plot has room for fewer digits than the sentence above it.
_LABELS: dict[str, Callable[[float], str]] = {
    "sparsity": lambda value: f"{value * 100:.0f} %",
    "metric": words.figure,
    "loss": lambda value: f"{value:.3g}",
    "distill_loss": lambda value: f"{value:.3g}",
    "lr": lambda value: f"{value:.3g}",
}
MOST_RULES = 80  # more rules than this are a grey wall
KEYS = ("sparsity", "metric", "loss", "distill_loss", "lr")


@dataclass(frozen=True)
class Curves:
    """Panels ready to place: (title, sentence, SVG) each, the axis of steps as SVG, and the names of the stages."""

    panels: tuple[tuple[str, str, str], ...]
    scale: str
    stages: tuple[str, ...]
    updates: int
    ruled: bool
    thinned: bool


@dataclass(frozen=True)
class _Series:
    points: dict[str, list[charts.Point]]
    lost: dict[str, int]  # values that are not numbers
    updates: list[float]
    borders: list[float]
    stages: list[str]
    higher_is_better: bool | None  # None: the report does not say


def curves(report: Mapping[str, Any], limit: int) -> Curves | None:
    """The curves of a report, each of at most about `limit` points, or None where no stage has a history."""
    series = _series(report)
    steps = [step for points in series.points.values() for step, _ in points]
    if not steps:
        return None
    # Histories start at the first step that was logged; the axis starts at zero where that is near.
    start = 0.0 if 0 < min(steps) < 0.1 * max(steps) else min(steps)
    x = charts.axis_for([start, *steps], ticks=5, tight=True)
    rules = series.updates if len(series.updates) <= MOST_RULES else []
    panels = []
    for key in KEYS:
        known = [value for _, value in series.points[key] if value is not None]
        if known:
            panels.append(_panel(key, series, known, tables.metric_name(report), x, rules, limit))
    if not panels:
        return None
    return Curves(
        tuple(panels),
        charts.scale(x, words.count),
        tuple(series.stages),
        len(series.updates),
        bool(rules),
        any(len(points) > limit for points in series.points.values()),
    )


def _series(report: Mapping[str, Any]) -> _Series:
    better = report.get("higher_is_better")
    found = _Series(
        {key: [] for key in KEYS}, dict.fromkeys(KEYS, 0), [], [], [], better if isinstance(better, bool) else None
    )
    end: float | None = None
    for stage in tables.items(report, "stages"):
        rows = [row for row in tables.items(stage, "history") if words.number(row.get("step")) is not None]
        if not rows:
            continue
        rows.sort(key=lambda row: words.number(row["step"]) or 0.0)
        first = words.number(rows[0]["step"]) or 0.0
        offset = 0.0 if end is None or first > end else end
        if end is not None:
            found.borders.append(end)
            for key in KEYS:  # a stage may start from other weights than the last one ended with: no line between them
                found.points[key].append((end, None))
        found.stages.append(tables.text(stage.get("name")) or f"stage {len(found.stages) + 1}")
        sparsity: float | None = None
        for row in rows:
            end = offset + (words.number(row["step"]) or 0.0)
            now = words.number(row.get("sparsity"))
            if now is not None:
                if sparsity is not None and now != sparsity:
                    found.updates.append(end)
                sparsity = now
            for key in KEYS:
                if row.get(key) is not None:
                    value = words.number(row[key])
                    found.points[key].append((end, value))
                    found.lost[key] += value is None
    return found


def _panel(
    key: str, series: _Series, known: Sequence[float], metric: str, x: charts.Axis, rules: Sequence[float], limit: int
) -> tuple[str, str, str]:
    points = charts.thin(series.points[key], limit)
    title = {"metric": metric, "lr": "learning rate", "distill_loss": "distillation loss"}.get(key, key)
    first, last = known[0], known[-1]
    say = {"sparsity": words.percent, "metric": words.metric}.get(key, words.figure)
    sentence = f"from {say(first)} to {say(last)}"
    if series.lost[key]:
        n = series.lost[key]
        sentence += "; 1 value is not a number" if n == 1 else f"; {n:,} values are not numbers"
    mark = None
    if key == "sparsity":
        y = charts.Axis(0.0, 1.0, (0.0, 0.5, 1.0))
    elif key in ("loss", "distill_loss"):
        y = charts.axis_for(known, ticks=3, log=min(known) > 0 and max(known) > 20 * min(known))
        sentence += "; logarithmic" if y.log else ""
    else:
        y = charts.axis_for([*known, 0.0] if key == "lr" else known, ticks=2 if key == "lr" else 4)
    if key == "metric":
        found = _dip(series.points[key], series.updates, series.higher_is_better)
        if found is not None:
            mark, before = found
            sentence += (
                f"; deepest dip at a mask update: {say(before)} to {say(mark[1])} at step {words.count(mark[0])}"
            )
    panel = charts.Panel(
        label=f"{title} against training step, {sentence}",
        points=points,
        y=y,
        text=_LABELS[key],
        kind="loss" if key == "distill_loss" else key,
        step=key in ("sparsity", "lr"),
        fill=key == "sparsity",
        dots=key == "metric" and len(points) <= 80,
        height=150 if key == "metric" else 90,
        mark=mark,
    )
    return title, sentence, charts.curve(panel, x, rules, series.borders)


def _dip(
    points: Sequence[charts.Point], updates: Sequence[float], higher_is_better: bool | None = None
) -> tuple[tuple[float, float], float] | None:
    """The point after the largest worsening between two readings with a mask update in between, and the value before.

    Where the report does not say which way is better, bad readings are taken to be the rare and far ones: the side of
    the median with the longer tail is the bad one. Jumps under 5 % of the range are noise, not dips.
    """
    known = [(step, value) for step, value in points if value is not None]
    if len(known) < 3 or not updates:
        return None
    values = [value for _, value in known]
    middle, low, high = statistics.median(values), min(values), max(values)
    if higher_is_better is None:
        higher_is_better = middle - low >= high - middle
    sign = 1.0 if higher_is_better else -1.0
    best: tuple[float, tuple[float, float], float] | None = None
    for (start, old), (end, new) in pairwise(known):
        # A reading at the step of an update was taken after it, unless the one before is of the same step.
        crossed = bisect_right(updates, end) > (bisect_left if start == end else bisect_right)(updates, start)
        drop = sign * (old - new)
        if crossed and drop > 0.05 * (high - low) and (best is None or drop > best[0]):
            best = drop, (end, new), old
    return None if best is None else (best[1], best[2])
