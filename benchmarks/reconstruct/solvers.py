# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.reconstruct.solvers EXPERIMENT`: solvers on single layers; prints a table.

pruning, quantization, joint: the error ||(W - V) X||² / ||W X||² of solvers on layers, on the samples that they were solved
on and on others, and the seconds that they took. `best` is the whole search, baselines included. Layers are of a small
network on digits and synthetic, or with `--network` of a real one, those with rows d³ up to 1e13. Each is a line of
results/EXPERIMENT.jsonl, written as it ends: what is there is not solved again. The others write results/EXPERIMENT.json:
speed: ExactOBS against the reference's form, a loop of in-place rank-1 updates. cost: seconds and bytes against rows and d.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.pages import table
from benchmarks.reconstruct.layers import Layer, digits_layers, network_layers, synthetic_layer
from benchmarks.results import Row, add, read
from featherweight.grids import GridSpec
from featherweight.solvers import (
    PRUNERS,
    QUANTIZERS,
    damp,
    eliminate,
    layer_loss,
    prune,
    prune_and_quantize,
    quantize,
    units_of,
)

RESULTS = Path(__file__).parent / "results"
SPARSE: list[tuple[str, float | None]] = [("weight", sparsity) for sparsity in (0.5, 0.7, 0.8, 0.9)]
NOTHING = 1e-12  # of ||W X||²
SMALL = "digits network and synthetic layers"
Run = tuple[str, str, Callable[[], Any]]  # case, solver, what solves


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reconstruct.solvers", description=__doc__)
    parser.add_argument("experiment", choices=[*LAYERS, *WHOLE])
    parser.add_argument("--network", help="a subject's name: its layers instead of the small ones")
    parser.add_argument("--layers", nargs="*", default=["*"], metavar="GLOB", help="of the network's weights, by name")
    parser.add_argument("--solvers", nargs="*", metavar="NAME", help="default: all that there are, and best")
    parser.add_argument("--cases", nargs="*", metavar="CASE", help="default: all; `weight 50%%` or `3 bit`, say")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3, help="of speed; its runs are interleaved, medians are given")
    parser.add_argument("--d", type=int, default=1152, help="inputs, for speed")
    parser.add_argument("--rows", type=int, default=32, help="rows, for speed")
    parser.add_argument("--bytes", type=int, default=1 << 30, help="byte budget of the solvers")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.experiment in LAYERS:
        layers(options)
    else:
        whole(options)


def whole(options: argparse.Namespace) -> None:
    """speed and cost: one run, one file."""
    start = time.perf_counter()
    found = WHOLE[options.experiment](options)
    facts = {
        "command": f"python -m benchmarks.reconstruct.solvers {options.experiment}",
        "threads": options.threads,
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(time.perf_counter() - start, 1),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.experiment}.json"
    path.write_text(json.dumps({"facts": facts, "results": found}, indent=1))
    print(path)


def layers(options: argparse.Namespace) -> None:
    """pruning, quantization and joint: a row a layer, case and solver."""
    path = options.results / f"{options.experiment}.jsonl"
    runs, base, claimed = LAYERS[options.experiment]
    done = {(row["layer"], row["case"], row["solver"]) for row in read(path)}
    for layer in _layers(options):
        for case, solver, solve in runs(layer, options):
            if (layer.name, case, solver) not in done and (options.cases is None or case in options.cases):
                row = {"network": options.network or SMALL, **_measured(layer, case, solver, solve)}
                add(path, row | {"threads": options.threads, "load_average": round(os.getloadavg()[0], 2)})
        print(layer.name, flush=True)
    found = [row for row in read(path) if row["network"] == (options.network or SMALL)]
    _table(found, base)
    _claim(found, base, claimed)


def pruning(layer: Layer, options: argparse.Namespace) -> Iterator[Run]:
    """Pruners at every sparsity and pattern, against exact_obs."""
    for pattern, sparsity in [*SPARSE, ("2:4", None), ("4:8", None), ("1:4", None), ("1x4", 0.5), ("1x4", 0.8)]:
        solve = functools.partial(prune, layer.W, layer.H, pattern, sparsity, run=layer.run)
        for name in options.solvers or [*PRUNERS, "best"]:
            if pattern != "1x4" or name == "best" or PRUNERS[name].tiles:
                yield _case(pattern, sparsity), name, functools.partial(solve, solver=name)


