# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.deep_compression train|compress|pretrained|tables`: networks pruned, clustered, coded.

`train` makes the dense LeNets of each seed (MNIST-10k), `compress` adds a line to results/runs.jsonl for each setting and
seed that has none yet, `pretrained` likewise compresses networks without training, and `tables` writes the page's tables. `--nncodec PYTHON` names an interpreter that has
Fraunhofer's nncodec (`pip install nncodec` in an environment of its own) to compare with.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.deep_compression import tables
from benchmarks.deep_compression.compressing import compress
from benchmarks.deep_compression.networks import NETWORKS
from benchmarks.deep_compression.pretrained import SPARSITY, measure, recipes
from benchmarks.deep_compression.settings import SETTINGS
from benchmarks.deep_compression.training import dense
from benchmarks.pages import DOCS
from benchmarks.results import Row, add, read
from featherweight.measure import machine_facts

RESULTS = Path(__file__).parent / "results"
PAGE = DOCS / "deep-compression.md"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    if options.command == "train":
        for name in options.networks:
            for seed in range(options.seeds):
                dense(name, seed, options.split)
    elif options.command == "compress":
        _compress(options)
    elif options.command == "pretrained":
        _pretrained(options)
    else:
        tables.write(options.results, options.page)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deep_compression", description=__doc__)
    parser.add_argument("command", choices=["train", "compress", "pretrained", "tables"])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--subjects", nargs="+", choices=list(SPARSITY), default=list(SPARSITY))
    parser.add_argument("--seeds", type=int, default=3, help="dense networks of each kind")
    parser.add_argument("--split", type=int, default=1, help="of the data; settings were tried on 0")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--nncodec", type=Path, help="an interpreter that has nncodec")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the tables")
    return parser.parse_args(arguments)


def _compress(options: argparse.Namespace) -> None:
    path = options.results / "runs.jsonl"
    there = {(row["network"], row["name"], row["split"], row["seed"]) for row in read(path)}
    for seed in range(options.seeds):
        for setting in SETTINGS:
            wanted = setting.network in options.networks and options.only in setting.name
            if wanted and (setting.network, setting.name, options.split, seed) not in there:
                row = compress(setting, seed, options.split, options.nncodec)
                _add(path, row)
                test = row["test"]
                print(f"{setting.network}, {setting.name}, seed {seed}: {_size(row)}, test {test['dense']:.4f} -> {test['compressed']:.4f}, {row['accuracy']}, {row['seconds']} s", flush=True)  # fmt: skip


def _pretrained(options: argparse.Namespace) -> None:
    path = options.results / "pretrained.jsonl"
    there = {(row["subject"], row["way"]) for row in read(path)}
    for name in options.subjects:
        for way in recipes(name):
            if options.only in way and (name, way) not in there:
                row = measure(name, way, options.nncodec)
                _add(path, row)
                print(f"{name}, {way}: {_size(row)}, {row['metric']} {row['dense']:.4f} -> {row['compressed']:.4f}, {row['seconds']} s", flush=True)  # fmt: skip


def _size(row: Row) -> str:
    return f"{row['sizes']['file']} bytes, {row['sizes']['dense'] / row['sizes']['file']:.1f}x"


def _add(path: Path, row: Row) -> None:
    add(path, row | {"load_average": round(os.getloadavg()[0], 1), "machine": machine_facts()})


if __name__ == "__main__":
    main()
