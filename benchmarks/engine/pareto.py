# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine.pareto prune|latency|plot [SUBJECT ...]`: what zeros cost a pretrained network, and what they gain.

`prune` makes each network's files, pruned after training and gradually, and judges them on their real data: a line of
results/pareto.jsonl each, which is skipped where it is there. `latency` times all files of a subject at batch 1, every
runtime in one run (results/pareto_latency.jsonl). `plot` draws metric over milliseconds and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import featherweight as fw
from benchmarks.engine import distilled, files, pareto_plot
from benchmarks.engine.latency import Way, in_turns, started
from benchmarks.pages import DOCS, put
from benchmarks.reconstruct.subjects import SUBJECTS, Subject, difference
from benchmarks.results import Row, add, read
from featherweight import deploy
from featherweight.measure import machine_facts

RESULTS = Path(__file__).parent / "results"
ZEROS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
# The first convolution stays dense, as in the networks of random weights: it reads one channel and is a tenth of CREPE.
DENSE = ("first",)
# ADMM with an exact refit and corrected targets: within some percent of the best solver, at a fraction of its time.
SOLVERS: dict[str, dict[str, Any]] = {
    "crepe_tiny": {"solver": "admm"},
    "minilm": {"solver": "admm"},
    "crepe_full": {"solver": "admm"},
}
METHODS = ("int8", "after training", "gradual")
SHOWN = ("subject", "method", "zeros", "metric", "change", "low", "high", "seconds", "processor_seconds")


def prune(options: argparse.Namespace) -> None:
    """The rows that are missing, one subject after the other: dense and integers, after training, gradually."""
    for name in options.subjects:
        subject = SUBJECTS[name]()
        done = {(row["subject"], row["method"], row["zeros"]) for row in read(options.results / "pareto.jsonl")}
        dense = kept_rows(subject)
        np.savez(example_file(name), *example(subject))
        for method in ("dense", *options.methods):
            for row in MADE[method](subject, dense, lambda *key, done=done: key in done, options):
                facts = {"threads": options.threads, "load_average": round(os.getloadavg()[0], 1)}
                row = {"subject": name, **row, **facts, "machine": machine_facts()}
                add(options.results / "pareto.jsonl", row)
                print(json.dumps({key: row[key] for key in SHOWN if key in row}), flush=True)


def kept_rows(subject: Subject) -> np.ndarray:
    """The dense network's answer to each test sample, kept: a network of this size takes minutes on a busy core."""
    path = file(subject.name, "dense", 0.0).with_suffix(".npy")
    if not path.exists():
        np.save(path, subject.per_sample(subject.model))
    return np.asarray(np.load(path))


def example(subject: Subject) -> list[np.ndarray[Any, Any]]:
    """One call at batch 1 of real data: a frame, or the definition of median length without its padding."""
    if subject.name != "minilm":
        return [tensor[:1].numpy() for tensor in subject.example_inputs]
    masks = [mask for batch in subject.calibration for mask in batch["attention_mask"]]
    texts = [ids for batch in subject.calibration for ids in batch["input_ids"]]
    lengths = [int(mask.sum()) for mask in masks]
    i = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
    return [tensor[None, : lengths[i]].numpy() for tensor in (texts[i], masks[i])]


def example_file(name: str) -> Path:
    return file(name, "example", 0.0).with_suffix(".npz")


Done = Callable[..., bool]


def whole(subject: Subject, dense: np.ndarray, done: Done, options: argparse.Namespace) -> Iterator[Row]:
    path = file(subject.name, "dense", 0.0)
    export(subject, subject.model, path)
    if not done(subject.name, "dense", 0.0):
        yield {"method": "dense", "zeros": 0.0, "file": path.name, **judged(subject, dense, dense)}


def integers(subject: Subject, dense: np.ndarray, done: Done, options: argparse.Namespace) -> Iterator[Row]:
    """8-bit weights and static grids between layers, the metric of the file in each runtime that computes with them."""
    path = file(subject.name, "int8", 0.0)
    if done(subject.name, "int8", 0.0):
        return
    model, begin = copy.deepcopy(subject.model), (time.perf_counter(), time.process_time())
    fw.Quantize(8, activations="static")(model, subject.task(), fw.Stage())
    took = seconds(begin)
    data = deploy.calibration_inputs(model, subject.task())
    export(subject, model, path, calibration=data)
    row = {"method": "int8", "zeros": 0.0, "file": path.name, **took}
    row |= judged(subject, dense, subject.per_sample(model))
    yield row | {"runtimes": {name: in_runtime(subject, dense, path, name) for name in ("onnxruntime", "openvino")}}


