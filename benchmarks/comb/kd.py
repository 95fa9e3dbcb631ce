# SPDX-License-Identifier: Apache-2.0
"""Ways to distill against each other and against none, at a third of the MACs and the same steps; and whose teaching helps."""

from __future__ import annotations

from benchmarks.comb.pages import left, percent, points, put, table
from benchmarks.comb.results import Row
from benchmarks.comb.runs import SELF, Setting, beside, between, command, found

KEEP = 0.33
WAYS = {"resnet small": ("none", "kl", "features"), "unet small": ("none", "kl", "cwd", "cirkd")}
SIBLINGS = {"resnet small": ("resnet", "kl"), "unet small": ("unet", "cwd")}
SETTINGS = [
    *(Setting(network, KEEP, distill=way) for network, ways in WAYS.items() for way in ways),
    *(Setting(network, KEEP, distill=way, teacher=teacher) for network, (teacher, way) in SIBLINGS.items()),
]


def gained(row: Row) -> str:
    """The paired difference from the same run without a teacher."""
    alone = [] if row["distill"] == "none" else beside(row, distill="none", teacher=SELF)
    return between(row, alone[0]) if alone else "–"


def write() -> None:
    columns = {
        "network": lambda row: row["network"],
        "distillation": lambda row: row["distill"],
        "teacher": lambda row: (
            "–" if row["distill"] == "none" else "itself, unpruned" if row["teacher"] == SELF else row["teacher"]
        ),
        "MACs left": left("macs"),
        "validation, %": percent("validation", 2),
        "test, %": percent("test", 2),
        "points against dense [95 %]": points,
        "points against no teacher [95 %]": gained,
    }
    rows = sorted(found(SETTINGS), key=lambda row: row["network"])
    put("kd", table(columns, rows))


if __name__ == "__main__":
    command("kd", SETTINGS, __doc__)
    write()
