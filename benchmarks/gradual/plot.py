# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/gradual-pruning.md, each drawn from one file of results and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gradual.packed import formulas

Results = dict[str, Any]

# Okabe and Ito's colours, which differ for every kind of colour vision, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#767676"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "featherweight",
}


def draw(results: dict[str, Results], folder: Path, kind: str = "svg") -> list[Path]:
    """One picture for each result that is there; the same results give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, drawing in PICTURES.items():
        if name in results:
            with mpl.rc_context(STYLE):
                figure = drawing(results[name])
                paths.append(folder / f"gradual-{name}.{kind}")
                figure.savefig(paths[-1], metadata={"Date": None} if kind == "svg" else None)
                plt.close(figure)
    return paths


def _accuracy(results: Results) -> Figure:
    rows = results["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    x = [100 * row["sparsity"] for row in rows]
    left.plot(x, [100 * row["test"] for row in rows], "o-", color=BLUE, label="mean")
    for sparsity, row in zip(x, rows, strict=True):
        left.plot([sparsity] * len(row["tests"]), [100 * t for t in row["tests"]], "_", color=GREY, ms=9)
    left.plot([], [], "_", color=GREY, ms=9, label="one seed")
    left.legend(loc="lower left")
    left.set(title="Test accuracy, %", xlabel="zeros in the pruned layers, %")
    drops = [row["drop"] for row in rows[1:]]
    reach = [[d["points"] - d["low"] for d in drops], [d["high"] - d["points"] for d in drops]]
    right.axhspan(min(0, *(d["low"] for d in drops)) - 0.1, 1, color=GREEN, alpha=0.1, lw=0)
    right.axhline(0, color=GREY, lw=1)
    right.errorbar(x[1:], [d["points"] for d in drops], reach, fmt="o", color=ORANGE, capsize=4)
    right.text(x[1], 1.0, "margin: 1 point", color=GREEN, va="bottom", ha="left")
    right.set(title="Points lost against dense (paired, 95 % interval)", xlabel="zeros in the pruned layers, %")
    for axes in (left, right):
        axes.set_xticks(x, [f"{value:g}" for value in x])
    return figure


def _dip(results: Results) -> Figure:
    *columns, dense = results["runs"]
    figure, grid = plt.subplots(3, len(columns), figsize=(10, 6.4), sharex=True, sharey="row", height_ratios=(1, 1, 2))
    titles = (f"every {run['every']} steps" if run["schedule"] == "cubic" else "all at once" for run in columns)
    for column, run, title in zip(grid.T, columns, titles, strict=True):
        _dip_column(column, run, dense)
        column[0].set_title(title)
    for axes, name in zip(grid[:, 0], ("zeros, %", "learning rate", "validation\naccuracy, %"), strict=True):
        axes.set_ylabel(name)
    grid[2, 0].set_ylim(100 * min(point["after"] for run in columns for point in run["curve"][1:]) - 4)
    figure.legend(*grid[2, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _dip_column(column: Any, run: Results, dense: Results) -> None:
    steps = [point["step"] for point in run["curve"]]
    column[0].step(steps, [100 * point["sparsity"] for point in run["curve"]], where="post", color=GREY)
    column[1].plot(steps, [point["lr"] for point in run["curve"]], color=GREY)
    column[1].set_ylim(bottom=0)
    twice = [(p["step"], value) for p in run["curve"] for value in dict.fromkeys((p["before"], p["after"]))]
    reference = [(p["step"], p["before"]) for p in dense["curve"]]
    column[2].plot(*zip(*reference, strict=True), color=GREEN, lw=1.2, label="never pruned")
    column[2].plot(*zip(*[(s, v) for s, v in twice], strict=True), color=BLUE, label="pruned")
    falls = [point for point in run["curve"] if point["after"] != point["before"]]
    column[2].plot(
        [p["step"] for p in falls], [p["after"] for p in falls], "v", color=ORANGE, label="just after a mask update"
    )
    for line in column[2].lines:
        line.set_ydata([100 * value for value in line.get_ydata()])
    column[2].relim()
    column[2].autoscale()
    column[2].set_xlabel("training step")


def _small(results: Results) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4))
    wide, narrow = [results["dense"], *(row["wide"] for row in results["rows"])], [results["dense"], *results["rows"]]
    _line(axes, wide, "o-", BLUE, "wide, pruned while training", [f"{100 * row['sparsity']:g} %" for row in wide])
    _line(axes, narrow, "s--", ORANGE, "narrow from the start, dense", [f"width {row['width']}" for row in narrow])
    axes.margins(x=0.08, y=0.15)
    axes.set(title="Test accuracy, %", xlabel="parameters that are not zero", xscale="log")
    ticks = [5_000, 10_000, 20_000, 50_000, 100_000]
    axes.set_xticks(ticks, [f"{tick // 1000}k" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right")
    return figure


def _line(axes: Axes, rows: list[Results], style: str, colour: str, label: str, names: list[str]) -> None:
    points = [(row["nonzeros"], 100 * row["test"]) for row in rows]
    axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
    above = style == "o-"
    for point, row, name in zip(points, rows, names, strict=True):
        axes.plot([point[0]] * len(row["tests"]), [100 * t for t in row["tests"]], ".", color=colour, alpha=0.4, ms=5)
        offset, side = ((-4, 9), "right") if above else ((6, -14), "left")
        axes.annotate(name, point, offset, textcoords="offset points", ha=side, color=colour)


def _overhead(results: Results) -> Figure:
    rows = results["rows"][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.5 * len(rows)))
    y, share = range(len(rows)), [100 * row["overhead"] for row in rows]
    reach = [[100 * (r["overhead"] - r["low"]) for r in rows], [100 * (r["high"] - r["overhead"]) for r in rows]]
    colours = [BLUE if row["overhead"] <= 0.05 else ORANGE for row in rows]
    axes.barh(y, share, 0.55, color=colours)
    axes.errorbar(share, y, xerr=reach, fmt="none", color="black", capsize=3, lw=1)
    axes.axvline(5, color=GREEN, lw=1.5, ls="--")
    axes.text(5, len(rows) - 0.45, " at most 5 %", color=GREEN, va="bottom")
    axes.set_yticks(y, [row["name"] for row in rows])
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="what pruning adds to a training step, % (95 % interval)")
    return figure


def _packed(results: Results) -> Figure:
    rows = [row for row in results["rows"] if row["sparsity"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    x = [100 * row["sparsity"] for row in rows]
    left.plot(x, [100 * row["ratio"] for row in rows], "o-", color=BLUE)
    left.plot([90], [100 * results["limit"]], "_", color="black", ms=18, mew=2)
    left.annotate("asked: 12.2 %", (90, 100 * results["limit"]), (-14, -4), textcoords="offset points", ha="right")
    left.set(title="File, % of dense fp32", xlabel="zeros, % of all weights", ylim=(0, 100))
    for name, colour, label in (("bitmask", GREEN, "formula: bitmask"), ("csr", ORANGE, "formula: CSR, best offsets")):
        fine = np.linspace(0.1, 0.99, 200)
        right.plot(100 * fine, [formulas(s)[name] / (1 - s) for s in fine], color=colour, label=label)
    for key, mark, colour, label in (
        ("packed_bytes", "o", BLUE, "the file, header and biases too"),
        ("gzip_bytes", "x", GREY, "gzip -6 of dense fp32"),
    ):
        bits = [32 * row[key] / row["dense_bytes"] / (1 - row["sparsity"]) for row in rows]
        right.plot(x, bits, mark, color=colour, label=label)
    right.set(title="Bits for each weight that is not zero", xlabel="zeros, % of all weights", ylim=(30, 56))
    right.legend(loc="upper left")
    return figure


PICTURES: dict[str, Callable[[Results], Figure]] = {
    "accuracy": _accuracy,
    "dip": _dip,
    "small": _small,
    "overhead": _overhead,
    "packed": _packed,
}
