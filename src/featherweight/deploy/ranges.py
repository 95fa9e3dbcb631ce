# SPDX-License-Identifier: Apache-2.0
"""Ranges of values inside an ONNX graph, recorded by running it in ONNX Runtime on calibration data.

The least and largest value of each are reduced in the graph, so that a batch leaves two numbers a value and no
activations.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from featherweight.deploy.nodes import Affine, ir
from featherweight.deploy.sessions import flatten_inputs, session
from featherweight.errors import DataError, NumericalError
from featherweight.measure import eval_copy
from featherweight.task import Task, describe

__all__ = ["affine", "calibration_inputs", "call_inputs", "other_sizes", "record_ranges"]


def record_ranges(
    path: Path, names: Sequence[str], calibration: Iterable[Any], scratch: Path
) -> dict[str, tuple[float, float]]:
    """The least and largest value of each named float value of a file, over batches; zero is within each range.

    A batch is a tensor, a dict, or a tuple of the model's arguments with or without a target behind them.
    Raises `DataError` for data without a batch or of another form, `NumericalError` where a value is NaN or infinite.
    """
    probe = scratch / "ranges.onnx"
    _with_reductions(path, names, probe)
    engine = session(probe)
    found = dict.fromkeys(names, (0.0, 0.0))
    batches = 0
    for batch in calibration:
        arguments = call_inputs(batch, engine.input_names)
        # Grids on inputs make integers of NaN, so that no value behind them would show it.
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in flatten_inputs(arguments)):
            raise NumericalError(
                f"An input is NaN or infinite on batch {batches} of the calibration data. Nothing was written."
            )
        answers = engine(*arguments)
        answers = answers if isinstance(answers, tuple) else (answers,)
        for index, name in enumerate(names):
            low, high = float(answers[2 * index]), float(answers[2 * index + 1])
            if not (math.isfinite(low) and math.isfinite(high)):
                raise NumericalError(
                    f"{name} is NaN or infinite on batch {batches} of the calibration data, so it has no range and can have "
                    "no grid. Nothing was written; look for inputs that the model cannot take."
                )
            found[name] = (min(found[name][0], low), max(found[name][1], high))
        batches += 1
    if not batches:
        raise DataError(
            "calibration is empty: it yielded no batch, and grids between layers need ranges. Give some batches as the "
            "model is called with, or calibration=None for grids on the layers' inputs alone."
        )
    return found


def _with_reductions(path: Path, names: Sequence[str], probe: Path) -> None:
    tools = ir()
    model = tools.load(str(path))
    graph = model.graph
    values = {value.name: value for value in graph.inputs} | {v.name: v for n in graph for v in n.outputs}
    graph.outputs.clear()
    for name in names:
        for kind in ("ReduceMin", "ReduceMax"):
            node = tools.node(kind, [values[name]], attributes={"keepdims": 0}, num_outputs=1)
            output = node.outputs[0]
            output.name, output.type, output.shape = (
                f"{name}_{kind}",
                tools.TensorType(tools.DataType.FLOAT),
                tools.Shape([]),
            )
            graph.append(node)
            graph.outputs.append(output)
    tools.save(model, str(probe))


def call_inputs(batch: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """A batch as the arguments of a call that takes tensors of these names: a target that stands last is left out.

    Of a dict the names are taken, and what else is in it left out, where it has them all; else it is one argument
    itself.

    >>> import torch
    >>> call_inputs((torch.zeros(1), torch.ones(1)), ["x"])
    (tensor([0.]),)
    >>> call_inputs({"label": 0, "a": torch.zeros(1), "b": torch.ones(1)}, ["b", "a"])
    (tensor([1.]), tensor([0.]))
    """
    count = len(names)
    if isinstance(batch, Mapping) and all(name in batch for name in names):
        return tuple(batch[name] for name in names)
    if isinstance(batch, Tensor | np.ndarray | Mapping):
        batch = (batch,)
    if isinstance(batch, tuple | list):
        arguments = tuple(batch)
        for candidate in (arguments, arguments[:-1]):
            if len(flatten_inputs(candidate)) == count:
                return candidate
    raise DataError(
        f"A calibration batch is {describe(batch)}, and the model takes {count} tensors. Give batches of its arguments, "
        "with or without a target behind them."
    )


def calibration_inputs(model: nn.Module, task: Task, samples: int = 512) -> Iterator[tuple[Any, ...]] | None:
    """The model's arguments on the task's calibration data (or training data), for `samples` samples or a batch more.

    None where the task has no data. The task's `forward` decides how a batch is given to the model; its call is caught.
    """
    data = task.calibration if task.calibration is not None else task.train
    return None if data is None else _caught(eval_copy(model), task, data, samples)


def other_sizes(model: nn.Module, task: Task, samples: int = 512) -> list[tuple[Any, ...]]:
    """Calls in the task's data whose tensors differ from the example's in size, the batch aside; one for each new axis.

    For `export_onnx(..., others=...)`. Nothing where all are as the example, or where the task has no data.
    """
    example = flatten_inputs(task.example_inputs)
    found: list[tuple[Any, ...]] = []
    known: set[tuple[int, int]] = set()
    for arguments in calibration_inputs(model, task, samples) or ():
        leaves = flatten_inputs(arguments)
        if [leaf.ndim for leaf in leaves] != [leaf.ndim for leaf in example]:
            continue
        axes = {
            (i, axis)
            for i, leaf in enumerate(leaves)
            for axis in range(1, leaf.ndim)
            if leaf.shape[axis] != example[i].shape[axis]
        }
        if not axes <= known:
            known |= axes
            found.append(arguments)
    return found


class _Caught(Exception):
    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments


def _caught(twin: nn.Module, task: Task, data: Iterable[Any], samples: int) -> Iterator[tuple[Any, ...]]:
    signature = inspect.signature(twin.forward)

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()  # what stands behind an argument that is left out would be left out too
        raise _Caught(bound.args)

    twin.register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
    seen = 0
    for batch in data:
        if seen >= samples:
            return
        try:
            task.forward(twin, batch)
        except _Caught as caught:
            sizes = [leaf.shape[0] for leaf in flatten_inputs(caught.arguments) if leaf.ndim]
            seen += sizes[0] if sizes else 1
            yield caught.arguments
        else:
            return  # it calls a part of the model: no later batch would be caught, and each costs a whole forward


def affine(ranges: Iterable[tuple[float, float]]) -> Affine:
    """The uint8 grid over ranges that include zero, which is on it exactly; scale 1 where all is zero.

    >>> affine([(-1.0, 0.5), (0.0, 1.55)]).zero_point
    100
    """
    pairs = list(ranges)
    low, high = min(0.0, *(pair[0] for pair in pairs)), max(0.0, *(pair[1] for pair in pairs))
    scale = float(np.float32((high - low) / 255))
    if scale < float(np.finfo(np.float32).tiny):
        return Affine(1.0, 0)
    return Affine(scale, int(np.clip(round(-low / scale), 0, 255)))
