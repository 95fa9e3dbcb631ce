# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine.latency [NETWORK ...]`: milliseconds of whole networks, every runtime in one run.

Each runtime is a process of its own; they take turns, a few calls each, round after round, so that whatever else the
machine does falls on all of them alike. A line of results/latency.jsonl is one network at one sparsity and batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import onnx

from benchmarks.engine import files
from benchmarks.engine.networks import NETWORKS
from featherweight.measure import machine_facts

RESULTS = Path(__file__).parent / "results"
WAYS = (
    "engine",
    "onnxruntime",
    "openvino",
    "onnxruntime int8",
    "openvino int8",
    "torch",
    "torch_compile",
    "deepsparse",
)
TOLERANCE = 1e-3  # of the largest output: a runtime that computes something else is not timed


class Way:
    """One runtime's process, ready to run."""

    def __init__(
        self, way: str, name: str, sparsity: float, batch: int, options: argparse.Namespace, room: Path
    ) -> None:
        runtime = way.split()[0]
        interpreter = options.deepsparse if runtime == "deepsparse" else sys.executable
        if runtime.startswith("torch"):
            model, keys = f"{name}@{sparsity}", ["x"]
        else:
            path = (
                files.older(name, sparsity, batch)
                if runtime == "deepsparse"
                else files.integers(name, sparsity)
                if way.endswith("int8")
                else files.plain(name, sparsity)
            )
            model = str(path)
            keys = [each.name for each in onnx.load(path, load_external_data=False).graph.input]
        self.room = room / way.replace(" ", "-")
        self.room.mkdir()
        inputs = self.room / "inputs.npz"
        files.inputs(name, batch, inputs, keys)
        worker = Path(__file__).with_name("worker.py")
        self.log = (self.room / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [str(interpreter), str(worker), runtime, model, str(options.threads), str(inputs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
        )
        self.facts = self._answer()
        self.times: list[float] = []

    def _answer(self) -> Any:
        line = cast("IO[str]", self.process.stdout).readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError((self.log.read().strip().splitlines() or ["it ended without a word"])[-1])
        return json.loads(line)

    def outputs(self) -> list[np.ndarray[Any, Any]]:
        with np.load(self.room / f"outputs-{self.facts['pid']}.npz") as arrays:
            return [arrays[key] for key in arrays.files]

    def run(self, calls: int, keep: bool = True) -> float:
        print(calls, file=self.process.stdin, flush=True)
        times = self._answer()
        if keep:
            self.times += times
        return float(np.median(times))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def measure(name: str, sparsity: float, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {
        "network": name,
        "sparsity": sparsity,
        "batch": batch,
        "threads": options.threads,
        "ways": {},
    }
    ways: dict[str, Way] = {}
    with tempfile.TemporaryDirectory() as room:
        try:
            for way in options.ways:
                if way == "deepsparse" and options.deepsparse is None:
                    continue
                try:
                    ways[way] = Way(way, name, sparsity, batch, options, Path(room))
                except Exception as error:
                    row["ways"][way] = {"refused": f"{error}"[:300]}
                    print(f"{name} {sparsity}: {way}: {error}", file=sys.stderr)
            expected = ways["onnxruntime"].outputs() if "onnxruntime" in ways else None
            for way, one in ways.items():
                facts = {key: one.facts[key] for key in ("load_s", "peak_bytes", "bytes_before")}
                if expected is not None:
                    found = one.outputs()
                    facts["difference"] = max(
                        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)
                    )
                row["ways"][way] = facts
            # Calls a turn so that a turn takes about as long in each, and at least one.
            calls = {}
            for way, one in ways.items():
                one.run(3, keep=False)
                calls[way] = max(1, round(options.turn / one.run(3, keep=False)))
            for _ in range(options.rounds):
                for way, one in ways.items():
                    one.run(calls[way])
            for way, one in ways.items():
                row["ways"][way] |= {
                    "median_ms": float(np.median(one.times)),
                    "least_ms": float(np.min(one.times)),
                    "p90_ms": float(np.percentile(one.times, 90)),
                    "runs": len(one.times),
                }
        finally:
            for one in ways.values():
                one.close()
    return row | {"load_average": round(os.getloadavg()[0], 1), "machine": machine_facts()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.latency", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--sparsity", type=float, nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=float, default=150, help="milliseconds of one runtime's turn")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--deepsparse", type=Path, help="an interpreter that has DeepSparse 1.8")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.networks or NETWORKS:
        for sparsity in options.sparsity or NETWORKS[name].sparsities:
            for batch in options.batch:
                row = measure(name, sparsity, batch, options)
                with (options.results / "latency.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                shown = {
                    way: round(facts["median_ms"], 2) for way, facts in row["ways"].items() if "median_ms" in facts
                }
                print(f"{name}, {sparsity:.0%} zeros, batch {batch}: {shown}", flush=True)


if __name__ == "__main__":
    main()
