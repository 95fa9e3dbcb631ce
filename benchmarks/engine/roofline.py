# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine.roofline [NETWORK ...]`: what each layer reaches in the engine, and what keeps it from more.

Roofs are measured on the same machine in the same minute: multiply-adds a second in registers, bytes a second from memory
and from the second-level cache. A line of results/roofline.jsonl is one step of one network on one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import featherweight as fw
import featherweight_engine as core
from benchmarks.engine import files
from benchmarks.engine.networks import NETWORKS
from benchmarks.results import Row, add

RESULTS = Path(__file__).parent / "results"
FLOAT = 4  # bytes
SHOWN = 0.005  # of the network's time: steps that take less are not told
REACHED = 0.5  # of a roof: below, what is between the loops costs more than the roof does


def roofs(how: str, flops: float, moved: float, peak: tuple[float, float, float]) -> dict[str, float]:
    """The least seconds that a step could take, by what would limit it."""
    fma, memory, cache = peak
    made = {"multiply-adds": flops / fma, "memory": moved / memory}
    # Each multiply-add of a sparse row reads a number of its panel, and panels lie in the second-level cache.
    if how.startswith("sparse") and "vector" not in how:
        made["second-level cache"] = flops / 2 * FLOAT / cache
    return made


def measure(name: str, sparsity: float, threads: int, runs: int) -> list[Row]:
    engine = fw.engine.load(files.plain(name, sparsity), threads=threads)
    arrays = [tensor.numpy() for tensor in NETWORKS[name].inputs(1)]
    inputs = {port.name: np.ascontiguousarray(array) for port, array in zip(engine.inputs, arrays, strict=True)}
    fma, memory, cache = core.peak(threads)
    profile = engine.profile(inputs, runs=runs)
    whole = sum(row.seconds for row in profile.rows)
    made = []
    for row in profile.rows:
        if row.seconds < SHOWN * whole:
            continue
        limits = roofs(row.how, row.flops, row.bytes, (fma, memory, cache))
        limit = max(limits, key=lambda each: limits[each])
        share = limits[limit] / row.seconds
        made.append(
            {
                "network": name,
                "sparsity": sparsity,
                "threads": threads,
                "node": row.node,
                "op": row.op,
                "how": row.how,
                "microseconds": row.seconds * 1e6,
                "share_of_time": row.seconds / whole,
                "gflops": row.flops / row.seconds / 1e9,
                "of_peak": row.flops / row.seconds / fma,
                "gbytes": row.bytes / row.seconds / 1e9,
                "of_bandwidth": row.bytes / row.seconds / memory,
                "limit": limit if share >= REACHED else f"what is around the loops ({limit} next)",
                "of_limit": share,
                "peak": {"gflops": fma / 1e9, "memory_gbytes": memory / 1e9, "cache_gbytes": cache / 1e9},
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.roofline", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=["resnet50"], help=", ".join(NETWORKS))
    parser.add_argument("--sparsity", type=float, help="instead of the network's second")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.networks:
        shares = NETWORKS[name].sparsities
        sparsity = options.sparsity if options.sparsity is not None else shares[len(shares) // 2]
        rows = measure(name, sparsity, options.threads, options.runs)
        for row in rows:
            add(options.results / "roofline.jsonl", row)
        print(f"{name} {sparsity}: {len(rows)} steps, {sum(row['microseconds'] for row in rows) / 1e3:.2f} ms")


if __name__ == "__main__":
    main()