def quantization(layer: Layer, options: argparse.Namespace) -> Iterator[Run]:
    """Quantizers at 2, 3 and 4 bits, against obq, on asymmetric per-channel grids, a symmetric one and chunks of 32."""
    specs = {f"{bits} bit": GridSpec(bits) for bits in (2, 3, 4)}
    specs |= {"3 bit symmetric": GridSpec(3, symmetric=True), "3 bit chunks of 32": GridSpec(3, chunk=32)}
    for case, spec in specs.items():
        for name in options.solvers or [*QUANTIZERS, "best"]:
            yield case, name, functools.partial(quantize, layer.W, layer.H, spec, solver=name)


def joint(layer: Layer, options: argparse.Namespace) -> Iterator[Run]:
    """Zeros and 4 bits together, against one after the other: ExactOBS and OBQ with and without refit between them."""
    cases: list[tuple[str, float | None]] = [("2:4", None), ("weight", 0.5), ("weight", 0.8), ("1x4", 0.5)]
    for case in cases:
        for name, solve in _ways(layer, *case).items():
            yield f"{_case(*case)}, 4 bit", name, solve


def _ways(layer: Layer, pattern: str, sparsity: float | None) -> dict[str, Callable[[], Any]]:
    spec = GridSpec(4)
    zeros = functools.partial(prune, layer.W, layer.H, pattern, sparsity, run=layer.run, solver="exact_obs")
    return {
        "prune, obq": lambda: quantize(layer.W.masked_fill(zeros().pruned, 0.0), layer.H, spec, solver="obq"),
        "prune, refit, obq": lambda: quantize(zeros().weights, layer.H, spec, solver="obq"),
        "together": lambda: prune_and_quantize(layer.W, layer.H, spec, pattern, sparsity, run=layer.run),
    }


def speed(options: argparse.Namespace) -> list[Row]:
    """Seconds and peak bytes of ExactOBS on one layer: ours, and the loop, in float32 (the reference's) and float64."""
    layer = synthetic_layer(options.rows, options.d)
    inverse = damp(layer.H).inverse
    single = layer.W.float(), inverse.float()
    units = units_of("weight", *layer.W.shape)
    runs: dict[str, Callable[[], Tensor]] = {
        "lazy, float64": lambda: eliminate(layer.W, inverse, units, budget_bytes=options.bytes).order,
        "loop, float64": lambda: rank_one_loop(layer.W, inverse),
        "lazy, float32": lambda: eliminate(*single, units, budget_bytes=options.bytes).order,
        "loop, float32": lambda: rank_one_loop(*single),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    grown, order = dict.fromkeys(runs, 0), dict[str, Tensor]()
    for _ in range(options.repeats):
        for name, run in runs.items():
            with Peak() as peak:
                start, before = time.perf_counter(), time.process_time()
                order[name] = run().int()
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - before)
            grown[name] = max(grown[name], peak.grown)
    found = []
    for name in runs:
        dtype = name.split(", ")[1]
        row = {
            "run": name,
            "rows": options.rows,
            "d": options.d,
            "seconds": [round(one, 2) for one in seconds[name]],
            "processor_seconds": [round(one, 2) for one in processor[name]],
            "peak_grew_bytes": grown[name],
            "times_lazy": _over(seconds[name], seconds[f"lazy, {dtype}"]),
            # Of threads together; other work on the machine disturbs it less.
            "times_lazy_by_processor": _over(processor[name], processor[f"lazy, {dtype}"]),
            # In float32 the two round differently, and a close call may go either way.
            "same_order": bool(torch.equal(order[name], order[f"lazy, {dtype}"])),
            "same_as_float64": float((order[name] == order["lazy, float64"]).double().mean()),
        }
        found.append(row)
        print(
            f"{name:16} {statistics.median(seconds[name]):8.2f} s, {row['times_lazy']:5.1f} times lazy "
            f"({row['times_lazy_by_processor']:.1f} by processor seconds), "
            f"peak +{grown[name] / 2**20:6.0f} MiB, same order: {row['same_order']}"
        )
    return found


