# SPDX-License-Identifier: Apache-2.0
"""All tables and pictures of the page again, from the results that are there; nothing is measured."""

from __future__ import annotations

from benchmarks.comb import classes, curve, headline, importances, kd, latency, pretrained


def main() -> None:
    for experiment in (headline, curve, kd, classes, importances, pretrained, latency):
        experiment.write()


if __name__ == "__main__":
    main()
