# SPDX-License-Identifier: Apache-2.0
"""Looking before leaping: what a model consists of, and what a recipe would do to it, take and need. Changes nothing.

What matches is exact, for the methods are asked themselves. Time, disk and memory are estimates and are called so: a
few real steps are timed on a copy and multiplied; bytes are added up by the formulas of `preview`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.layers import Selected, refuse_nothing, tensors_and_ties
from featherweight.measure import count
from featherweight.prune import GradualPruning
from featherweight.recipe import Recipe, to_dict
from featherweight.reconstruct import Reconstruct
from featherweight.state import random_state, set_random_state
from featherweight.task import Stage, Task, batches
from featherweight.train import Train

__all__ = ["inspect", "preview"]

_FEWEST_STEPS, _MOST_STEPS = 4, 100
# Moments that an optimizer keeps for each trained value; a function of the user's own is taken for Adam.
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1}


def inspect(model: nn.Module, example_inputs: tuple[Any, ...] | None = None, method: Any = None) -> dict[str, Any]:
    """Each layer's kind, shape, parameters, MACs, bytes and zeros, and what `method` would prune and why not the rest.

    `method` is any with a `select`, by default GradualPruning to 90 % with its default rules.
    Without `example_inputs` the model is not run: MACs and peak memory are None, and rules that ask which layer runs
    first or last take the order of definition. Raises `DataError` if the model does not take the inputs.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> for layer in inspect(model, (torch.zeros(1, 8),))["layers"]:
    ...     print(layer["name"], layer["macs"], layer["action"], layer["reason"], sep=" | ")
    0 | 128 | pruned | layers='*' names it
    2 | 32 | kept | output layer; dense=() prunes it too
    """
    method = GradualPruning(sparsity=0.9) if method is None else method
    chosen = method.select(copy.deepcopy(model), example_inputs)
    if example_inputs is None:
        totals: dict[str, Any] = _totals(model)
        rows = list(_uncounted_rows(model))
    else:
        counts = count(model, example_inputs)
        totals = {f.name: getattr(counts, f.name) for f in dataclasses.fields(counts) if f.name != "layers"}
        rows = [dataclasses.asdict(layer) for layer in counts.layers]
    return {
        "model": type(model).__name__,
        **totals,
        "pruned": sum(line.action != "kept" for line in chosen),
        "of": len(chosen),
        "layers": [_layer(row, chosen) for row in rows],
    }


def _layer(row: Mapping[str, Any], chosen: Sequence[Selected]) -> dict[str, Any]:
    mine = [line for line in chosen if line.name.rpartition(".")[0] == row["name"]]
    action = "pruned" if any(line.action == "pruned" for line in mine) else "kept"
    reasons = dict.fromkeys(line.reason for line in mine if line.action == action)
    return {
        "name": row["name"],
        "kind": row["kind"],
        "shape": None if row["shape"] is None else list(row["shape"]),
        "parameters": row["parameters"],
        "zeros": row["parameters"] - row["nonzeros"],
        "macs": row["macs"],
        "bytes": row["dense_bytes"],
        "action": action,
        "reason": "; ".join(reasons) if mine else "no weight: biases, norms and buffers stay as they are",
    }


def _totals(model: nn.Module) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzeros": sum(int(p.detach().count_nonzero()) for p in parameters),
        "macs": None,
        "bops": None,
        "dense_bytes": _bytes(tensors_and_ties(model)[0].values()),
        "peak_memory_bytes": None,
        "uncounted": (),
        "bits": None,
        "input_bits": None,
    }


def _uncounted_rows(model: nn.Module) -> Iterator[dict[str, Any]]:
    """A row a module with tensors of its own, each tensor at the module that has it first; nothing is run."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        new = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in new}
        buffers = list(module.buffers(recurse=False))
        if new or buffers:
            matrix = next((p for p in module.parameters(recurse=False) if p.ndim > 1), None)
            shaped = getattr(module, "weight", matrix)
            yield {
                "name": name,
                "kind": type(module).__name__,
                "shape": tuple(shaped.shape) if isinstance(shaped, Tensor) else None,
                "parameters": sum(p.numel() for p in new),
                "nonzeros": sum(int(p.detach().count_nonzero()) for p in new),
                "macs": None,
                "dense_bytes": _bytes([*new, *buffers]),
            }


