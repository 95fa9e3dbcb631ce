# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.quantize.tables`: the tables of docs/quantize.md from results, between their marks in the page."""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages import DOCS, put, table
from benchmarks.quantize.networks import BITS, RESULTS
from benchmarks.results import Row, last, read

# Metrics that are shares are told in points; a perplexity in its own units.
_UNITS = {True: 100.0, False: 1.0}


def main() -> None:
    for name, body in (("weights", weights()), ("integers", integers()), ("latency", latency())):
        put(name, body, DOCS / "quantize.md")


def lines(name: str, results: Path = RESULTS) -> list[Row]:
    """Rows of an experiment, the last one of each network, way and number of bits."""
    return last(read(results / f"{name}.jsonl"), "subject", "way", "bits")


def weights(results: Path = RESULTS) -> str:
    found = {(row["subject"], row["way"], row["bits"]): row for row in lines("weights", results)}
    rows = []
    for subject, way in dict.fromkeys((subject, way) for subject, way, _ in found):
        own = [found.get((subject, way, bits)) for bits in BITS]
        first = next(row for row in own if row is not None)
        cells = ["–" if row is None else f"{change(row)}, {row['file_bytes'] / 1000:,.0f} kB" for row in own]
        named = f"{subject}, {first['metric']}"
        rows.append([named, figure(first, "dense"), f"{first['dense_bytes'] / 1000:,.0f} kB", way, *cells])
    head = ["network", "dense", "fp32", "rounding", *(f"{bits} bits" for bits in BITS)]
    return table(head, rows)


def integers(results: Path = RESULTS) -> str:
    rows = []
    for row in lines("integers", results):
        files = [row["runtimes"].get(name) for name in ("onnxruntime", "openvino")]
        judged = [file for file in files if file is not None and "error" not in file]
        cells = [change(row), *(change(file) if file in judged else "–" for file in files)]
        no_worse = not any(worse(one) for one in (row, *judged))
        named = f"{row['subject']}, {row['metric']}"
        rows.append([named, f"{row['n']:,}", figure(row, "dense"), row["way"], *cells, "yes" if no_worse else "no"])
    head = ["network", "n", "dense", "inputs", "PyTorch", "ONNX Runtime", "OpenVINO", "within half a point"]
    return table(head, rows)


def latency(results: Path = RESULTS) -> str:
    rows = []
    for row in lines("integers", results):
        cells = []
        for file in (row["runtimes"].get(name) for name in ("onnxruntime", "openvino")):
            if file is None or "comparison" not in file:  # the runtime refused the file
                cells += ["–", "–"]
                continue
            low, high = file["comparison"]["low"], file["comparison"]["high"]
            cells.append(f"{file['float32_ms']:.3g} → {file['integers_ms']:.3g}")
            cells.append(f"{file['comparison']['ratio']:.2f}x [{low:.2f}, {high:.2f}]")
        rows.append([row["subject"], row["way"], *cells])
    return table(["network", "inputs", "ONNX Runtime, ms", "faster", "OpenVINO, ms", "faster"], rows)


def unit(row: Row) -> float:
    return _UNITS[row["higher_is_better"]]


def figure(row: Row, name: str) -> str:
    return f"{row[name] * unit(row):.2f}"


def change(row: Row) -> str:
    each = [row[name] * unit(row) for name in ("change", "low", "high")]
    return f"{each[0]:+.2f} [{each[1]:+.2f}, {each[2]:+.2f}]"


def worse(row: Row) -> bool:
    """Whether the interval reaches more than half a point to the worse side; of a perplexity, half a hundredth of it."""
    if row["higher_is_better"]:
        return bool(row["low"] * unit(row) < -0.5)
    return bool(row["high"] > 0.005 * row["dense"])


if __name__ == "__main__":
    main()
