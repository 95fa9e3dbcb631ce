# SPDX-License-Identifier: Apache-2.0
"""Whole networks, compressed after training: `python -m benchmarks.reconstruct.networks EXPERIMENT [SUBJECT ...]`.

metric: the user's figure and the error of the outputs, for every method at every sparsity, pattern and number of bits.
cost: minutes and peak memory of pruning a whole network to 75 % zeros. training: after training against gradual pruning
with fine-tuning, at equal sparsity. flops: 2, 3 and 4 times fewer MACs, by profiles from the database. order: independent, sequential and
corrected targets. Each run is a line of results/EXPERIMENT.jsonl, written as it ends: an experiment
that was stopped goes on, and one that is whole is only printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import featherweight as fw
from benchmarks.reconstruct.subjects import COSTS, SUBJECTS, Subject, difference
from benchmarks.results import Row, add, read
from featherweight.correct import correct, output_error
from featherweight.reconstruct import Contents, Database, Entry, build_database, stitch, uniform, within

RESULTS = Path(__file__).parent / "results"
CORRECTED = {"targets": "corrected", "correct": ("batch_norm", "moments", "bias")}
ALONE = {"targets": "independent", "correct": ("batch_norm", "moments", "bias")}
# Every method gets the same corrections afterwards; the paper's methods solve layers independently, as it does.
PRUNE = {
    "magnitude": {"solver": "magnitude", **ALONE},
    "AdaPrune-like": {"solver": "magnitude+refit", **ALONE},
    "SparseGPT": {"solver": "sparsegpt", **ALONE},
    "ExactOBS": {"solver": "exact_obs", **ALONE},
    "ours, independent": {"solver": "best", **ALONE},
    "ours": {"solver": "best", **CORRECTED},
}
ROUND = {
    "nearest": {"solver": "nearest", **ALONE},
    "GPTQ": {"solver": "gptq", **ALONE},
    "OBQ": {"solver": "obq", **ALONE},
    "AdaRound": {"solver": "adaround", **ALONE},
    "ours, independent": {"solver": "best", **ALONE},
    "ours": {"solver": "best", **CORRECTED},
}
TILES = [name for name in PRUNE if name != "SparseGPT"]
CASES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    **{f"{share:.0%}": ({"sparsity": share}, PRUNE) for share in (0.5, 0.7, 0.8, 0.9)},
    **{pattern: ({"pattern": pattern}, PRUNE) for pattern in ("2:4", "4:8")},
    "1x4 50%": ({"pattern": "1x4", "sparsity": 0.5}, {name: PRUNE[name] for name in TILES}),
    **{f"{bits} bit": ({"bits": bits}, ROUND) for bits in (4, 3, 2)},
    "2:4, 4 bit": ({"pattern": "2:4", "bits": 4}, {name: ROUND[name] for name in ("ours, independent", "ours")}),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reconstruct.networks", description=__doc__)
    parser.add_argument("experiment", choices=[*EXPERIMENTS])
    parser.add_argument("subjects", nargs="*")
    parser.add_argument(
        "--cases", nargs="*", default=[*CASES], metavar="CASE", help=", ".join(CASES).replace("%", "%%")
    )
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="default: all of a case")
    parser.add_argument("--work", type=float, default=1000.0, help="1e9 multiply-adds that a search may take a layer")
    parser.add_argument("--memory", default="2 GB")
    parser.add_argument("--solver", default="admm", help="of cost")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.results / f"{options.experiment}.jsonl"
    for row in EXPERIMENTS[options.experiment](options, read(path)):
        row |= {"threads": options.threads, "load_average": round(os.getloadavg()[0], 1)}
        add(path, row)
        print(json.dumps(row), flush=True)


def metric(options: argparse.Namespace, there: list[Row]) -> Iterator[Row]:
    """One row a subject, case and method; samples that the outputs are compared on were in nobody's calibration."""
    done = {(row["subject"], row["case"], row["method"]) for row in there}
    for name in options.subjects or SUBJECTS:
        subject = SUBJECTS[name]()
        aside = max(1, len(subject.calibration) // 5)
        calibration, unseen = subject.calibration[:-aside], subject.calibration[-aside:]
        dense = subject.per_sample(subject.model)
        if (name, "dense", "dense") not in done:
            row = {"subject": name, "case": "dense", "method": "dense", "metric": subject.summary(dense)}
            yield row | {"name": subject.metric, "n": len(dense)}
        for case in options.cases:
            asked, methods = CASES[case]
            for method, how in methods.items():
                if (name, case, method) in done or (options.methods and method not in options.methods):
                    continue
                work = {"work": options.work, "memory": options.memory}
                model, row = compressed(subject, calibration, fw.Reconstruct(**asked, **how, **work))
                found = subject.per_sample(model)
                row["output_error"] = output_error(model, subject.model, unseen, subject.forward)
                row |= {"metric": subject.summary(found), **difference(subject, dense, found)}
                yield {"subject": name, "case": case, "method": method, **row}


def order(options: argparse.Namespace, there: list[Row]) -> Iterator[Row]:
    """What the walk's targets are worth: the same solver, with and without what corrects the network afterwards."""
    done = {(row["subject"], row["case"], row["method"]) for row in there}
    ways = {
        f"{targets}{', corrections after' if after else ''}": {"targets": targets, "correct": after}
        for after in ((), CORRECTED["correct"])
        for targets in ("independent", "sequential", "corrected")
    }
    for name in options.subjects or SUBJECTS:
        subject = SUBJECTS[name]()
        aside = max(1, len(subject.calibration) // 5)
        calibration, unseen = subject.calibration[:-aside], subject.calibration[-aside:]
        for case in options.cases:
            asked, _ = CASES[case]
            for method, how in ways.items():
                if (name, case, method) in done or (options.methods and method not in options.methods):
                    continue
                work = {"work": options.work, "memory": options.memory}
                model, row = compressed(subject, calibration, fw.Reconstruct(**asked, **how, **work))
                row["output_error"] = output_error(model, subject.model, unseen, subject.forward)
                row["metric"] = subject.evaluate(model)
                yield {"subject": name, "case": case, "method": method, **row}


def compressed(subject: Subject, calibration: list[Any], method: fw.Reconstruct) -> tuple[nn.Module, Row]:
    """The compressed copy, what it took, and the layers' errors."""
    task = fw.Task(subject.model, subject.example_inputs, calibration=calibration, forward=subject.forward)
    model, events = copy.deepcopy(subject.model), []
    start, before = time.perf_counter(), time.process_time()
    method(model, task, fw.Stage(report=events.append))
    seconds, processor = time.perf_counter() - start, time.process_time() - before
    layers = [event["layer"] for event in events if event["kind"] == "layer"]
    weights = [p for p in model.parameters() if p.ndim > 1]
    return model, {
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "solver_seconds": round(sum(layer["seconds"] for layer in layers), 1),
        "zeros": sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights),
        "layers": len(layers),
        "layer_errors": {layer["name"]: float(f"{layer['error']:.4g}") for layer in layers},
        "layer_shapes": {layer["name"]: [layer["rows"], layer["d"]] for layer in layers},
        "layer_solvers": {layer["name"]: layer["solver"] for layer in layers},
        "texts": [event["text"] for event in events if event["kind"] == "message"],
    }


def flops(options: argparse.Namespace, there: list[Row]) -> Iterator[Row]:
    """2, 3 and 4 times fewer MACs of all layers, as the paper counts: profiles from a database, and how they are realised."""
    for name in options.subjects or ["resnet"]:
        subject = SUBJECTS[name]()
        calibration, forward = subject.calibration, subject.forward
        dense = subject.per_sample(subject.model)
        model = copy.deepcopy(subject.model)
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            held_out = calibration[-len(calibration) // 5 :]
            contents = Contents(patterns=("weight",), bits=(), joint=())
            fit = calibration[: -len(held_out)]
            database = build_database(model, fit, forward, folder, contents, held_out=held_out)
            stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            built = time.process_time() - start
            for times in (2, 3, 4):
                wanted = _profiles(database, times)
                for method, choice in wanted.items():
                    if any((r["subject"], r["case"], r["method"]) == (name, f"{times}x", method) for r in there):
                        continue
                    share = sum(entry.macs for entry in choice.values()) / database.macs
                    shares = {entry.problem: entry.sparsity for entry in choice.values() if entry.kind != "dense"}
                    candidate = copy.deepcopy(subject.model)
                    if method.endswith("stitched"):
                        stitch(database, candidate, choice, fit, forward)
                        correct(candidate, subject.model, fit, held_out, forward, ("batch_norm", "moments", "bias"))
                    else:
                        solver = "magnitude" if method.startswith("magnitude") else "best"
                        how = ALONE if solver == "magnitude" else CORRECTED
                        method_ = fw.Reconstruct(shares, layers=list(shares), solver=solver, work=options.work, **how)
                        candidate, _ = compressed(subject, calibration, method_)
                    found = subject.per_sample(candidate)
                    row = {"subject": name, "case": f"{times}x", "method": method, "macs": share}
                    row |= {"built_processor_seconds": round(built, 1), "database_bytes": stored}
                    yield row | {"metric": subject.summary(found), **difference(subject, dense, found)}


def _profiles(database: Database, times: int) -> dict[str, Mapping[str, Entry]]:
    best = within(database, 1 / times).choice
    same = min(
        (
            uniform(database, "weight", entry.asked).choice
            for entry in next(iter(database.layers.values())).entries
            if entry.asked
        ),
        key=lambda choice: abs(sum(entry.macs for entry in choice.values()) / database.macs - 1 / times),
    )
    return {
        "magnitude, uniform": same,
        "uniform, corrected walk": same,
        "profile, stitched": best,
        "profile, corrected walk": best,
    }


def cost(options: argparse.Namespace, there: list[Row]) -> Iterator[Row]:
    """A whole network to 75 % zeros: minutes and the peak of resident memory, the network and its data included."""
    for name in options.subjects or [*COSTS, "crepe_full"]:
        if any((row["subject"], row["solver"]) == (name, options.solver) for row in there):
            continue
        subject = (COSTS | SUBJECTS)[name]()
        start = peak_bytes()
        method = fw.Reconstruct(0.75, targets="independent", correct=(), solver=options.solver, memory=options.memory)
        _, row = compressed(subject, subject.calibration, method)
        yield {
            "subject": name,
            "solver": options.solver,
            **row,
            "peak_bytes": peak_bytes(),
            "peak_bytes_before": start,
            "memory": options.memory,
        }


def training(options: argparse.Namespace, there: list[Row]) -> Iterator[Row]:
    """The ResNet at 80 and 90 %: from 400 images without labels, and by gradual pruning on all of the training data."""
    from benchmarks.gradual import data as fashion

    subject, split = SUBJECTS["resnet"](), fashion.load().train
    dense = subject.per_sample(subject.model)

    def loss(scores: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(scores, batch[1])

    images = torch.utils.data.TensorDataset(fashion.as_input(split.images), split.labels)
    loader = torch.utils.data.DataLoader(images, batch_size=128, shuffle=True, drop_last=True)
    task = fw.Task(subject.model, subject.example_inputs, train=loader, calibration=subject.calibration, loss=loss)
    for share in (0.8, 0.9):
        steps = 2 * len(loader)
        gradual = fw.GradualPruning(share, begin=0, end=steps // 2, every=50, dense=())
        ways: dict[str, Callable[[], Any]] = {
            "after training, independent": lambda share=share: fw.Reconstruct(share, **ALONE),
            "after training": lambda share=share: fw.Reconstruct(share, **CORRECTED),
            "gradual, 2 epochs": lambda steps=steps, hook=gradual: fw.Train(
                steps=steps, optimizer="sgd", lr=0.02, hooks=[hook]
            ),
        }
        for way, make in ways.items():
            if any((row["case"], row["method"]) == (share, way) for row in there):
                continue
            model = copy.deepcopy(subject.model)
            start, before = time.perf_counter(), time.process_time()
            make()(model, task, fw.Stage())
            took = {"seconds": round(time.perf_counter() - start, 1)}
            took["processor_seconds"] = round(time.process_time() - before, 1)
            found = subject.per_sample(model.eval())
            yield {"case": share, "method": way, "metric": subject.summary(found), **took} | difference(
                subject, dense, found
            )


def peak_bytes() -> int:
    """The most that this process has held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


EXPERIMENTS: dict[str, Callable[[argparse.Namespace, list[Row]], Iterator[Row]]] = {
    "metric": metric,
    "cost": cost,
    "training": training,
    "flops": flops,
    "order": order,
}

if __name__ == "__main__":
    main()