def _over(some: list[float], others: list[float]) -> float:
    return round(statistics.median(some) / statistics.median(others), 2)


def cost(options: argparse.Namespace) -> list[Row]:
    """Seconds and peak bytes of solvers on synthetic layers, and exponents of both ~ rows^a d^b where it takes over 0.5 s."""
    solvers: dict[str, Callable[[Layer], Any]] = {
        **{name: functools.partial(_prune_half, name) for name in ("exact_obs", "admm", "best")},
        **{f"{name}, 3 bit": functools.partial(_quantize_3, name) for name in ("obq", "gptq", "admm+polish")},
    }
    found: list[Row] = []
    for d in (144, 288, 576, 1152, 2304):
        for rows in (16, 64, 256):
            if rows * d**3 > 1e12:  # minutes each
                continue
            layer = synthetic_layer(rows, d)
            for name, solve in solvers.items():
                with Peak() as peak:
                    start, processor = time.perf_counter(), time.process_time()
                    result = solve(layer)
                    seconds, processor = time.perf_counter() - start, time.process_time() - processor
                row = {"solver": name, "rows": rows, "d": d, "seconds": seconds, "processor_seconds": processor}
                found.append({**row, "work": result.work, "peak_grew_bytes": peak.grown})
                print(f"{name:20} {rows:4} x {d:5} {seconds:8.3f} s, peak +{peak.grown / 2**20:6.0f} MiB", flush=True)
    fits = [_fit(name, [row for row in found if row["solver"] == name]) for name in solvers]
    return found + [fit for fit in fits if fit]


def _fit(solver: str, found: list[Row], least: float = 0.5) -> Row:
    """Least-squares exponents of what takes more than `least` seconds: below, it is the calls that count."""
    points = [row for row in found if row["seconds"] > least]
    fit: Row = {"solver": solver, "points": len(points)}
    if len(points) < 4:
        return {}
    shape = np.array([[1.0, math.log(row["rows"]), math.log(row["d"])] for row in points])
    for what in ("seconds", "processor_seconds", "peak_grew_bytes"):
        (_, a, b), *_ = np.linalg.lstsq(shape, np.log([row[what] for row in points]), rcond=None)
        fit |= {f"{what}_by_rows": round(float(a), 2), f"{what}_by_d": round(float(b), 2)}
    print(", ".join(f"{key} {value}" for key, value in fit.items()))
    return fit


def rank_one_loop(W: Tensor, inverse: Tensor) -> Tensor:
    """ExactOBS as OBC's code has it: all rows of the batch at once, each step one in-place rank-1 update of every H⁻¹."""
    rows, d = W.shape
    w, each = W.clone(), torch.arange(rows)
    stack = inverse.expand(rows, d, d).clone()
    gone = torch.zeros(rows, d, dtype=torch.bool)
    order = torch.empty(rows, d, dtype=torch.long)
    for step in range(d):
        diagonal = stack.diagonal(dim1=1, dim2=2)
        column = (w.square() / diagonal).masked_fill_(gone, torch.inf).argmin(1)
        order[:, step] = column
        row, pivot = stack[each, column], diagonal[each, column].clone()
        w -= row * (w[each, column] / pivot)[:, None]
        gone[each, column] = True
        w[gone] = 0.0
        row = row / pivot.sqrt()[:, None]
        stack.baddbmm_(row[:, :, None], row[:, None, :], alpha=-1)
    return order


class Peak:
    """How far the process's resident memory rose above where it began, looked at every 10 ms; Linux with glibc only."""

    def __enter__(self) -> Peak:
        # What earlier runs freed and malloc still holds would be used again, and not be seen.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._first = self._most = _resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.grown = self._most - self._first

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _prune_half(solver: str, layer: Layer) -> Any:
    return prune(layer.W, layer.H, "weight", 0.5, solver=solver)


