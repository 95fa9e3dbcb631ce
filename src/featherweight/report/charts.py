# SPDX-License-Identifier: Apache-2.0
"""Small pictures as inline SVG: curves, strips of samples, bars and a scatter.

Hand-made, for three things that a plotting library's SVG cannot do here. Colours are CSS classes, so pictures follow
the reader's light or dark theme. Geometry stretches (a nested viewBox without aspect ratio, strokes that do not scale)
while text is placed in per cent of the plot: one picture is crisp at 390 and at 1440 px, with type of one size. And a
picture costs a few kB: long series are thinned so that every bucket keeps its lowest and highest point, and no dip is
lost. The price: these charts do what the report needs and nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Panel", "axis_for", "bar", "columns", "curve", "scale", "scatter", "strip", "thin"]

Point = tuple[float, float | None]  # None: a value that is not a number, drawn as a gap

WIDTH, HEIGHT = 1000, 100  # the nested viewBox; what is drawn in it is stretched to the room there is


@dataclass(frozen=True)
class Axis:
    """A range of values and its ticks; `at` gives the place of a value in it, 0 to 1."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            value, low, high = math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return (min(max(value, min(low, high)), max(low, high)) - low) / (high - low)


def axis_for(values: Sequence[float], ticks: int = 4, log: bool = False, tight: bool = False) -> Axis:
    """An axis that holds all finite values: ends on round numbers, or exactly at the extremes when `tight`.

    >>> axis_for([0.0, 2500.0], ticks=5, tight=True).ticks
    (0.0, 500.0, 1000.0, 1500.0, 2000.0, 2500.0)
    >>> axis_for([0.02, 2.3], log=True).ticks
    (0.01, 0.1, 1.0, 10.0)
    """
    # Beyond 1e100 floats have no room left for ends, steps and ticks.
    low, high = (min(max(end, -1e100), 1e100) for end in (min(values, default=0.0), max(values, default=1.0)))
    if log and low > 1e-100:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        decades = range(first, max(last, first + 1) + 1, max(1, (last - first) // 4))
        return Axis(10.0 ** decades[0], 10.0 ** max(last, decades[-1]), tuple(10.0**i for i in decades), log=True)
    if not high - low > max(1e-12 * max(abs(low), abs(high)), 1e-100):
        pad = abs(high) * 0.1 if abs(high) > 1e-90 else 1.0
        low, high = low - pad, high + pad
    step = _round_step((high - low) / max(ticks, 1))
    first, last = math.floor(low / step), math.ceil(high / step)
    marks = [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]
    if tight:
        slack = 1e-9 * (high - low)
        return Axis(low, high, tuple(mark for mark in marks if low - slack <= mark <= high + slack))
    return Axis(marks[0], marks[-1], tuple(marks))


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((step * power for step in (1.0, 2.0, 5.0) if rough <= step * power * 1.0001), 10.0 * power)


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` points: of each bucket its lowest, its highest and one gap, in order."""
    if len(points) <= limit:
        return list(points)
    buckets = max(1, limit // 2)
    kept = {0, len(points) - 1}
    for i in range(buckets):
        inside = range(i * len(points) // buckets, (i + 1) * len(points) // buckets)
        known = [j for j in inside if points[j][1] is not None]
        if known:
            kept |= {min(known, key=lambda j: points[j][1] or 0.0), max(known, key=lambda j: points[j][1] or 0.0)}
        gap = next((j for j in inside if points[j][1] is None), None)
        if gap is not None:
            kept.add(gap)
    return [points[j] for j in sorted(kept)]


@dataclass(frozen=True)
class Panel:
    """One curve: its points, its axis, and how it is drawn."""

    label: str
    points: Sequence[Point]
    y: Axis
    text: Callable[[float], str]
    kind: str = "line"
    step: bool = False
    fill: bool = False
    dots: bool = False
    height: int = 120
    mark: tuple[float, float] | None = None


def curve(panel: Panel, x: Axis, rules: Sequence[float] = (), borders: Sequence[float] = ()) -> str:
    """A curve against training step. `rules` are mask updates, `borders` are where one stage ends and the next begins.

    The last value stands at the right end; `mark` rings one point, which the caller names in words.
    """
    shape = [f'<path class="grid" d="{"".join(_across(panel.y, tick) for tick in panel.y.ticks)}"/>']
    if rules:
        shape.append(f'<path class="update" d="{"".join(_down(x, step) for step in rules)}"/>')
    if borders:
        shape.append(f'<path class="border" d="{"".join(_down(x, step) for step in borders)}"/>')
    runs = [[(_x(x, step), _y(panel.y, value)) for step, value in run] for run in _runs(panel.points)]
    for run in runs:
        path = _path(run, panel.step)
        if panel.fill:
            shape.append(f'<path class="area {panel.kind}" d="{path}V{HEIGHT}H{_n(run[0][0])}Z"/>')
        shape.append(f'<path class="curve {panel.kind}" d="{path if len(run) > 1 else path + "h0"}"/>')
    if panel.dots:
        dots = "".join(f"M{_n(a)} {_n(b)}h0" for run in runs for a, b in run)
        shape.append(f'<path class="dots {panel.kind}" d="{dots}"/>')
    if panel.mark is not None:
        at = f"M{_n(_x(x, panel.mark[0]))} {_n(_y(panel.y, panel.mark[1]))}h0"
        shape.append(f'<path class="halo {panel.kind}" d="{at}"/><path class="ring" d="{at}"/>')
    words = [_tick_text(panel.y, tick, panel.text) for tick in panel.y.ticks]
    if runs:
        last = next(value for _, value in reversed(panel.points) if value is not None)
        words.append(
            f'<text class="last {panel.kind}" x="{runs[-1][-1][0] / WIDTH:.2%}" y="{1 - panel.y.at(last):.2%}" '
            f'dx="7" dy="4">{escape(panel.text(last))}</text>'
        )
    return _picture(panel.label, panel.height, shape, words)


def scale(axis: Axis, text: Callable[[float], str]) -> str:
    """The tick labels of a horizontal axis, to stand below pictures of the same width."""
    words = []
    for i, tick in enumerate(axis.ticks):
        place = axis.at(tick)
        anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
        spare = ' class="spare"' if i % 2 else ""  # left out where room is short
        words.append(f'<text{spare} x="{place:.2%}" y="14" text-anchor="{anchor}">{escape(text(tick))}</text>')
    return f'<svg class="scale" width="100%" height="20" aria-hidden="true">{"".join(words)}</svg>'


def strip(samples: Sequence[float], axis: Axis, label: str, kind: str, median: float | None, p90: float | None) -> str:
    """Samples as dots spread over a strip, with a box over the middle half, the median as a bar and p90 as a tick.

    A sample beyond the axis sits at its end.
    """
    shape = [f'<path class="grid" d="{"".join(_down(axis, tick) for tick in axis.ticks)}"/>']
    if len(samples) >= 4:
        ordered = sorted(samples)
        low, high = (_x(axis, ordered[round(q * (len(ordered) - 1))]) for q in (0.25, 0.75))
        shape.append(
            f'<rect class="box {kind}" x="{_n(low)}" y="18" width="{_n(max(high - low, 1.0))}" height="64" rx="1"/>'
        )
    # The golden ratio spreads consecutive samples evenly over the height, the same way each time.
    dots = "".join(f"M{_n(_x(axis, value))} {12 + 76 * (i * 0.618034 % 1):.0f}h0" for i, value in enumerate(samples))
    if dots:
        shape.append(f'<path class="sample {kind}" d="{dots}"/>')
    if p90 is not None:
        shape.append(f'<path class="p90 {kind}" d="M{_n(_x(axis, p90))} 6V94"/>')
    if median is not None:
        shape.append(f'<path class="median {kind}" d="M{_n(_x(axis, median))} 0V100"/>')
    return _picture(label, 44, shape, [])


def bar(share: float, kind: str) -> str:
    """A horizontal bar that fills this share of its room. It says nothing to a screen reader: the number stands by."""
    share = min(max(share, 0.0), 1.0)
    return (
        f'<svg class="bar" width="100%" height="14" aria-hidden="true"><rect class="trough" width="100%" height="14"/>'
        f'<rect class="{kind}" width="{max(share * 100, 0.3):.2f}%" height="14"/></svg>'
    )


def columns(
    label: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    wide: float,
    y: Axis,
    text: Callable[[float], str],
) -> str:
    """Columns from the ground up, `wide` of the picture's width each: (kind, points) of several, one over the other.

    A point's first number is the place of its middle, 0 to `WIDTH`. A column of 0 is not drawn.
    """
    shape = [f'<path class="grid" d="{"".join(_across(y, tick) for tick in y.ticks)}"/>']
    for kind, points in series:
        drawn = (
            f"M{_n(place - wide / 2)} {HEIGHT}V{_n(_y(y, value))}h{_n(wide)}V{HEIGHT}Z"
            for place, value in points
            if value
        )
        shape.append(f'<path class="{kind}" d="{"".join(drawn)}"/>')
    return _picture(label, 150, shape, [_tick_text(y, tick, text) for tick in y.ticks])


def scatter(points: Sequence[tuple[float, float, str, str]], x: Axis, y: Axis, text: Callable[[float], str]) -> str:
    """Points (x, y, name, kind) with their names beside them."""
    shape = [
        f'<path class="grid" d="{"".join(_across(y, tick) for tick in y.ticks)}'
        f'{"".join(_down(x, tick) for tick in x.ticks)}"/>'
    ]
    words = [_tick_text(y, tick, text) for tick in y.ticks]
    for a, b, name, kind in points:
        shape.append(f'<path class="spot {kind}" d="M{_n(_x(x, a))} {_n(_y(y, b))}h0"/>')
        right = x.at(a) > 0.6
        words.append(
            f'<text class="name" x="{x.at(a):.2%}" y="{1 - y.at(b):.2%}" dx="{-9 if right else 9}" dy="4" '
            f'text-anchor="{"end" if right else "start"}">{escape(name)}</text>'
        )
    label = "; ".join(f"{name}: {text(b)}" for _, b, name, _ in points)
    return _picture(label, 260, shape, words)


def _picture(label: str, height: int, shape: Sequence[str], words: Sequence[str]) -> str:
    return (
        f'<svg class="plot" width="100%" height="{height}" role="img" aria-label="{escape(label)}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" height="100%" preserveAspectRatio="none" '
        f'overflow="visible">{"".join(shape)}</svg>{"".join(words)}</svg>'
    )


def _x(axis: Axis, value: float) -> float:
    return axis.at(value) * WIDTH


def _y(axis: Axis, value: float) -> float:
    return (1 - axis.at(value)) * HEIGHT


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _across(axis: Axis, value: float) -> str:
    return f"M0 {_n(_y(axis, value))}H{WIDTH}"


def _down(axis: Axis, value: float) -> str:
    return f"M{_n(_x(axis, value))} 0V{HEIGHT}"


def _tick_text(axis: Axis, tick: float, text: Callable[[float], str]) -> str:
    return f'<text x="0" y="{1 - axis.at(tick):.2%}" dx="-8" dy="4" text-anchor="end">{escape(text(tick))}</text>'


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The points cut at gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _path(run: Sequence[tuple[float, float]], step: bool) -> str:
    parts = [f"M{_n(run[0][0])} {_n(run[0][1])}"]
    for a, b in run[1:]:
        parts.append(f"H{_n(a)}V{_n(b)}" if step else f"L{_n(a)} {_n(b)}")
    return "".join(parts)
