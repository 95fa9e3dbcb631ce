# SPDX-License-Identifier: Apache-2.0
"""Networks of every kind to half of their MACs, and four of them to a third and a quarter, distilled from what they were.

Half may cost 1 point of accuracy, or 2 of mIoU, at the lower end of the paired 95 % interval on the test split.
"""

from __future__ import annotations

from benchmarks.comb.networks import NETWORKS
from benchmarks.comb.pages import fewer, left, percent, points, put, table
from benchmarks.comb.results import Row
from benchmarks.comb.runs import Setting, beside, between, command, found

MARGIN = {"fashion": 1.0, "land 5": 2.0, "land 7": 2.0}
DISTILL = {"fashion": "kl", "land 5": "cwd", "land 7": "cwd"}
SMALLER = ("resnet", "vit", "vit-long", "unet", "seaformer")
SETTINGS = [
    Setting(network, keep, distill=DISTILL[NETWORKS[network].task])
    for keep, networks in ((0.5, (*SMALLER, "resnext", "mobilenet")), (0.33, SMALLER), (0.25, SMALLER))
    for network in networks
]
# Pruned networks take some more training than the dense ones had: these take it too, and stay whole.
SETTINGS += [Setting(network, 1.0, distill=DISTILL[NETWORKS[network].task]) for network in SMALLER]


def within(row: Row) -> bool:
    """Whether even the lower end of the interval is within the margin."""
    return bool(row["test_points"]["low"] >= -MARGIN[NETWORKS[row["network"]].task])


def lost(row: Row) -> str:
    """The paired difference from the dense network that was trained on for as many steps, by the same teacher."""
    trained_on = beside(row, keep=1.0)
    return between(row, trained_on[0]) if trained_on else "–"


def write() -> None:
    rows = sorted(
        found([s for s in SETTINGS if s.keep < 1]), key=lambda row: ([*NETWORKS].index(row["network"]), -row["keep"])
    )
    columns = {
        "network": lambda row: row["network"],
        "metric": lambda row: "accuracy" if NETWORKS[row["network"]].task == "fashion" else "mIoU",
        "MACs left": left("macs"),
        "fewer": fewer,
        "parameters left": left("parameters"),
        "dense": percent("dense_test", 2),
        "pruned": percent("test", 2),
        "points [95 %]": points,
        "against dense trained on [95 %]": lost,
        "within the margin": lambda row: "yes" if within(row) else "no",
    }
    put("headline", table(columns, rows))


if __name__ == "__main__":
    command("headline", SETTINGS, __doc__)
    write()
