# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine.tables`: the tables of docs/engine.md from results, between their marks in the page."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engine.networks import NETWORKS
from benchmarks.pages import DOCS, put, table
from benchmarks.results import Row, last, read

RESULTS = Path(__file__).parent / "results"
DENSE = ("onnxruntime", "openvino", "torch", "torch_compile")  # that compute in float32, zeros and all
COLUMNS = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "PyTorch",
    "torch_compile": "compiled",
    "deepsparse": "DeepSparse 1.8",
    "onnxruntime int8": "ONNX Runtime int8",
    "openvino int8": "OpenVINO int8",
    "openvino_bf16": "OpenVINO bf16",
}


def main() -> None:
    for name, body in (("latency", latency()), ("memory", memory()), ("roofline", roofline())):
        put(name, body, DOCS / "engine.md")


def lines(name: str, *keys: str, results: Path = RESULTS) -> list[Row]:
    """Rows of an experiment, the last one by each key, as the networks are listed."""
    found = last(read(results / f"{name}.jsonl"), *keys)
    order = list(NETWORKS)
    return sorted(found, key=lambda row: (row.get("batch", 1), order.index(row["network"]), row["sparsity"]))


def latency(results: Path = RESULTS) -> str:
    rows = []
    for row in lines("latency", "network", "sparsity", "batch", results=results):
        times = {way: facts["median_ms"] for way, facts in row["ways"].items() if "median_ms" in facts}
        own = times.get("engine")
        if own is None:
            continue
        dense = min(times[way] for way in DENSE if way in times)
        cells = [f"{times[way]:.3g}" if way in times else "–" for way in COLUMNS]
        versus = [f"{dense / own:.2f}x", f"{times['deepsparse'] / own:.2f}x" if "deepsparse" in times else "–"]
        rows.append([row["network"], f"{row['sparsity']:.0%}", str(row["batch"]), f"**{own:.3g}**", *cells, *versus])
    head = ["network", "zeros", "batch", "engine, ms", *COLUMNS.values(), "over the fastest dense", "over DeepSparse"]
    return table(head, rows, text=1)


def memory(results: Path = RESULTS) -> str:
    rows = []
    for row in lines("latency", "network", "sparsity", "batch", results=results):
        if row["batch"] != 1:
            continue
        cells = []
        for way in ("engine", "onnxruntime", "openvino"):
            facts = row["ways"].get(way, {})
            if "load_s" not in facts:
                cells += ["–", "–"]
                continue
            cells += [f"{facts['load_s']:.2f}", f"{facts['peak_bytes'] / 1e6:,.0f}"]
        rows.append([row["network"], f"{row['sparsity']:.0%}", *cells])
    head = ["network", "zeros"]
    for name in ("engine", "ONNX Runtime", "OpenVINO"):
        head += [f"{name}: seconds", "peak, MB"]
    return table(head, rows, text=1)


def roofline(results: Path = RESULTS) -> str:
    found = lines("roofline", "network", "sparsity", "threads", "node", "how", results=results)
    rows = [
        [
            row["network"],
            row["node"],
            row["how"],
            f"{row['microseconds']:.0f}",
            f"{row['gflops']:.0f}",
            f"{row['of_peak']:.0%}",
            f"{row['of_bandwidth']:.0%}",
            row["limit"],
            f"{row['of_limit']:.0%}",
        ]
        for row in found
    ]
    head = ["network", "node", "how", "µs", "GF/s", "of FMA peak", "of memory's rate", "limited by", "reached"]
    return table(head, rows, text=3)


if __name__ == "__main__":
    main()
