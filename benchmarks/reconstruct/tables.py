# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.reconstruct.tables`: the tables of docs/reconstruct.md from results, between their marks in the page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.pages import DOCS, put, table
from benchmarks.reconstruct.networks import CASES
from benchmarks.reconstruct.solvers import LAYERS, SMALL, ratios
from benchmarks.results import Row, last, read

RESULTS = Path(__file__).parent / "results"
METHODS = {
    False: ("magnitude", "AdaPrune-like", "SparseGPT", "ExactOBS", "ours, independent", "ours"),
    True: ("nearest", "GPTQ", "OBQ", "AdaRound", "ours, independent", "ours"),
}
LAYER_CASES = (
    *("weight 50%", "weight 70%", "weight 80%", "weight 90%", "2:4", "1x4 50%", "4 bit", "3 bit", "2 bit"),
    *("2:4, 4 bit", "weight 50%, 4 bit", "weight 80%, 4 bit", "1x4 50%, 4 bit"),
)


def main() -> None:
    for name, make in TABLES.items():
        put(name, make(), DOCS / "reconstruct.md")


def lines(name: str) -> list[Row]:
    """Rows of an experiment of `networks`; the last one of each subject, case and method."""
    return last(read(RESULTS / f"{name}.jsonl"), "subject", "case", "method")


def by_method(cell: Callable[[Row], str]) -> str:
    """A table a subject and kind: cases down, methods across."""
    found = lines("metric")
    parts = []
    for subject in dict.fromkeys(row["subject"] for row in found):
        own = [row for row in found if row["subject"] == subject]
        [dense] = [row for row in own if row["case"] == "dense"]
        title = f"**{subject}**: {dense['name']}, dense {figure(dense['metric'])}, n = {dense['n']:,}"
        for rounds in (False, True):
            cases = [case for case in CASES if ("bit" in case) == rounds and any(row["case"] == case for row in own)]
            seen = {(row["case"], row["method"]): row for row in own}
            methods = [m for m in METHODS[rounds] if any((case, m) in seen for case in cases)]
            rows = [[case, *(cell(seen[case, m]) if (case, m) in seen else "" for m in methods)] for case in cases]
            if rows:
                parts.append((title + "\n\n" if not rounds else "") + table(["", *methods], rows))
    return "\n\n".join(parts)