def _quantize_3(solver: str, layer: Layer) -> Any:
    return quantize(layer.W, layer.H, GridSpec(3), solver=solver)


def _layers(options: argparse.Namespace) -> Iterator[Layer]:
    if options.network:
        return network_layers(options.network, options.layers, options.bytes)
    return iter([*digits_layers(), synthetic_layer(64, 256), synthetic_layer(96, 384, seed=1)])


def _case(pattern: str, sparsity: float | None) -> str:
    return pattern if sparsity is None else f"{pattern} {sparsity:.0%}"


def _measured(layer: Layer, case: str, solver: str, solve: Callable[[], Any]) -> Row:
    start = time.perf_counter()
    result = solve()
    seconds = time.perf_counter() - start
    nothing = torch.zeros_like(layer.W)
    error, held_out = (
        layer_loss(layer.W, result.weights, H) / layer_loss(layer.W, nothing, H) for H in (layer.H, layer.held_out)
    )
    row = {"layer": layer.name, "case": case, "solver": solver, "chosen": result.solver}
    return row | {"error": error, "held_out": held_out, "seconds": round(seconds, 4)}


def ratios(found: list[Row], base: str, solver: str, cases: Sequence[str]) -> tuple[float, float, float]:
    """Geometric means of error and held-out error over the base's, and seconds over the base's, each summed over all.

    A layer of which either loses nothing but what rounding makes of it (inputs that are always zero, say) has no ratio, and
    is left out.
    """
    of = {
        name: {
            (row["layer"], row["case"]): row
            for row in found
            if row["solver"] == name and row["case"] in cases and min(row["error"], row["held_out"]) > NOTHING
        }
        for name in (base, solver)
    }
    shared = [key for key in of[solver] if key in of[base]]
    if not shared:
        return math.nan, math.nan, math.nan
    error, held_out = (
        math.exp(statistics.fmean(math.log(of[solver][key][what] / of[base][key][what]) for key in shared))
        for what in ("error", "held_out")
    )
    seconds = [sum(of[name][key]["seconds"] for key in shared) for name in (solver, base)]
    return error, held_out, seconds[0] / seconds[1]


def _table(found: list[Row], base: str) -> None:
    """For each case and solver what `ratios` gives."""
    cases, solvers = (list(dict.fromkeys(row[key] for row in found)) for key in ("case", "solver"))
    layers = len({row["layer"] for row in found})
    print(f"over {base}'s, {layers} layers: error (geometric mean), held-out error (geometric mean), seconds (total)")
    rows = [
        [case, *(" ".join(f"{ratio:.3f}" for ratio in ratios(found, base, solver, [case])) for solver in solvers)]
        for case in cases
    ]
    print(table(["case", *solvers], rows), flush=True)


def _claim(found: list[Row], base: str, cases: Sequence[str]) -> None:
    """`best` against the base, over all layers and these cases, and how many layers are better and faster."""
    error, held_out, seconds = ratios(found, base, "best", cases)
    if math.isnan(error):
        return
    own = {
        row["layer"]: ratios([one for one in found if one["layer"] == row["layer"]], base, "best", cases)
        for row in found
    }
    faster, better = (sum(ratio[i] <= most for ratio in own.values()) for i, most in ((2, 1.0), (0, 0.97)))
    print(
        f"best over {base}, {', '.join(cases)}: error {error:.3f}, held out {held_out:.3f}, seconds {seconds:.3f}; "
        f"of {len(own)} layers {better} at most 0.97, {faster} in less time"
    )


# With what each is compared, and in which cases `best` claims to be better.
LAYERS: dict[str, tuple[Callable[[Layer, argparse.Namespace], Iterator[Run]], str, list[str]]] = {
    "pruning": (pruning, "exact_obs", [_case(*case) for case in SPARSE]),
    "quantization": (quantization, "obq", ["2 bit", "3 bit"]),
    "joint": (joint, "prune, refit, obq", []),
}
WHOLE: dict[str, Callable[[argparse.Namespace], list[Row]]] = {"speed": speed, "cost": cost}

if __name__ == "__main__":
    main()
