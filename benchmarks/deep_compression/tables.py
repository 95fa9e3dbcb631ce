# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/deep-compression.md from results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gradual.paired import drop
from benchmarks.pages import put, table
from benchmarks.results import Row, read

TITLES = {"lenet_300_100": "LeNet-300-100", "lenet_5": "LeNet-5"}


def write(results: Path, page: Path) -> None:
    for name, (file, make) in TABLES.items():
        put(name, make(read(results / file)), page)


def groups(rows: list[Row]) -> list[list[Row]]:
    """The runs of each split, network and setting, over seeds."""
    kinds = [(-row["split"], row["network"], row["name"]) for row in rows]
    return [[row for row, other in zip(rows, kinds, strict=True) if other == kind] for kind in sorted(set(kinds))]


def mean(rows: Iterable[float]) -> float:
    return statistics.fmean(rows)


def accuracy(rows: list[Row]) -> str:
    body = []
    for own in groups(rows):
        lost = drop([r["test"]["right_dense"] for r in own], [r["test"]["right"] for r in own])
        bytes_ = mean(r["sizes"]["file"] for r in own)
        body.append(
            [
                TITLES[own[0]["network"]],
                own[0]["name"],
                f"{100 * mean(r['zeros'] for r in own):.1f} %",
                f"{100 * mean(r['test']['dense'] for r in own):.2f}",
                f"{100 * mean(r['test']['compressed'] for r in own):.2f}",
                f"{lost['points']:+.2f} [{lost['low']:+.2f}, {lost['high']:+.2f}]",
                f"{bytes_:,.0f}",
                f"{mean(r['sizes']['dense'] / r['sizes']['file'] for r in own):.1f}x",
                str(len(own)),
                str(own[0]["split"]),
            ]
        )
    head = ["network", "setting", "zeros", "dense, %", "compressed, %", "points lost [95 %]", "file, bytes", "smaller", "seeds", "split"]  # fmt: skip
    return table(head, body)


def sizes(rows: list[Row]) -> str:
    """Bytes of the same weights by different coders, means over seeds."""
    body = []
    for own in groups(rows):
        cells = [TITLES[own[0]["network"]], own[0]["name"], str(own[0]["split"])]
        for pick in (
            lambda r: r["sizes"]["dense"],
            lambda r: r["sizes"]["gzip"],
            lambda r: r["sizes"]["zstd"],
            lambda r: (r.get("nncodec_of_pruned") or {}).get("bytes"),
            lambda r: (r.get("nncodec") or {}).get("bytes"),
            lambda r: r["sizes"]["file"],
            lambda r: sum(r["sizes"]["files"].values()),
        ):
            found = [pick(r) for r in own]
            cells.append("–" if None in found else f"{mean(found):,.0f}")
        body.append(cells)
    head = ["network", "setting", "split", "fp32", "gzip -9", "zstd -19", "nncodec, pruned weights", "nncodec, these weights", "ours", "with plan.json"]  # fmt: skip
    return table(head, body)


def stages(rows: list[Row]) -> str:
    body = [
        [TITLES[own[0]["network"]], own[0]["name"], str(own[0]["split"]), *(f"{100 * mean(r['accuracy'][stage] for r in own):.2f}" for stage in ("dense", "pruned", "clustered", "tuned"))]
        for own in groups(rows)
    ]  # fmt: skip
    return table(["network", "setting", "split", "dense", "pruned", "clustered", "centroids tuned"], body)


def pretrained(rows: list[Row]) -> str:
    body = [
        [row["title"], row["way"], f"{100 * row['zeros']:.1f} %", f"{row['dense']:.3f}", f"{row['compressed']:.3f}", f"{100 * row['change']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]", str(row["n"]), f"{row['sizes']['file']:,}", f"{row['sizes']['dense'] / row['sizes']['file']:.1f}x", f"{row['sizes']['zstd']:,}", *(_bytes(row.get(key)) for key in ("nncodec", "nncodec_of_dense"))]
        for row in rows
    ]  # fmt: skip
    head = [
        "network",
        "way",
        "zeros",
        "dense",
        "compressed",
        "points [95 %]",
        "n",
        "file, bytes",
        "smaller",
        "zstd -19",
        "nncodec, from these",
        "nncodec, from dense",
    ]
    return table(head, body)


def _bytes(coded: Row | None) -> str:
    return f"{coded['bytes']:,}" if coded and coded["bytes"] is not None else "–"


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "accuracy": ("runs.jsonl", accuracy),
    "sizes": ("runs.jsonl", sizes),
    "stages": ("runs.jsonl", stages),
    "pretrained": ("pretrained.jsonl", pretrained),
}