def preview(task: Task, recipe: Recipe, *, seconds: float = 2.0) -> dict[str, Any]:
    """What `compress` would match, and about how long it would take and how much disk and memory it would need.

    Steps are timed on a copy for about `seconds` seconds a training stage, hooks included, and the task is evaluated
    once. With W the bytes of the model's tensors, P those of what is trained and m the optimizer's moments (2, or 1 for
    SGD), and a byte a weight for masks:

    - memory = 2 W (yours and the copy) + (1 + m) P + masks + what one training batch saves for its backward pass,
    - disk at the end <= 2 W (`model.safetensors` where nothing shrinks, `model.onnx`) + 1 MB,
    - disk at most <= that + stages x W + 2 ((W + m P) + masks), a training checkpoint and the one that replaces it.

    Not in the time: export, its parity check, latencies, and loading what the first step loads. A later stage's matches
    are those of the model as it is now. Raises what the methods raise for options that do not fit the model, and
    `NothingToCompress` where a method would keep everything.

    >>> from featherweight.prune import Prune
    >>> task = Task(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)), (torch.zeros(1, 8),))
    >>> found = preview(task, Recipe((Prune(sparsity=0.5),)))
    >>> found["stages"][0]["matches"][0]["pruned"], found["stages"][0]["matches"][0]["of"]
    (1, 2)
    """
    before = random_state()
    try:
        stages = [_stage(index, method, task, seconds) for index, method in enumerate(recipe.stages, start=1)]
        evaluation = _evaluation_seconds(task)
    finally:
        set_random_state(before)
    trained = [part for stage in stages for part in stage["training"]]
    looks = len(stages) + 2 + sum(part["evaluations"] for part in trained)
    total = sum(part["steps"] * part["seconds_per_step"] for part in trained) + looks * (evaluation or 0.0)
    solves = any(isinstance(method, Reconstruct) for method in recipe.stages)
    return {
        "stages": stages,
        "estimate": {
            "seconds": total,
            "evaluations": looks if evaluation is not None else 0,
            "seconds_per_evaluation": evaluation,
            "not_included": "export, parity, latencies and start-up" + (", and solving layers" if solves else ""),
            **_needs(task, recipe),
        },
    }


def _stage(index: int, method: Any, task: Task, seconds: float) -> dict[str, Any]:
    entry = to_dict(method)
    return {
        "name": f"{index} {entry['method']}",
        "options": {key: value for key, value in entry.items() if key != "method"},
        "matches": list(_matches(method, task)),
        "training": [_timed(train, rounds, task, seconds) for train, rounds in _trainings(method)],
    }


def _matches(method: Any, task: Task) -> Iterator[dict[str, Any]]:
    """What each method within this one would act on, of those that say."""
    if callable(getattr(method, "select", None)):
        chosen = method.select(copy.deepcopy(task.model), task.example_inputs)
        refuse_nothing(chosen)
        yield {
            "method": to_dict(method)["method"],
            "pruned": sum(line.action != "kept" for line in chosen),
            "of": len(chosen),
            "selection": [dataclasses.asdict(line) for line in chosen],
        }
    for inner in (*getattr(method, "hooks", ()), *getattr(method, "step", ())):
        yield from _matches(inner, task)


def _trainings(method: Any, rounds: int = 1) -> Iterator[tuple[Train, int]]:
    """Each training within this method, and how often it is run at most."""
    if isinstance(method, Train):
        yield method, rounds
    for inner in getattr(method, "step", ()):
        yield from _trainings(inner, rounds * getattr(method, "rounds", 1))


class _Enough(Exception):
    """Stops a training that is only being timed."""


def _timed(train: Train, rounds: int, task: Task, seconds: float) -> dict[str, Any]:
    """Runs the first steps of a training on a copy; the median step stands for all, the first, if it can, for none."""
    ends = [time.perf_counter()]
    total = 0

    def look(event: dict[str, Any]) -> None:
        nonlocal total
        if event["kind"] == "step":
            ends.append(time.perf_counter())
            total = event["total"]
            # From the first step's end: what it loads may take longer than all the steps that are timed.
            long = ends[-1] - ends[1] > seconds and len(ends) > _FEWEST_STEPS
            if long or len(ends) > _MOST_STEPS:
                raise _Enough

    plain = dataclasses.replace(train, evaluate_every=None)
    with contextlib.suppress(_Enough):
        plain(copy.deepcopy(task.model), task, Stage(report=look))
    steps = [second - first for first, second in itertools.pairwise(ends)]
    steps = steps[1:] or steps
    return {
        "steps": total * rounds,
        "rounds_at_most": rounds,
        "seconds_per_step": statistics.median(steps),
        "timed_steps": len(steps),
        "evaluations": total // train.evaluate_every * rounds if train.evaluate_every else 0,
    }


def _evaluation_seconds(task: Task) -> float | None:
    if task.evaluate is None:
        return None
    model = copy.deepcopy(task.model).eval()
    began = time.perf_counter()
    with torch.no_grad():
        task.evaluate(model)
    return time.perf_counter() - began


def _needs(task: Task, recipe: Recipe) -> dict[str, Any]:
    """The formulas of `preview`."""
    model = copy.deepcopy(task.model)
    tensors = _bytes(tensors_and_ties(model)[0].values())
    trainings = [train for method in recipe.stages for train, _ in _trainings(method)]
    masks = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    memory, checkpoint = 2 * tensors, 0
    if trainings:
        trained = _bytes(p for p in model.parameters() if p.requires_grad)
        moments = max(
            _MOMENTS.get(train.optimizer, 2) if isinstance(train.optimizer, str) else 2 for train in trainings
        )
        memory += (1 + moments) * trained + masks + _saved_for_backward(model, task)
        checkpoint = tensors + moments * trained + masks
    final = 2 * tensors + 1_000_000
    return {
        "memory_bytes": memory,
        "disk_bytes": final,
        "disk_peak_bytes": final + len(recipe.stages) * tensors + 2 * checkpoint,
    }


def _saved_for_backward(model: nn.Module, task: Task) -> int:
    """Bytes that autograd keeps alive between the forward and the backward pass of the first training batch."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = next(iter(batches(task.train, "train")))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = task.forward(model.train(), batch)
        if task.loss is not None:
            outputs = task.loss(outputs, batch)
    del outputs
    return sum(saved.values())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
