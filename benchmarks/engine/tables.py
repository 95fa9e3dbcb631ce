# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine.tables`: the tables of docs/engine.md from results, between their marks in the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.engine.networks import NETWORKS

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "engine.md"
Row = dict[str, Any]
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
    text = PAGE.read_text(encoding="utf-8")
    for name, body in (("latency", latency()), ("memory", memory()), ("roofline", roofline())):
        if body:
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", text, count=1, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


def lines(name: str, *keys: str, results: Path = RESULTS) -> list[Row]:
    """Rows of an experiment, the last one by each key, as the networks are listed."""
    path = results / f"{name}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {tuple(row[key] for key in keys): row for row in found}
    order = list(NETWORKS)
    return sorted(last.values(), key=lambda row: (row.get("batch", 1), order.index(row["network"]), row["sparsity"]))


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
            cells += [f"{facts['load_s']:.2f}", f"{(facts['peak_bytes'] - facts['bytes_before']) / 1e6:,.0f}"]
        rows.append([row["network"], f"{row['sparsity']:.0%}", *cells])
    head = ["network", "zeros"]
    for name in ("engine", "ONNX Runtime", "OpenVINO"):
        head += [f"{name}: seconds to the first answer", "peak, MB"]
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


def table(head: list[str], rows: list[list[str]], text: int) -> str:
    """Markdown; the first `text` columns to the left, numbers to the right."""
    if not rows:
        return ""
    marks = ["---"] * text + ["---:"] * (len(head) - text)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *rows])


if __name__ == "__main__":
    main()
