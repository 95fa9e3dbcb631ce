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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import onnx

from benchmarks.engine import files
from benchmarks.engine.networks import NETWORKS
from benchmarks.results import add
from featherweight.measure import machine_facts

RESULTS = Path(__file__).parent / "results"
WAYS = (
    "engine",
    "onnxruntime",
    "openvino",
    "onnxruntime int8",
    "openvino int8",
    "openvino_bf16",
    "torch",
    "torch_compile",
    "deepsparse",
)

REST = 0.1  # seconds


class Way:
    """One runtime's process with one model, ready to run: a file, or for PyTorch NETWORK@SHARE."""

    def __init__(
        self,
        runtime: str,
        model: Path | str,
        arrays: Sequence[np.ndarray[Any, Any]],
        threads: int,
        room: Path,
        interpreter: Path | str = sys.executable,
    ) -> None:
        self.room = room
        room.mkdir()
        self.log = (room / "log.txt").open("w+")
        inputs = room / "inputs.npz"
        named: dict[str, Any] = dict(zip(names(model), arrays, strict=True))
        np.savez(inputs, **named)
        self.process = subprocess.Popen(
            [
                str(interpreter),
                str(Path(__file__).with_name("worker.py")),
                runtime,
                str(model),
                str(threads),
                str(inputs),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            # Another interpreter has packages of its own.
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]) if interpreter == sys.executable else ""},
        )
        self.times: list[float] = []
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> Any:
        line = cast("IO[str]", self.process.stdout).readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError((self.log.read().strip().splitlines() or ["it ended without a word"])[-1])
        return json.loads(line)

    def outputs(self) -> list[np.ndarray[Any, Any]]:
        with np.load(self.room / f"outputs-{self.facts['pid']}.npz") as arrays:
            return [arrays[key] for key in arrays.files]

    def told(self, expected: Sequence[np.ndarray[Any, Any]] | None) -> dict[str, Any]:
        """Loading and memory, and how far the outputs are from these, of the largest of them."""
        facts = {key: self.facts[key] for key in ("load_s", "peak_bytes", "bytes_before")}
        if expected is not None:
            pairs = zip(self.outputs(), expected, strict=True)
            facts["difference"] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        return facts

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


def names(model: Path | str) -> list[str]:
    """What the inputs of a file are called; PyTorch takes them in their order."""
    if isinstance(model, str):
        return ["x"]
    return [each.name for each in onnx.load(model, load_external_data=False).graph.input]


@contextmanager
def started(starts: Mapping[str, Callable[[Path], Way]]) -> Iterator[tuple[dict[str, Way], dict[str, str]]]:
    """The ways, each started in a folder of its own, one after the other; and why others refused."""
    ways: dict[str, Way] = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as room:
        try:
            for i, (way, start) in enumerate(starts.items()):
                try:
                    ways[way] = start(Path(room) / str(i))
                except Exception as error:
                    refused[way] = f"{error}"[:300]
                    print(f"{way}: {error}", file=sys.stderr)
            yield ways, refused
        finally:
            for one in ways.values():
                one.close()


def in_turns(ways: Mapping[str, Way], rounds: int, turn: float) -> dict[str, dict[str, Any]]:
    """Milliseconds of each: as many calls a turn as take `turn` milliseconds, at least one, round after round.

    Before a turn the last one's threads come to rest: they look for work for a while, on processors that the next one needs.
    """
    calls = {}
    for way, one in ways.items():
        one.run(3, keep=False)
        calls[way] = max(1, round(turn / one.run(3, keep=False)))
    for _ in range(rounds):
        for way, one in ways.items():
            time.sleep(REST)
            one.run(calls[way])
    return {
        way: {
            "median_ms": float(np.median(one.times)),
            "least_ms": float(np.min(one.times)),
            "p90_ms": float(np.percentile(one.times, 90)),
            "runs": len(one.times),
        }
        for way, one in ways.items()
    }


def measure(name: str, sparsity: float, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    arrays = [tensor.numpy() for tensor in NETWORKS[name].inputs(batch)]

    def start(way: str, room: Path) -> Way:
        runtime = way.split()[0]
        model: Path | str
        if runtime.startswith("torch"):
            model = f"{name}@{sparsity}"
        elif runtime == "deepsparse":
            model = files.older(name, sparsity, batch)
        else:
            model = (files.integers if way.endswith("int8") else files.plain)(name, sparsity)
        interpreter = options.deepsparse if runtime == "deepsparse" else sys.executable
        return Way(runtime, model, arrays, options.threads, room, interpreter)

    asked = [way for way in options.ways if way != "deepsparse" or options.deepsparse is not None]
    with started({way: partial(start, way) for way in asked}) as (ways, refused):
        expected = ways["onnxruntime"].outputs() if "onnxruntime" in ways else None
        told: dict[str, dict[str, Any]] = {way: {"refused": why} for way, why in refused.items()}
        told |= {way: one.told(expected) for way, one in ways.items()}
        for way, times in in_turns(ways, options.rounds, options.turn).items():
            told[way] |= times
    row = {"network": name, "sparsity": sparsity, "batch": batch, "threads": options.threads, "ways": told}
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
    for name in options.networks or NETWORKS:
        for sparsity in options.sparsity or NETWORKS[name].sparsities:
            for batch in options.batch:
                row = measure(name, sparsity, batch, options)
                add(options.results / "latency.jsonl", row)
                shown = {
                    way: round(facts["median_ms"], 2) for way, facts in row["ways"].items() if "median_ms" in facts
                }
                print(f"{name}, {sparsity:.0%} zeros, batch {batch}: {shown}", flush=True)


if __name__ == "__main__":
    main()
