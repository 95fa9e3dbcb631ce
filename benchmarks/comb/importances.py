# SPDX-License-Identifier: Apache-2.0
"""Importances against each other: which channels go first, at half of the MACs, all else being equal."""

from __future__ import annotations

from benchmarks.comb.headline import DISTILL
from benchmarks.comb.networks import NETWORKS
from benchmarks.comb.pages import left, percent, points, put, table
from benchmarks.comb.runs import Setting, command, found

IMPORTANCES = (
    "cpd",
    "curvature",
    "fisher",
    "taylor",
    "magnitude",
    "batch_norm",
    "activation",
    "geometric_median",
    "random",
)
SUBJECTS = ("resnet small", "unet small")
SETTINGS = [
    Setting(network, 0.5, importance, DISTILL[NETWORKS[network].task])
    for network in SUBJECTS
    for importance in IMPORTANCES
]


def write() -> None:
    rows = sorted(found(SETTINGS), key=lambda row: (row["network"], -row["test"]))
    columns = {
        "network": lambda row: row["network"],
        "importance": lambda row: row["importance"],
        "MACs left": left("macs"),
        "parameters left": left("parameters"),
        "validation, %": percent("validation", 2),
        "test, %": percent("test", 2),
        "points against dense [95 %]": points,
    }
    put("importances", table(columns, rows))


if __name__ == "__main__":
    command("importances", SETTINGS, __doc__)
    write()
