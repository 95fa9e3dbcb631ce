# SPDX-License-Identifier: Apache-2.0
"""The Pareto front as a picture and a table, from rows of `pareto.jsonl` and `pareto_latency.jsonl` and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import pages
from benchmarks.gradual.plot import BLUE, GREEN, GREY, ORANGE, STYLE
from benchmarks.results import Row

TITLES = {"crepe_tiny": "CREPE tiny", "crepe_full": "CREPE full", "minilm": "MiniLM-L6"}
LINES = {"after training": (BLUE, "o"), "gradual": (GREEN, "s")}
COLUMNS = {"engine": "engine", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "openvino_bf16": "OpenVINO bf16"}
# Nobody would use what has lost more: a line may leave the picture, and goes on in the table.
FLOOR = 0.68  # of the dense network's metric
STOCK = {"onnxruntime": (ORANGE, "ONNX Runtime"), "openvino": ("#cc79a7", "OpenVINO")}
# Half of what a text beside a point takes, all of it, and where its middle may lie, near places first; in points.
HALF = np.array([15.0, 7.0])
WHOLE = HALF * [(x, y) for x in np.linspace(-1, 1, 9) for y in np.linspace(-1, 1, 5)]
PLACES = [(HALF + far) * (np.cos(turn), np.sin(turn)) for far in (5, 12, 20, 30) for turn in np.arange(16) * np.pi / 8]


@dataclass(frozen=True)
class Panel:
    """A subject's rows, and milliseconds by (runtime, file)."""

    name: str
    rows: list[Row]
    milliseconds: dict[tuple[str, str], float]

    @classmethod
    def of(cls, name: str, rows: Sequence[Row], latency: Sequence[Row]) -> Panel | None:
        """The last measurement counts; None before there is one."""
        timed = [row for row in latency if row["subject"] == name]
        own = {row["file"]: row for row in rows if row["subject"] == name}
        if not timed or not own:
            return None
        found = {(way["runtime"], way["file"]): way["median_ms"] for way in timed[-1]["ways"] if "median_ms" in way}
        return cls(name, sorted(own.values(), key=lambda row: (row["method"], row["zeros"])), found)

    def of_method(self, *methods: str) -> list[Row]:
        return [row for row in self.rows if row["method"] in methods]

    def in_engine(self, *methods: str) -> list[tuple[float, Row]]:
        """Milliseconds in the engine and the row of each file that was timed there, from few zeros to many."""
        rows = sorted(self.of_method(*methods), key=lambda row: row["zeros"])
        return [
            (self.milliseconds["engine", row["file"]], row)
            for row in rows
            if ("engine", row["file"]) in self.milliseconds
        ]

    @property
    def dense(self) -> Row:
        [row] = self.of_method("dense")
        return row

    @property
    def fastest(self) -> float:
        """Of the stock runtimes on the dense network in float32."""
        return min(
            ms for (runtime, name), ms in self.milliseconds.items() if (runtime in STOCK and name == self.dense["file"])
        )


def draw(panels: Sequence[Panel], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(max(8, 4.8 * len(panels)), 4.8), squeeze=False)
        for panel, each in zip(panels, axes[0], strict=True):
            _panel(panel, each)
        _legend(figure)
        figure.draw_without_rendering()  # only then it is known where everything lies
        for panel, each in zip(panels, axes[0], strict=True):
            _name_points(panel, each)
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return path


def _panel(panel: Panel, axes: Axes) -> None:
    dense = panel.dense["metric"]
    axes.axhline(dense, color=GREY, lw=1, ls=":", label="the dense network's metric")
    for method, (colour, marker) in LINES.items():
        points = panel.in_engine("dense", method)
        if len(points) > 1:
            _points(axes, points, dense, color=colour, fmt=f"{marker}-", ms=5, label=f"engine, {ORDER[method]}")
    for runtime, (colour, title) in STOCK.items():
        for kind, row, style in _stock(panel, runtime):
            ms = panel.milliseconds.get((runtime, row["file"]))
            if ms is not None:
                judged = row.get("runtimes", {}).get(runtime, row)
                _points(axes, [(ms, judged)], dense, color=colour, fmt=style, ms=8, mfc="none" if kind else colour,
                        label=f"{title}{kind or ', dense fp32'}")  # fmt: skip
    axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR * dense))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set(
        title=TITLES.get(panel.name, panel.name),
        xlabel="milliseconds a call, batch 1",
        ylabel=f"{panel.dense['name']}, with 95 % intervals",
    )


