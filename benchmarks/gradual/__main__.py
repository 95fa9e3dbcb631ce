# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gradual EXPERIMENT`: measures, and writes results/EXPERIMENT.json, its plot and its table in the docs."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gradual.overhead import overhead
from benchmarks.gradual.packed import packed
from benchmarks.gradual.plot import PICTURES, draw
from benchmarks.gradual.tables import write
from benchmarks.gradual.trained import accuracy, dip, small
from benchmarks.pages import DOCS
from featherweight.measure import machine_facts

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    names = list(PICTURES) if options.experiment in ("all", "plot") else [options.experiment]
    paths = {name: options.results / f"{name}.json" for name in names}
    for name, path in paths.items():
        if options.experiment != "plot":
            _measure(name, path, options)
            print(path)
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    print(*draw(found, options.docs / "img"), sep="\n")
    write(found, options.docs / "gradual-pruning.md")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradual", description=__doc__)
    parser.add_argument("experiment", choices=[*PICTURES, "plot", "all"])
    parser.add_argument("--steps", type=int, default=3000, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument(
        "--rounds", type=int, default=400, help="timed steps of each kind, for overhead; a multiple of 20"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page, and of img with the plots")
    return parser.parse_args(arguments)


def _measure(name: str, path: Path, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    results = _experiment(name, options)
    facts = {
        "command": f"python -m benchmarks.gradual {name}",
        "options": {key: getattr(options, key) for key in ("steps", "seeds", "rounds", "workers")},
        "seconds": round(time.perf_counter() - start),
        "load_average": os.getloadavg()[1],  # above the number of cores, others were at work there too
        "machine": machine_facts(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | results, indent=1) + "\n")


def _experiment(name: str, options: argparse.Namespace) -> dict[str, Any]:
    if name == "accuracy":
        return accuracy(options.steps, options.seeds, options.workers)
    if name == "dip":
        return dip(options.steps, options.workers)
    if name == "small":
        wide = options.results / "accuracy.json"
        if not wide.exists():
            raise SystemExit("small compares with the networks of `accuracy`: run that first.")
        return small(options.steps, options.seeds, options.workers, json.loads(wide.read_text()))
    return overhead(options.rounds) if name == "overhead" else packed()


if __name__ == "__main__":
    main()