def after_training(subject: Subject, dense: np.ndarray, done: Done, options: argparse.Namespace) -> Iterator[Row]:
    """A few hundred samples without labels, each share of zeros from the dense network."""
    for share in options.zeros:
        if done(subject.name, "after training", share):
            continue
        model, begin = copy.deepcopy(subject.model), (time.perf_counter(), time.process_time())
        events: list[dict[str, Any]] = []
        how = SOLVERS[subject.name]
        fw.Reconstruct(share, dense=DENSE, **how)(model, subject.task(), fw.Stage(report=events.append))
        took = seconds(begin)
        texts = [event["text"] for event in events if event["kind"] == "message"]
        yield pruned(subject, dense, model, "after training", share) | took | {"how": how, "texts": texts}


def gradual(subject: Subject, dense: np.ndarray, done: Done, options: argparse.Namespace) -> Iterator[Row]:
    """One training through all shares, distilled from the dense network: each share goes on from what the last one left.

    Short: a share has as many steps as `distilled` says, and `seconds` are of all up to this share.
    """
    if subject.name not in distilled.WORKS:
        return
    work = distilled.WORKS[subject.name](subject)
    model, before = copy.deepcopy(subject.model), {"seconds": 0.0, "processor_seconds": 0.0, "steps": 0}
    for i, share in enumerate(options.zeros):
        path = file(subject.name, "gradual", share)
        state = path.with_suffix(".safetensors")
        if state.exists():
            model.load_state_dict(load_file(state))
            before = json.loads(path.with_suffix(".json").read_text())
        else:
            begin = (time.perf_counter(), time.process_time())
            work.train(model, share, DENSE, seed=i)
            before = {key: round(before[key] + value, 1) for key, value in seconds(begin).items()} | {
                "steps": before["steps"] + work.steps
            }
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, state)
            path.with_suffix(".json").write_text(json.dumps(before))
        if not done(subject.name, "gradual", share):
            yield pruned(subject, dense, model, "gradual", share) | before | {"how": work.words}


MADE = {"dense": whole, "int8": integers, "after training": after_training, "gradual": gradual}


def pruned(subject: Subject, dense: np.ndarray, model: nn.Module, method: str, share: float) -> Row:
    """Exports and judges; `in_layers` and `in_all` are the zeros of the layers that have some, and of all matrices."""
    path = file(subject.name, method, share)
    export(subject, model, path)
    weights = [p for p in model.parameters() if p.ndim > 1]
    zeros = [(int((p == 0).sum()), p.numel()) for p in weights]
    layers = [(none, count) for none, count in zeros if none > 0.1 * count]
    counts = {
        key: sum(n for n, _ in found) / sum(c for _, c in found)
        for key, found in (("in_layers", layers), ("in_all", zeros))
    }
    row = {"method": method, "zeros": share, "file": path.name, **counts}
    return row | judged(subject, dense, subject.per_sample(model))


def judged(subject: Subject, dense: np.ndarray, found: np.ndarray) -> Row:
    """The metric of these rows, and its paired difference from the dense network's with a 95 % interval."""
    figures = {"name": subject.metric, "metric": subject.summary(found)}
    return {**figures, "higher_is_better": subject.higher_is_better, **difference(subject, dense, found)}


def in_runtime(subject: Subject, dense: np.ndarray, path: Path, runtime: str) -> Row:
    opened = deploy.session(path, runtime, threads=1)

    def call(*inputs: Any, **named: Any) -> Any:
        return opened(*inputs, *named.values())

    return judged(subject, dense, subject.per_sample(call))


def file(name: str, method: str, share: float) -> Path:
    """Where an ONNX file of a subject lies; what it is made from and by lies beside it."""
    folder = files.folder() / "pareto"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}-{method.replace(' ', '-')}-{share:g}.onnx"


def export(subject: Subject, model: nn.Module, path: Path, **more: Any) -> None:
    """As one step, so that a run that is cut off leaves no half of a file."""
    if path.exists():
        return
    partial = path.with_suffix(".partial.onnx")
    others = deploy.other_sizes(subject.model, subject.task())
    deploy.export_onnx(model.eval(), subject.example_inputs, partial, others=others, **more)
    partial.rename(path)


