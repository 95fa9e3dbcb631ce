# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/gradual-pruning.md from results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pages import put, table

Results = dict[str, Any]


def write(results: dict[str, Results], page: Path) -> None:
    for name, columns in TABLES.items():
        if name in results:
            rows = results[name]["runs" if name == "dip" else "rows"]
            put(name, table(list(columns), ([cell(row) for cell in columns.values()] for row in rows)), page)


def _share(key: str, unit: str = " %", digits: int = 1) -> Callable[[Results], str]:
    return lambda row: f"{100 * row[key]:.{digits}f}{unit}"


def _count(key: str) -> Callable[[Results], str]:
    return lambda row: f"{row[key]:,.0f}"


def _tests(row: Results) -> str:
    return f"{100 * row['test']:.2f} ({', '.join(f'{100 * test:.2f}' for test in row['tests'])})"


def _lost(row: Results) -> str:
    drop = row["drop"]
    return f"{drop['points']:+.2f} [{drop['low']:+.2f}, {drop['high']:+.2f}]"


def _updates(run: Results) -> str:
    if not run["sparsity"]:
        return "never"
    return "all at once" if run["schedule"] == "one_shot" else f"every {run['every']} steps"


def _fall(run: Results) -> str:
    """Before and after the update that cost most, and at the evaluations that followed."""
    if not run["sparsity"]:
        return "–"
    at = max(range(len(run["curve"])), key=lambda i: run["curve"][i]["before"] - run["curve"][i]["after"])
    point, *later = run["curve"][at : at + 4]
    after = ", ".join(f"{100 * p['before']:.1f} after {p['step'] - point['step']}" for p in later)
    return f"step {point['step']}: {100 * point['before']:.1f} → {100 * point['after']:.1f}; {after} steps"


TABLES: dict[str, dict[str, Callable[[Results], str]]] = {
    "accuracy": {
        "zeros in pruned layers": _share("layer_sparsity"),
        "in the network": _share("network_sparsity"),
        "test accuracy, % (each seed)": _tests,
        "points lost [95 %]": lambda row: _lost(row) if row["sparsity"] else "–",
        "file, bytes": _count("packed_bytes"),
        "smaller": lambda row: f"{row['dense_bytes'] / row['packed_bytes']:.1f}x",
        "gzip -6 of dense": _count("gzip_bytes"),
    },
    "dip": {
        "masks are updated": _updates,
        "validation accuracy, %, at the deepest fall": _fall,
        "at the end, %": _share("validation", "", 2),
    },
    "small": {
        "wide network, zeros": lambda row: f"{100 * row['wide']['sparsity']:g} %",
        "non-zeros": lambda row: f"{row['wide']['nonzeros']:,}",
        "test accuracy, % (each seed)": lambda row: _tests(row["wide"]),
        "narrow network": lambda row: f"width {row['width']}",
        "parameters": _count("parameters"),
        "its test accuracy, % (each seed)": _tests,
        "points behind [95 %]": _lost,
    },
    "overhead": {
        "network": lambda row: row["name"],
        "parameters": _count("parameters"),
        "step without, ms": lambda row: f"{row['without_ms']:.2f}",
        "with, ms": lambda row: f"{row['with_ms']:.2f}",
        "at an update, ms": lambda row: f"{row['update_ms']:.2f}",
        "overhead": _share("overhead"),
        "95 % interval": lambda row: f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %",
    },
    "packed": {
        "zeros": _share("sparsity"),
        "file, bytes": _count("packed_bytes"),
        "of dense fp32": _share("ratio", digits=2),
        "best formula": lambda row: f"{100 * min(row['formula'].values()):.2f} %",
        "gzip -6 of dense": lambda row: f"{100 * row['gzip_bytes'] / row['dense_bytes']:.2f} %",
    },
}