def _legend(figure: Figure) -> None:
    """A column for the engine and for each stock runtime, of one length: matplotlib fills one after the other."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    stock = tuple(title for _, title in STOCK.values())
    columns = [[label for label in handles if label.startswith(title)] for title in stock]
    columns = [[label for label in handles if not label.startswith(stock)], *columns]
    length = max(map(len, columns))
    labels = [label for column in columns for label in column + [""] * (length - len(column))]
    shown = [handles.get(label) or plt.Line2D([], [], alpha=0) for label in labels]
    figure.legend(shown, labels, loc="outside lower center", ncols=len(columns), fontsize=9)


def _name_points(panel: Panel, axes: Axes) -> None:
    """Beside each point of the engine its share of zeros, where it hides least of what is drawn; a line leads there."""
    point = 72 / axes.figure.dpi  # of a pixel: texts have their sizes in points, and so has all here
    paths = [(line.get_transform(), line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"]
    paths += [(bars.get_transform(), bar) for bars in axes.collections for bar in bars.get_segments()]
    drawn = np.concatenate([_along(transform.transform(path) * point) for transform, path in paths if len(path)])
    low, high = axes.get_window_extent().get_points() * point
    for method, colour in (("dense", GREY), *((method, colour) for method, (colour, _) in LINES.items())):
        for ms, row in panel.in_engine(method):
            where = axes.transData.transform((ms, row["metric"])) * point
            if where[1] < low[1]:
                continue
            inside = [place for place in PLACES if ((low < where + place - HALF) & (where + place + HALF < high)).all()]
            place = min(inside, key=lambda place: (np.abs(drawn - where - place) < HALF).all(1).sum())
            drawn = np.concatenate([drawn, _along(np.array([where, where + place])), where + place + WHOLE])
            axes.annotate(
                f"{100 * row['zeros']:g} %" if row["zeros"] else "dense", (ms, row["metric"]), place,
                textcoords="offset points", ha="center", va="center", fontsize=8, color=colour,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip


def _along(path: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A path's corners, and places between them about a point apart."""
    pieces = [np.linspace(a, b, 2 + int(np.abs(b - a).max())) for a, b in itertools.pairwise(path)]
    return np.concatenate([path, *pieces])


def _stock(panel: Panel, runtime: str) -> list[tuple[str, Row, str]]:
    """What a stock runtime was timed on: the dense network, the integers, and one with zeros in float32."""
    return [
        ("", panel.dense, "D"),
        *((", int8", row, "^") for row in panel.of_method("int8")),
        *((f", fp32 with {100 * row['zeros']:g} % zeros", row, "D") for row in panel.of_method("after training")),
    ]


def _points(axes: Axes, points: Sequence[tuple[float, Row]], dense: float, **style: Any) -> None:
    """With the interval of the paired difference from the dense network, which is known best of all."""
    y = [row["metric"] for _, row in points]
    reach = [
        [max(0.0, value - dense - row["low"]) for value, (_, row) in zip(y, points, strict=True)],
        [max(0.0, dense + row["high"] - value) for value, (_, row) in zip(y, points, strict=True)],
    ]
    axes.errorbar([ms for ms, _ in points], y, reach, capsize=2, elinewidth=0.8, **style)


def table(panels: Sequence[Panel]) -> str:
    """A line a file: the metric, the milliseconds, and how much faster than the fastest stock runtime in dense float32."""
    head = ["network", "", "zeros", "metric", "difference [95 %]", *(f"{title}, ms" for title in COLUMNS.values())]
    head += ["over the fastest dense float32", "minutes to make"]
    rows = []
    for panel in panels:
        for row in sorted(panel.rows, key=lambda row: ([*ORDER].index(row["method"]), row["zeros"])):
            ms = {runtime: panel.milliseconds.get((runtime, row["file"])) for runtime in COLUMNS}
            judged = row.get("runtimes", {}).get("onnxruntime", row)
            interval = f"{judged['change']:+.3f} [{judged['low']:+.3f}, {judged['high']:+.3f}]"
            cells = [
                TITLES.get(panel.name, panel.name),
                ORDER[row["method"]],
                f"{100 * row['zeros']:g} %",
                f"{judged['name']} {judged['metric']:.3f}",
                "" if row["method"] == "dense" else interval,
                *("" if each is None else f"{each:.2f}" for each in ms.values()),
                f"{panel.fastest / ms['engine']:.2f}x" if ms["engine"] else "",
                f"{row['processor_seconds'] / 60:.1f}" if "processor_seconds" in row else "",
            ]
            rows.append(cells)
    return pages.table(head, rows)


ORDER = {
    "dense": "dense, fp32",
    "int8": "dense, int8",
    "after training": "pruned after training",
    "gradual": "pruned gradually",
}