def latency(options: argparse.Namespace) -> None:
    """A line a subject: every file in the engine, and in stock runtimes the dense one, the integers, and one with zeros.

    What is zero changes nothing in the stock runtimes: files of one share of zeros show it, and the time goes to the rest.
    """
    for name in options.subjects:
        with np.load(example_file(name)) as saved:
            arrays = [saved[key] for key in saved.files]
        made = {row["file"]: row for row in read(options.results / "pareto.jsonl") if row["subject"] == name}
        ways: dict[str, tuple[str, Path]] = {}
        for row in made.values():
            path = file(name, row["method"], row["zeros"])
            stock = row["zeros"] in (0.0, options.stock) and row["method"] != "gradual"
            runtimes = ("engine",) * (row["method"] != "int8") + ("onnxruntime", "openvino") * stock
            more = ("openvino_bf16",) * (row["method"] == "dense")
            ways |= {f"{runtime}: {path.name}": (runtime, path) for runtime in (*runtimes, *more)}
        starts = {way: partial(start, *each, arrays, options.threads) for way, each in ways.items()}
        with started(starts) as (processes, refused):
            told: Row = {way: {"refused": why} for way, why in refused.items()}
            for way, times in in_turns(processes, options.rounds, options.turn).items():
                told[way] = processes[way].told(expected(ways[way][1], arrays)) | times
        for way, facts in told.items():
            facts |= {"runtime": ways[way][0], "file": ways[way][1].name}
        shapes = [list(array.shape) for array in arrays]
        facts = {"threads": options.threads, "load_average": round(os.getloadavg()[0], 1)}
        row = {"subject": name, "inputs": shapes, "ways": [*told.values()], **facts, "machine": machine_facts()}
        add(options.results / "pareto_latency.jsonl", row)
        for way in row["ways"]:
            print(f"{way['runtime']:14} {way['file']:40} {way.get('median_ms', way.get('refused'))}", flush=True)


def start(runtime: str, path: Path, arrays: list[np.ndarray[Any, Any]], threads: int, room: Path) -> Way:
    return Way(runtime, path, arrays, threads, room)


def expected(path: Path, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """What ONNX Runtime answers."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # of what it merges on the way it says much that nobody can use
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    keys = [each.name for each in opened.get_inputs()]
    return list(opened.run(None, dict(zip(keys, arrays, strict=True))))


def plot(options: argparse.Namespace) -> None:
    """The picture, and the table between its marks in docs/engine.md where the page has them."""
    rows, timed = (read(options.results / f"{kind}.jsonl") for kind in ("pareto", "pareto_latency"))
    found = [pareto_plot.Panel.of(name, rows, timed) for name in options.subjects]
    panels = [panel for panel in found if panel is not None]
    if not panels:
        raise SystemExit("Nothing to draw: `latency` has timed no subject that `prune` has a row of.")
    path = pareto_plot.draw(panels, options.docs / "img" / "engine-pareto.png")
    body = pareto_plot.table(panels)
    put("pareto", body, options.docs / "engine.md")
    print(body, path, sep="\n")


def seconds(begin: tuple[float, float]) -> dict[str, float]:
    return {
        "seconds": round(time.perf_counter() - begin[0], 1),
        "processor_seconds": round(time.process_time() - begin[1], 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.pareto", description=__doc__)
    parser.add_argument("action", choices=[*ACTIONS])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SOLVERS))
    parser.add_argument("--zeros", type=float, nargs="+", default=[*ZEROS])
    parser.add_argument("--methods", nargs="*", default=[*METHODS], metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--threads", type=int, help="default: one to prune, all of them for latency")
    parser.add_argument("--stock", type=float, default=0.9, help="the share of zeros that stock runtimes are timed at")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=float, default=100, help="milliseconds of one runtime's turn")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.subjects = options.subjects or [*SOLVERS]
    options.threads = options.threads or (len(os.sched_getaffinity(0)) if options.action == "latency" else 1)
    torch.set_num_threads(options.threads)
    ACTIONS[options.action](options)


ACTIONS = {"prune": prune, "latency": latency, "plot": plot}

if __name__ == "__main__":
    main()
