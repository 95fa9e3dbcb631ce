# SPDX-License-Identifier: Apache-2.0
"""Pretrained networks in fewer bits, without training: metric, bytes of the file, and milliseconds in both runtimes.

The networks, their calibration samples and their metrics are those of `benchmarks.reconstruct.subjects`. `weights` rounds
weights alone, `integers` what layers read too, as static or dynamic grids: the metric in PyTorch and of the exported file
in each runtime on the same test samples, and its time beside the float32 file's, interleaved in one run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import featherweight as fw
from benchmarks.reconstruct.subjects import SUBJECTS, Subject, difference
from benchmarks.results import Row, add, read
from featherweight import deploy, measure
from featherweight.deploy import INTEGER_RUNTIMES, calibration_inputs, session
from featherweight.errors import FeatherweightError

RESULTS = Path(__file__).parent / "results"
BITS = (8, 6, 4, 3, 2)
Recipe = Callable[[int], list[Any]]
ROUNDINGS: dict[str, Recipe] = {
    "nearest": lambda bits: [fw.Quantize(bits)],
    # Embeddings, which Reconstruct leaves alone, are rounded by what comes after it; what is on a grid stays there.
    "GPTQ": lambda bits: [
        fw.Reconstruct(bits=bits, symmetric=True, solver="gptq", samples=512),
        fw.Quantize(bits),
    ],
}
READINGS = ("static", "dynamic")
# The margin of half a point is narrower than the interval of 1000 nouns.
LARGER: dict[str, dict[str, int]] = {"minilm": {"pools": 5}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.networks", description=__doc__)
    parser.add_argument("experiment", choices=[*EXPERIMENTS])
    parser.add_argument("subjects", nargs="*", metavar="NETWORK", help=", ".join(SUBJECTS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the runtimes when timed")
    parser.add_argument("--runs", type=int, default=50, help="calls of each file that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / f"{options.experiment}.jsonl"
    done = {(row["subject"], row["way"], row["bits"]) for row in read(path)}
    for row in EXPERIMENTS[options.experiment](options, done):
        row |= {"load_average": round(os.getloadavg()[0], 1), "machine": measure.machine_facts()}
        add(path, row)
        print(json.dumps(row), flush=True)


def weights(options: argparse.Namespace, done: set[tuple[str, str, int]]) -> Iterator[Row]:
    """Weights alone: one row a network, rounding and number of bits."""
    for name in options.subjects or SUBJECTS:
        wanted = [pair for pair in itertools.product(ROUNDINGS, BITS) if (name, *pair) not in done]
        if not wanted:
            continue
        subject = SUBJECTS[name]()
        dense = subject.per_sample(subject.model)
        for way, bits in wanted:
            model, plan, seconds = quantized(subject, ROUNDINGS[way](bits))
            row = {"subject": name, "way": way, "bits": bits, "seconds": seconds, **sizes(model, plan)}
            yield row | judged(subject, dense, model)


def integers(options: argparse.Namespace, done: set[tuple[str, str, int]]) -> Iterator[Row]:
    """Weights and what layers read, 8 bits: one row a network and way."""
    for name in options.subjects or SUBJECTS:
        wanted = [way for way in READINGS if (name, way, 8) not in done]
        if not wanted:
            continue
        subject = SUBJECTS[name](**LARGER.get(name, {}))
        dense = subject.per_sample(subject.model)
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "dense.onnx"
            others = deploy.other_sizes(subject.model, subject.task())
            deploy.export_onnx(subject.model, subject.example_inputs, whole, others=others)
            for way in wanted:
                model, plan, seconds = quantized(subject, [fw.Quantize(8, activations=way)])
                small = Path(folder) / f"{way}.onnx"
                data = calibration_inputs(model, subject.task())
                made = deploy.export_onnx(model, subject.example_inputs, small, calibration=data, others=others)
                row = {"subject": name, "way": way, "bits": 8, "seconds": seconds, **sizes(model, plan)}
                row |= {"notes": list(made.notes), "integers": made.integers.words if made.integers else ""}
                row |= judged(subject, dense, model)
                yield row | {"runtimes": in_runtimes(subject, dense, whole, small, options)}


def quantized(subject: Subject, recipe: list[Any]) -> tuple[nn.Module, fw.Plan, float]:
    model, plan = copy.deepcopy(subject.model), fw.Plan()
    start = time.perf_counter()
    for method in recipe:
        plan += method(model, subject.task(), fw.Stage())
    return model.eval(), plan, round(time.perf_counter() - start, 1)


def sizes(model: nn.Module, plan: fw.Plan) -> Row:
    """Bytes of the dense tensors and of the packed file, header and all."""
    with tempfile.TemporaryDirectory() as folder:
        fw.save(model, plan, f"{folder}/run")
        file = (Path(folder) / "run" / "model.safetensors").stat().st_size
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return {"dense_bytes": sum(t.numel() * t.element_size() for t in tensors.values()), "file_bytes": file}


def judged(subject: Subject, dense: Any, model: Any) -> Row:
    found = subject.per_sample(model)
    figures = {"metric": subject.metric, "dense": subject.summary(dense), "quantized": subject.summary(found)}
    return {**figures, "higher_is_better": subject.higher_is_better, **difference(subject, dense, found)}


def in_runtimes(subject: Subject, dense: Any, whole: Path, small: Path, options: argparse.Namespace) -> Row:
    """By runtime: the metric of the file with integers, and the time of one call of it and of the float32 file; or why not."""
    told: Row = {}
    for name in INTEGER_RUNTIMES:
        try:
            one, other = (session(path, name, threads=options.threads) for path in (whole, small))
        except FeatherweightError as error:
            told[name] = {"error": f"{name}: {error}"[:300]}
            continue
        timed = measure.time_callables(
            {"float32": _call(one, subject), "integers": _call(other, subject)},
            threads=options.threads, batch=1, runs=options.runs,
        )  # fmt: skip
        compared = measure.compare(timed["float32"], timed["integers"])
        told[name] = {
            **_judged_in(name, subject, dense, other),
            "float32_ms": timed["float32"].median_ms,
            "integers_ms": timed["integers"].median_ms,
            "comparison": compared.to_dict(),
            "form": deploy.form_in(small, name).words,
            "bytes": [whole.stat().st_size, small.stat().st_size],
        }
    return told


def _judged_in(runtime: str, subject: Subject, dense: Any, opened: Any) -> Row:
    """The metric in a runtime, or why there is none: a file may take no other lengths than the example's."""
    try:
        return judged(subject, dense, opened)
    except FeatherweightError as error:
        return {"error": f"{runtime}: {error}"[:300]}


def _call(opened: Any, subject: Subject) -> Callable[[], Any]:
    return lambda: opened(*subject.example_inputs)


EXPERIMENTS = {"weights": weights, "integers": integers}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
