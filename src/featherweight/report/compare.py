# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side, as a page and as Markdown: one column a run, and the metric against the packed size.

Each report keeps the baseline that it was measured against; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featherweight.report import charts, words
from featherweight.report.page import fitted
from featherweight.report.tables import MEASURES, Table, median, metric_name, part, runtimes, spoken, strings, text

__all__ = ["compare_reports", "comparison"]

Row = Mapping[str, Any]


def compare_reports(reports: Sequence[Row]) -> str:
    """Several runs side by side as one HTML page: a table with a column a run, and the metric against packed size.

    Nothing is measured here: timings that were taken on different machines stand side by side without being
    comparable, and the page says so. Under 500 kB; of very many runs the first ones are shown.

    Raises `MissingExtra` where jinja2 is not installed.

    >>> page = compare_reports([{"title": "at 75 %"}, {"title": "at 90 %"}])
    >>> "at 75 %" in page and "at 90 %" in page
    True
    """
    return fitted(
        "compare.html", lambda limits: _view([limits.shorten(run) for run in reports[: limits.entries]], len(reports))
    )


def run_name(index: int, report: Row) -> str:
    """The name of a run among several: its number keeps two of one title apart."""
    return f"{index} {text(report.get('title')) or 'untitled'}"


def comparison(reports: Sequence[Row]) -> Table:
    """Several runs side by side: a row for each thing measured, a column for each run."""
    names = list(dict.fromkeys(name for report in reports for name in runtimes(report)))
    rows: list[list[str]] = [["created", *(text(report.get("created"))[:16].replace("T", " ") for report in reports)]]
    metrics = list(dict.fromkeys(metric_name(report) for report in reports if _after(report, "metric") is not None))
    for metric in metrics:
        mine = [report if metric_name(report) == metric else {} for report in reports]
        rows.append([metric, *(_pair(report, "metric", words.metric) for report in mine)])
    rows.append(["test examples", *(words.count(_after(report, "samples")) for report in reports)])
    rows.append(["zeros", *(words.percent(_zeros(part(report, "after"))) for report in reports)])
    for label, key, say in MEASURES:
        rows.append([label, *(_pair(report, key, say) for report in reports)])
    for name in names:
        rows.append([f"median, {spoken(name)}", *(_timing(report, name) for report in reports)])
        rows.append([f"faster in {spoken(name)}?", *(_faster(report, name) for report in reports)])
    rows.append(["parity", *(_parity_word(report) for report in reports)])
    rows.append(["warnings", *(str(len(strings(report, "warnings"))) for report in reports)])
    full = [row for row in rows if any(cell not in ("", words.MISSING) for cell in row[1:])]
    head = ("", *(run_name(i, report) for i, report in enumerate(reports, 1)))
    return Table(head, tuple(tuple(row) for row in full))


def _spots(reports: Sequence[Row]) -> list[tuple[float, float, str, str]]:
    """(packed bytes, metric, name, kind) of each run, and of each different baseline, for a scatter."""
    found: dict[tuple[float, float, str], str] = {}
    for index, report in enumerate(reports, 1):
        for when, name in (("before", "baseline"), ("after", run_name(index, report))):
            card = part(report, when)
            bytes_, metric = words.number(card.get("packed_bytes")), words.number(card.get("metric"))
            if bytes_ is not None and metric is not None:
                found[bytes_, metric, name] = when
    return [(a, b, name if len(name) < 30 else f"{name[:28]}…", when) for (a, b, name), when in found.items()]


def _pair(report: Row, key: str, say: Callable[[Any], str]) -> str:
    before, after = part(report, "before").get(key), part(report, "after").get(key)
    if before is None or say(before) == say(after):
        return say(after)
    return f"{say(before)} → {say(after)}"


def _zeros(card: Row) -> float | None:
    return words.zeros(card.get("nonzeros"), card.get("parameters"))


def _after(report: Row, key: str) -> Any:
    return part(report, "after").get(key)


def _timing(report: Row, runtime: str) -> str:
    before, after = (median(part(report, when), runtime) for when in ("before", "after"))
    return after if before == words.MISSING else f"{before} → {after}"


def _faster(report: Row, runtime: str) -> str:
    compared = part(report, "comparisons", runtime)
    if not compared:
        return ""
    faster = compared.get("faster")
    return "faster" if faster is True else "slower" if faster is False else "no claim"


def _parity_word(report: Row) -> str:
    passed = part(report, "export", "parity").get("passed")
    return "passed" if passed is True else "FAILED" if passed is False else ""


def _view(reports: Sequence[Row], total: int) -> dict[str, Any]:
    spots = _spots(reports)
    picture = scale = ""
    if len(spots) > 1:
        x = charts.axis_for([0.0, *(spot[0] for spot in spots)], ticks=5)
        y = charts.axis_for([spot[1] for spot in spots], ticks=4)
        picture, scale = charts.scatter(spots, x, y, words.figure), charts.scale(x, words.size)
    return {
        "table": comparison(reports),
        "picture": picture,
        "scale": scale,
        "metric": next((metric_name(report) for report in reports), "metric"),
        "verdicts": [
            (run_name(i, report), text(part(report, "verdict").get("sentence"))) for i, report in enumerate(reports, 1)
        ],
        "left_out": total - len(reports),
        "total": total,
    }
