# SPDX-License-Identifier: Apache-2.0
"""The Pareto front as a picture and a table, from rows of `pareto.jsonl` and `pareto_latency.jsonl` and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import pages
from benchmarks.gradual.plot import BLUE, GREEN, GREY, ORANGE, STYLE
from benchmarks.results import Row

TITLES = {"crepe_tiny": "CREPE tiny", "crepe_full": "CREPE full", "minilm": "MiniLM-L6"}
LINES = {"after training": (BLUE, "o"), "gradual": (GREEN, "s")}
COLUMNS = {"engine": "engine", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "openvino_bf16": "OpenVINO bf16"}
STOCK = {"onnxruntime": (ORANGE, "ONNX Runtime"), "openvino": ("#cc79a7", "OpenVINO")}


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
        figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), squeeze=False)
        for panel, each in zip(panels, axes[0], strict=True):
            _panel(panel, each)
        handles = {
            label: handle for each in axes[0] for handle, label in zip(*each.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)
    return path


def _panel(panel: Panel, axes: Axes) -> None:
    dense = panel.dense["metric"]
    axes.axhline(dense, color=GREY, lw=1, ls=":")
    for method, (colour, marker) in LINES.items():
        found = [(panel.milliseconds.get(("engine", row["file"])), row) for row in panel.of_method("dense", method)]
        points = sorted(((ms, row) for ms, row in found if ms is not None), key=lambda point: point[1]["zeros"])
        if len(points) > 1:
            _points(axes, points, dense, color=colour, fmt=f"{marker}-", ms=5, label=f"engine, {ORDER[method]}")
        for ms, row in points[1:]:
            below = method == "after training"
            axes.annotate(f"{100 * row['zeros']:g}", (ms, row["metric"]), (5, -10) if below else (-14, 4),
                          textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
    for runtime, (colour, title) in STOCK.items():
        for kind, row, style in _stock(panel, runtime):
            ms = panel.milliseconds.get((runtime, row["file"]))
            if ms is not None:
                judged = row.get("runtimes", {}).get(runtime, row)
                _points(axes, [(ms, judged)], dense, color=colour, fmt=style, ms=8, mfc="none" if kind else colour,
                        label=f"{title}{kind or ', dense fp32'}")  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.set(
        title=f"{TITLES.get(panel.name, panel.name)}: {panel.dense['name']}",
        xlabel="milliseconds, batch 1 (beside points: % zeros)",
    )


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
