# SPDX-License-Identifier: Apache-2.0
"""The metric against the share of MACs that is kept, for two sizes of one family each: where the knee is."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.comb.headline import DISTILL
from benchmarks.comb.pages import left, percent, picture, points, put, table
from benchmarks.comb.runs import Setting, command, found
from benchmarks.gradual.plot import BLUE, GREY, ORANGE

KEEPS = (1.0, 0.8, 0.65, 0.5, 0.33, 0.25)
FAMILIES = {"fashion": ("resnet", "resnet small"), "land 5": ("unet", "unet small")}
SETTINGS = [
    Setting(network, keep=keep, distill=DISTILL[task])
    for keep in KEEPS
    for task, family in FAMILIES.items()
    for network in family
]


def write() -> None:
    rows = sorted(found(SETTINGS), key=lambda row: (row["network"], -row["keep"]))
    columns = {
        "network": lambda row: row["network"],
        "MACs left": left("macs"),
        "MACs": lambda row: f"{row['macs'] / 1e6:.2f} M",
        "parameters left": left("parameters"),
        "test, %": percent("test", 2),
        "points against dense [95 %]": points,
    }
    put("curve", table(columns, rows))
    picture("curve", draw)


def draw() -> Figure:
    figure, grid = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for axes, (task, family) in zip(grid, FAMILIES.items(), strict=True):
        for network, colour in zip(family, (BLUE, ORANGE), strict=True):
            rows = sorted(found([s for s in SETTINGS if s.network == network]), key=lambda row: row["macs"])
            x = [100 * row["macs"] / row["dense_macs"] for row in rows]
            change = [row["test_points"] for row in rows]
            reach = [[c["change"] - c["low"] for c in change], [c["high"] - c["change"] for c in change]]
            size = f"{rows[0]['dense_macs'] / 1e6:.1f} M MACs" if rows else ""
            axes.errorbar(
                x, [c["change"] for c in change], reach, fmt="o-", color=colour, capsize=3, label=f"{network}, {size}"
            )
        axes.axhline(0, color=GREY, lw=1)
        axes.invert_xaxis()
        axes.legend(loc="lower left")
        what = "accuracy" if task == "fashion" else "mIoU"
        axes.set(title=f"{what}, points against the dense network", xlabel="MACs left, %")
    return figure


if __name__ == "__main__":
    command("curve", SETTINGS, __doc__)
    write()