def figure(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def metric() -> str:
    return by_method(lambda row: figure(row["metric"]))


def output() -> str:
    """The table, and ours over the paper's two solvers in one number."""
    seen = {(row["subject"], row["case"], row["method"]): row.get("output_error") for row in lines("metric")}
    over = {
        (subject, case): ours / theirs
        for (subject, case, method), theirs in seen.items()
        if method in ("ExactOBS", "OBQ") and (ours := seen.get((subject, case, "ours")))
    }
    errors = by_method(
        lambda row: f"{row['output_error']:.2g}" if row["output_error"] < 100 else f"{row['output_error']:.0f}"
    )
    if not over:
        return errors
    mean, networks = statistics.geometric_mean(over.values()), len({subject for subject, _ in over})
    lower = sum(one < 1 for one in over.values())
    sentence = f"Ours over that of ExactOBS or OBQ, in {len(over)} settings of {networks} networks: {mean:.2f} in the geometric mean, lower in {lower}."
    return f"{sentence}\n\n{errors}"


def layers() -> str:
    """Geometric means over layers of a solver's error over ExactOBS's or OBQ's, and its seconds over theirs."""
    parts = []
    for experiment, base in (("pruning", "exact_obs"), ("quantization", "obq"), ("joint", "prune, refit, obq")):
        found = last(read(RESULTS / f"{experiment}.jsonl"), "layer", "case", "solver")
        parts += claim([row for row in found if row["network"] != SMALL], base, LAYERS[experiment][2])
        for network in dict.fromkeys(row["network"] for row in found):
            rows = [row for row in found if row["network"] == network]
            count = len({row["layer"] for row in rows})
            solvers = [s for s in dict.fromkeys(row["solver"] for row in rows) if s != base]
            cases = [case for case in LAYER_CASES if any(row["case"] == case for row in rows)]
            body = [[case, *(ratio(rows, base, solver, case) for solver in solvers)] for case in cases]
            parts.append(f"**{network}**, {count} layers, error over that of `{base}` (seconds over its seconds)\n\n" + table(["", *solvers], body))  # fmt: skip
    return "\n\n".join(parts)


def claim(rows: list[Row], base: str, cases: list[str]) -> list[str]:
    """`best` against the base over all layers of real networks, in the cases where it claims to be better."""
    error, held_out, seconds = ratios(rows, base, "best", cases)
    if math.isnan(error):
        return []
    layers = {row["layer"] for row in rows if row["solver"] == "best" and row["case"] in cases}
    return [
        f"Of {len(layers)} layers of real networks, {', '.join(cases)}: `best` leaves {error:.3f} of the error of `{base}`, "
        f"{held_out:.3f} on samples that neither saw, in {seconds:.2f} of its seconds."
    ]


def ratio(rows: list[Row], base: str, solver: str, case: str) -> str:
    error, _, seconds = ratios(rows, base, solver, [case])
    return "" if math.isnan(error) else f"{error:.3f} ({seconds:.2f})"


def wide() -> str:
    """Of layers that were solved in blocks the held-out errors over SparseGPT's on the same blocks."""
    found = [row for row in lines("metric") if any("blocks" in how for how in row.get("layer_solvers", {}).values())]
    methods = [m for m in dict.fromkeys(row["method"] for row in found) if m != "SparseGPT"]
    seen = {(row["subject"], row["case"], row["method"]): row["layer_errors"] for row in found}
    body = []
    for row in found:
        if row["method"] != "SparseGPT":
            continue
        for layer, how in row["layer_solvers"].items():
            rows, d = row["layer_shapes"][layer]
            base = row["layer_errors"][layer]
            others = [seen.get((row["subject"], row["case"], method), {}).get(layer) for method in methods]
            cells = ["" if other is None else f"{other / base:.3f}" for other in others]
            if "blocks" in how:
                body.append([row["subject"], row["case"], f"{layer} {rows}x{d}", f"{base:.2g}", *cells])
    return table(["network", "", "layer", "error by SparseGPT", *(f"{method}, over it" for method in methods)], body)


def cost() -> str:
    parts = []
    speed = RESULTS / "speed.json"
    if speed.exists():
        rows = json.loads(speed.read_text())["results"]
        body = [[r["run"], f"{statistics.median(r['seconds']):.2f}", f"{r['times_lazy']:.1f}", f"{r['peak_grew_bytes'] / 2**20:.0f} MiB", "yes" if r["same_order"] else "no"] for r in rows]  # fmt: skip
        title = f"ExactOBS on {rows[0]['rows']} x {rows[0]['d']}, against the reference's loop of in-place rank-1 updates:\n\n"
        parts.append(title + table(["", "seconds", "times ours", "memory", "same order"], body))
    fitted = RESULTS / "cost.json"
    if fitted.exists():
        found = json.loads(fitted.read_text())["results"]
        fits, rows = ([row for row in found if ("seconds_by_d" in row) == fit] for fit in (True, False))
        large = {row["solver"]: row for row in rows if (row["rows"], row["d"]) == (256, 1152)}
        body = []
        for fit in fits:
            one = large[fit["solver"]]
            exponents = [f"{fit[f'{what}_by_{axis}']:.2f}" for what in ("processor_seconds", "peak_grew_bytes") for axis in ("rows", "d")]  # fmt: skip
            figures = [f"{one['processor_seconds']:.1f}", f"{one['peak_grew_bytes'] / 2**20:,.0f} MiB"]
            body.append([f"`{fit['solver']}`", str(fit["points"]), *exponents, *figures])
        head = ["solver", "shapes", "seconds: a", "b", "memory: a", "b", "seconds at 256 x 1152", "memory there"]
        parts.append(f"Processor seconds and peak memory as rows^a · d^b, fitted to the shapes that take more than half a second (of 16 to 256 rows and d = 144 to {max(row['d'] for row in rows)}):\n\n" + table(head, body))  # fmt: skip
    whole = lines("cost")
    if whole:
        body = [[r["subject"], f"`{r['solver']}`", str(r["layers"]), f"{r['seconds'] / 60:.1f}", f"{r['processor_seconds'] / 60:.1f}", f"{r['peak_bytes'] / 1e9:.1f} GB", str(r["threads"])] for r in whole]  # fmt: skip
        parts.append("Whole networks to 75 % zeros (peak memory of the process, network and data included):\n\n" + table(["network", "solver", "weights", "minutes", "processor minutes", "peak memory", "threads"], body))  # fmt: skip
    return "\n\n".join(parts)


def training() -> str:
    rows = lines("training")
    body = [[f"{r['case']:.0%}", r["method"], figure(r["metric"]), f"{100 * r['change']:+.2f} [{100 * r['low']:+.2f}, {100 * r['high']:+.2f}]", f"{r['seconds'] / 60:.1f}", f"{r['processor_seconds'] / 60:.1f}"] for r in rows]  # fmt: skip
    return table(["zeros", "method", "accuracy", "points, paired, 95 %", "minutes", "processor minutes"], body)


def order() -> str:
    rows = lines("order")
    ways = list(dict.fromkeys(row["method"] for row in rows))
    seen = {(row["subject"], row["case"], row["method"]): row for row in rows}
    body = [
        [
            subject,
            case,
            *(
                f"{seen[subject, case, way]['output_error']:.2g}" if (subject, case, way) in seen else ""
                for way in ways
            ),
        ]
        for subject, case in dict.fromkeys((row["subject"], row["case"]) for row in rows)
    ]
    return table(["network", "", *ways], body)


def database() -> str:
    rows = lines("flops")
    body = [[r["case"], r["method"], f"{r['macs']:.3f}", figure(r["metric"]), f"{100 * r['change']:+.2f} [{100 * r['low']:+.2f}, {100 * r['high']:+.2f}]"] for r in rows]  # fmt: skip
    if not rows:
        return ""
    size = f"The database of {rows[0]['subject']} (44 levels of each layer) is {rows[0]['database_bytes'] / 1e6:.1f} MB.\n\n"
    return size + table(["fewer MACs", "method", "share of MACs", "metric", "points, paired, 95 %"], body)


TABLES: dict[str, Callable[[], str]] = {
    "metric": metric,
    "output": output,
    "layers": layers,
    "wide": wide,
    "cost": cost,
    "training": training,
    "database": database,
    "order": order,
}

if __name__ == "__main__":
    main()
