# SPDX-License-Identifier: Apache-2.0
"""Class by class: seven classes of land cover at 20 % sparsity, how much IoU each loses, and how frequent it is."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.comb.data import SEVEN
from benchmarks.comb.pages import picture, put, table
from benchmarks.comb.runs import Setting, command, dense_row, found
from benchmarks.gradual.plot import BLUE, GREEN, GREY, ORANGE

WAYS = ("none", "kl", "cwd", "cirkd")
# What all are held against: the whole network after the same steps, without a teacher.
WHOLE = Setting("unet 7", 1.0, distill="none", of="parameters")
SETTINGS = [WHOLE, *(Setting("unet 7", 0.8, distill=way, of="parameters") for way in WAYS)]


def write() -> None:
    whole, rows = found([WHOLE]), {row["distill"]: row for row in found(SETTINGS[1:])}
    if not whole or not rows:
        return
    pixels = np.array(dense_row("unet 7")["test_pixels"], float)
    lines = [
        {"class": SEVEN[i], "share": pixels[i] / pixels.sum(), "whole": whole[0]["test_ious"][i]}
        | {way: 100 * (row["test_ious"][i] - whole[0]["test_ious"][i]) for way, row in rows.items()}
        for i in np.argsort(-pixels)
    ]
    lines.append(
        {"class": "**all (mIoU)**", "share": 1.0, "whole": whole[0]["test"]}
        | {way: 100 * (row["test"] - whole[0]["test"]) for way, row in rows.items()}
    )
    columns = {
        "class": lambda line: line["class"],
        "pixels": lambda line: f"{100 * line['share']:.1f} %",
        "whole, IoU %": lambda line: f"{100 * line['whole']:.1f}",
    } | {f"{way}, points": lambda line, way=way: f"{line[way]:+.2f}" for way in rows}
    put("classes", table(columns, lines))
    picture("classes", lambda: draw(lines[:-1], [*rows]))


def draw(lines: list[dict[str, float]], ways: list[str]) -> Figure:
    figure, axes = plt.subplots(figsize=(9.5, 3.6))
    x = np.arange(len(lines))
    for i, (way, colour) in enumerate(zip(ways, (GREY, BLUE, ORANGE, GREEN), strict=False)):
        axes.bar(x + 0.2 * (i - 1.5), [line[way] for line in lines], 0.18, color=colour, label=way)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(x, [f"{line['class']}\n{100 * line['share']:.1f} %" for line in lines])
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=len(ways))
    axes.set(title="IoU against the whole network, points; classes from frequent to rare (share of the test pixels)")
    return figure


if __name__ == "__main__":
    command("classes", SETTINGS, __doc__)
    write()
