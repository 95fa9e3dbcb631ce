# SPDX-License-Identifier: Apache-2.0
"""Ranges of values inside an ONNX graph, recorded by running it in ONNX Runtime on calibration data.

The least and largest value of each are reduced in the graph, so that a batch leaves two numbers a value and no activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from featherweight.deploy.nodes import Affine, ir
from featherweight.deploy.sessions import flatten_inputs, session
from featherweight.errors import DataError, NumericalError
from featherweight.task import describe

__all__ = ["affine", "call_inputs", "record_ranges"]


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
        answers = engine(*call_inputs(batch, len(engine.input_names)))
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


def call_inputs(batch: Any, count: int) -> tuple[Any, ...]:
    """A batch as the arguments of a call that takes `count` tensors: a target that stands last is left out.

    >>> import torch
    >>> call_inputs((torch.zeros(1), torch.ones(1)), 1)
    (tensor([0.]),)
    """
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


def affine(ranges: Iterable[tuple[float, float]]) -> Affine:
    """The uint8 grid over ranges that include zero, which is on it exactly; scale 1 where all is zero.

    >>> affine([(-1.0, 0.5), (0.0, 1.55)])
    Affine(scale=0.01, zero_point=100, signed=False)
    """
    pairs = list(ranges)
    low, high = min(0.0, *(pair[0] for pair in pairs)), max(0.0, *(pair[1] for pair in pairs))
    scale = float(np.float32((high - low) / 255))
    if scale < float(np.finfo(np.float32).tiny):
        return Affine(1.0, 0)
    return Affine(scale, int(np.clip(round(-low / scale), 0, 255)))
