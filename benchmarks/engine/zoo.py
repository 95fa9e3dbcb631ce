# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine.zoo [LABEL ...]`: every network of the zoo and of the benchmark, in the engine and in ONNX Runtime.

Each is exported once, and run as it is and with 80 % of its layers' weights at zero (those of the benchmark with as many
zeros as they are timed with); where the file leaves the batch
open, at another batch too. A line of results/zoo.jsonl is one network: what the engine runs itself, what it hands over
and why, and the largest difference, over the largest value of the same output. docs/engine.md has them as a table.
Networks that have a line already are run again where they are named, or all of them with --again. A crash ends it, and
the network that crashed has no line: it is the next one to run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tests.zoo.architectures import architectures, find
from torch import nn

from benchmarks.engine import files
from benchmarks.engine.networks import NETWORKS
from benchmarks.pages import DOCS, put, table
from benchmarks.results import read

RESULTS = Path(__file__).parent / "results" / "zoo.jsonl"
TOLERANCE = 1e-4
ZEROS = 0.8
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}

Arrays = dict[str, np.ndarray]
Facts = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.zoo", description=__doc__)
    parser.add_argument("labels", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {"TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    everything = [each.label for each in architectures()] + [f"benchmark {name}" for name in NETWORKS]
    lines = {facts["network"]: facts for facts in read(RESULTS)}
    todo = options.labels or [label for label in everything if options.again or label not in lines]
    for label in todo:
        start = time.perf_counter()
        lines[label] = facts = {"network": label, **_compared(label, options.threads)}
        _write([lines[label] for label in everything if label in lines])
        print(f"{label:28} {_words(facts)}  {time.perf_counter() - start:.0f} s", flush=True)


def _words(facts: Facts) -> str:
    if "failed" in facts:
        return str(facts["failed"])
    return f"{facts['error']:.1e} {'whole' if facts['whole'] else facts['handed_over']}"


def _compared(label: str, threads: int) -> Facts:
    try:
        if label.startswith("benchmark "):
            return _compare_benchmark(label.removeprefix("benchmark "), threads)
        return compare(*stored(label), threads)
    except Exception as error:
        told = re.sub(r"/\S*/site-packages/", "", " ".join(str(error).split()))  # where this machine keeps packages
        return {"failed": f"{type(error).__name__}: {told[:300]}"}


def _compare_benchmark(name: str, threads: int) -> Facts:
    network, model = NETWORKS[name], onnx.load(files.plain(name, NETWORKS[name].sparsities[-1]))
    arrays = dict(zip([value.name for value in model.graph.input], (x.numpy() for x in network.inputs(1)), strict=True))
    return compare(model, arrays, threads, network.sparsities[-1:])


def stored(label: str) -> tuple[onnx.ModelProto, Arrays]:
    """A network's graph and one call's arrays, exported the first time."""
    folder = files.folder() / "zoo"
    folder.mkdir(exist_ok=True)
    path, arrays = folder / f"{label}.onnx", folder / f"{label}.npz"
    if not arrays.exists():
        _export(label, path, arrays)
    with np.load(arrays) as archive:
        return onnx.load(path), dict(archive)


def _export(label: str, path: Path, arrays: Path) -> None:
    from featherweight.deploy import export_onnx
    from featherweight.deploy.sessions import flatten_inputs

    model, inputs = find(label).make()
    if isinstance(inputs, dict):
        model, inputs = _Positional(model, tuple(inputs)), tuple(inputs.values())
    written = export_onnx(model, inputs, path)
    names = [value.name for value in onnx.load(written.path, load_external_data=False).graph.input]
    np.savez(arrays, **{name: leaf.numpy() for name, leaf in zip(names, flatten_inputs(inputs), strict=True)})


class _Positional(nn.Module):
    """The exporter takes inputs by position."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Any) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)))


def compare(model: onnx.ModelProto, inputs: Arrays, threads: int, shares: Sequence[float] = (0.0, ZEROS)) -> Facts:
    """The engine's answers beside ONNX Runtime's, dense and with zeros, at the example's batch and at another."""
    from featherweight.runtime import load, open_onnxruntime

    facts: Facts = {"nodes": len(model.graph.node), "differences": {}}
    for zeros in shares:
        if zeros:
            _prune(model, zeros)
        stock = open_onnxruntime(model.SerializeToString(), threads)
        names = [value.name for value in stock.get_outputs()]
        with load(model.SerializeToString(), threads) as engine:
            for arrays in _batches(model, inputs):
                try:
                    expected = dict(zip(names, stock.run(names, arrays), strict=True))
                except Exception:
                    if arrays is inputs:
                        raise
                    continue  # the file says that the batch is open, and its graph that it is not
                found = engine.run(arrays)
                batch = next(iter(arrays.values())).shape[:1]
                facts["differences"][f"{zeros:.0%} zeros, batch {batch[0] if batch else 1}"] = _difference(
                    found, expected
                )
            facts |= {
                "whole": engine.whole,
                "handed_over": {why: dict(Counter(ops)) for why, ops in engine.handed_over.items()},
            }
    return facts | {"error": max(facts["differences"].values())}


def _batches(model: onnx.ModelProto, inputs: Arrays) -> list[Arrays]:
    dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    open_ones = [name for name in inputs if dims[name] and dims[name][0].dim_param]
    if not open_ones:
        return [inputs]
    return [inputs, inputs | {name: np.concatenate([inputs[name], inputs[name][:1]]) for name in open_ones}]


def _prune(model: onnx.ModelProto, zeros: float) -> None:
    """Takes the smallest weights out of each tensor that a layer multiplies with."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {name for node in model.graph.node if node.op_type in _LAYERS for name in node.input[:2]} & weights.keys()
    for name in read:
        array = onnx.numpy_helper.to_array(weights[name]).copy()
        if array.ndim >= 2 and array.dtype == np.float32:
            array.reshape(-1)[np.abs(array).reshape(-1).argsort()[: int(zeros * array.size)]] = 0
            weights[name].CopyFrom(onnx.numpy_helper.from_array(array, name))


def _difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    if list(found) != list(expected):
        return float("inf")
    worst = 0.0
    for name, want in expected.items():
        have = found[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            return float("inf")
        if want.dtype.kind != "f" or not want.size:
            worst = max(worst, 0.0 if np.array_equal(have, want) else float("inf"))
            continue
        finite = np.isfinite(want)
        if not np.array_equal(have[~finite], want[~finite], equal_nan=True):
            return float("inf")
        largest = float(np.abs(want[finite]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(have[finite] - want[finite]).max(initial=0.0)) / largest)
    return worst


def _write(lines: list[Facts]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(f"{json.dumps(facts)}\n" for facts in lines), encoding="utf-8")
    put("zoo", page(lines), DOCS / "engine.md")


def page(lines: list[Facts]) -> str:
    """The goal, and a row for each network that is not wholly the engine's own."""
    exported = [facts for facts in lines if not facts.get("failed", "").startswith("ExportError")]
    told = [facts for facts in exported if "failed" not in facts]
    whole = [facts for facts in told if facts["whole"]]
    close = [facts for facts in told if facts["error"] <= TOLERANCE]
    largest = max(told, key=lambda facts: facts["error"])
    said = [
        f"{len(exported)} networks ({len(lines) - len(exported)} more do not export): {len(whole)} wholly in the engine, "
        f"{len(told) - len(whole)} split; {len(close)} within {TOLERANCE:g} of ONNX Runtime, the largest difference "
        f"{largest['error']:.1e} ({largest['network']}).",
        *(f"Not run: {facts['network']} ({facts['failed']})." for facts in exported if "failed" in facts),
    ]
    rows = [[str(len(whole)), "none", f"{max((facts['error'] for facts in whole), default=0.0):.1e}"]]
    groups: dict[str, list[Facts]] = {}
    for facts in told:
        reasons = {why: ops for why, ops in facts["handed_over"].items() if "matrix product" not in why}
        listed = "; ".join(f"{', '.join(sorted(ops))}: {why}" for why, ops in reasons.items()).replace("|", "/")
        if not facts["whole"]:
            groups.setdefault(listed, []).append(facts)
    for listed, alike in sorted(groups.items(), key=lambda group: -len(group[1])):
        names = ", ".join(facts["network"] for facts in alike)
        rows.append([names, listed, f"{max(facts['error'] for facts in alike):.1e}"])
    return "\n".join([*said, "", table(["networks", "nodes in ONNX Runtime, and why", "largest difference"], rows)])


if __name__ == "__main__":
    main()
