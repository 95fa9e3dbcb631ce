# SPDX-License-Identifier: Apache-2.0
"""Ways to distill against each other and against none, at a third of the MACs and the same steps; and whose teaching helps."""

from __future__ import annotations

from benchmarks.comb.networks import NETWORKS
from benchmarks.comb.pages import left, percent, points, put, table
from benchmarks.comb.results import Row
from benchmarks.comb.runs import SELF, Setting, command, found
from benchmarks.comb.tasks import paired, unpacked, work

KEEP = 0.33
WAYS = {"resnet small": ("none", "kl", "features"), "unet small": ("none", "kl", "cwd", "cirkd")}
SIBLINGS = {"resnet small": ("resnet", "kl"), "unet small": ("unet", "cwd")}
SETTINGS = [
    *(Setting(network, KEEP, distill=way) for network, ways in WAYS.items() for way in ways),
    *(Setting(network, KEEP, distill=way, teacher=teacher) for network, (teacher, way) in SIBLINGS.items()),
]


def gained(row: Row) -> str:
    """The paired difference from the same run without a teacher."""
    (other,) = found([Setting(row["network"], row["keep"], row["importance"], "none", SELF, row["seed"], row["steps"])])
    task, n = work(NETWORKS[row["network"]].task), row["test_points"]["n"]
    change = paired(task, unpacked(other["test_rows"], n), unpacked(row["test_rows"], n))
    return f"{change['change']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"


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
        "points against no teacher [95 %]": lambda row: "–" if row["distill"] == "none" else gained(row),
    }
    rows = sorted(found(SETTINGS), key=lambda row: row["network"])
    put("kd", table(columns, rows))


if __name__ == "__main__":
    command("kd", SETTINGS, __doc__)
    write()
