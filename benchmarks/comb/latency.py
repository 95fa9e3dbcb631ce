# SPDX-License-Identifier: Apache-2.0
"""Latency of the exported ONNX files in ONNX Runtime and OpenVINO: pruned against unpruned, 1000 interleaved runs of each.

Pruned networks are loaded from the artefacts that `headline` and `curve` left, into a fresh model, by their plans: what is
timed is what a user would get. One picture at a time, on one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

import featherweight as fw
from benchmarks.comb.headline import SETTINGS
from benchmarks.comb.networks import NETWORKS
from benchmarks.comb.pages import put, table
from benchmarks.comb.results import Row, add, there
from benchmarks.comb.runs import Setting, found
from benchmarks.comb.tasks import work
from benchmarks.comb.train import dense
from benchmarks.reconstruct.data import cache
from benchmarks.results import last
from featherweight.deploy import INTEGER_RUNTIMES, session
from featherweight.measure import compare, machine_facts, time_callables

RUNS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comb.latency", description=__doc__)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["network"], row["runtime"], row["keep"]) for row in there("latency")}
    names = options.networks or list(dict.fromkeys(setting.network for setting in SETTINGS))
    for name in names:
        settings = [
            setting for setting in SETTINGS if setting.network == name and setting.keep < 1 and found([setting])
        ]
        for runtime in INTEGER_RUNTIMES:  # stock ones, which compute every zero
            if any((name, runtime, setting.keep) not in done for setting in settings):
                for row in timed(name, settings, runtime, options.runs):
                    add("latency", row)
    write()


def timed(name: str, settings: list[Setting], runtime: str, runs: int) -> list[Row]:
    """A row for the dense network and one for each pruned one, all timed side by side."""
    task = work(NETWORKS[name].task)
    x = task.example[:1]
    files = {"dense": exported(dense(name), f"dense-{name}".replace(" ", "_"), x)}
    for setting in settings:
        model = fw.load(NETWORKS[name].build(), cache() / "comb-pruned" / setting.name).eval()
        files[f"{setting.keep:g}"] = exported(model, setting.name, x)
    sessions = {key: session(file, runtime, threads=1) for key, file in files.items()}
    calls = {key: lambda opened=opened: opened(x) for key, opened in sessions.items()}
    times = time_callables(calls, threads=1, runs=runs, warmup=20)
    macs = {f"{row['keep']:g}": row["macs"] / row["dense_macs"] for row in found(settings)}
    rows = []
    for key, latency in times.items():
        against = compare(times["dense"], latency)
        rows.append(
            {
                "network": name,
                "runtime": runtime,
                "keep": 1.0 if key == "dense" else float(key),
                "macs_left": macs.get(key, 1.0),
                "mean_ms": round(float(np.mean(latency.samples_ms)), 5),
                "median_ms": round(latency.median_ms, 5),
                "p90_ms": round(latency.p90_ms, 5),
                "runs": latency.n,
                "bytes": files[key].stat().st_size,
                "ratio": round(against.ratio, 4),
                "low": round(against.low, 4),
                "high": round(against.high, 4),
                "words": against.words,
                "machine": machine_facts(),
            }
        )
    return rows


def exported(model: nn.Module, name: str, x: torch.Tensor) -> Path:
    """The ONNX file of a model, made once; featherweight compares it with the model before it is kept."""
    path = cache() / "comb-onnx" / f"{name}.onnx"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        fw.export_onnx(model, (x,), path, dynamic_batch=False)
    return path


def write() -> None:
    order = [*NETWORKS]
    latest = last(there("latency"), "network", "runtime", "keep")
    rows = sorted(latest, key=lambda row: (order.index(row["network"]), row["runtime"], -row["keep"]))
    columns = {
        "network": lambda row: row["network"],
        "runtime": lambda row: {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[row["runtime"]],
        "MACs left": lambda row: "all" if row["keep"] == 1 else f"{100 * row['macs_left']:.1f} %",
        "mean, ms": lambda row: f"{row['mean_ms']:.3f}",
        "median, ms": lambda row: f"{row['median_ms']:.3f}",
        "runs": lambda row: str(row["runs"]),
        "faster [95 %]": lambda row: (
            "–" if row["keep"] == 1 else f"{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
        ),
        "file, kB": lambda row: f"{row['bytes'] / 1000:.0f}",
    }
    put("latency", table(columns, rows))


if __name__ == "__main__":
    main()
