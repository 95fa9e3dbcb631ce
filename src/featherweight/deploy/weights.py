# SPDX-License-Identifier: Apache-2.0
"""Weights of an ONNX graph as integers: constants that lie on a grid become int8 or int4 and a DequantizeLinear.

The grid is read from the values (`grids.read_grid`), so that nobody has to tell how a weight was quantized, and what
the file computes with is the model's weight to the last bit. One exception: where the exporter folded a norm into a
conv, each row was multiplied by a number, and is on a grid but for float32's rounding; there the integers are the
model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.deploy.nodes import add_node, attribute, constant, ir, is_standard, new_constant
from featherweight.grids import Grid, read_grid

__all__ = ["Weights", "integer_weights", "on_grids"]

# Below this, scales and nodes weigh more than what integers save.
_LEAST = 256
_CHUNKS = (128, 64, 32, 16, 256)
_RECURRENT = ("LSTM", "GRU", "RNN")
# float32 keeps 24 bits; a row times a number is rounded once.
_ROUNDING = 2.0**-23


@dataclasses.dataclass
class Weights:
    """What became of a graph's weights: how many are int8 and int4, which nodes compute in floating point all the same.

    `stored` have weights that are integers in the file alone; the input of `uneven` has a grid, and their weights have
    zero points or several scales a row, which no integer kernel takes.
    """

    int8: int = 0
    int4: int = 0
    stored: list[str] = dataclasses.field(default_factory=list)
    uneven: list[str] = dataclasses.field(default_factory=list)
    made: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict, repr=False)
    """What stands for a weight already, by how it is read: a recurrent cell that is called at each step reads one copy."""

    @property
    def notes(self) -> list[str]:
        """In sentences."""
        found = []
        if self.stored:
            found.append(
                f"Weights are integers in the file, and floats to every runtime: {', '.join(dict.fromkeys(self.stored))}."
            )
        if self.uneven:
            found.append(
                f"Computed in floating point: {', '.join(dict.fromkeys(self.uneven))}. Integer kernels take weights without zero points "
                "and with one scale a row: quantize with symmetric=True and without chunk."
            )
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Integers:
    """q and zero points of rows x columns, as in the file: values = scale (q - zero_point), a scale a row or chunk."""

    q: NDArray[np.int8]
    scale: NDArray[np.float32]  # (rows, chunks)
    zero_point: NDArray[np.int8]
    chunk: int
    four: bool  # all of q and zero_point fit in int4

    @property
    def plain(self) -> bool:
        """One scale a row and no zero points: what integer kernels take."""
        return self.scale.shape[1] == 1 and not self.zero_point.any()


def on_grids(parameters: Iterable[Tensor]) -> bool:
    """Whether some weight lies on a grid of 8 bits or fewer, a scale for each row or each chunk of rows."""
    found = (
        p.detach().cpu().float() for p in parameters if p.ndim > 1 and p.numel() >= _LEAST and p.is_floating_point()
    )
    return any(
        _read(matrix, _CHUNKS) is not None and bool(matrix.any())
        for p in found
        for matrix in ((p.flatten(1), p.transpose(0, 1).flatten(1)) if p.ndim > 2 else (p,))
    )


def integer_weights(model: Any, parameters: Mapping[str, Tensor], *, int4: bool) -> Weights:
    """Replaces the weights of this graph (onnx_ir's) that lie on grids; `parameters` are the torch model's, by name.

    Of Conv, ConvTranspose, Gemm and MatMul one scale a row becomes a per-channel DequantizeLinear; a scale for each
    chunk of a MatMul's columns a blocked one (opset 21). Rows of an embedding are picked as integers and multiplied by
    their scales after. Recurrent weights, and grouped transposed convs, are int8 in the file and floats to every
    runtime.
    """
    done = Weights()
    for node in list(model.graph):
        if is_standard(node, "Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", *_RECURRENT):
            for index in _weight_inputs(node):
                _replace(node, index, parameters, int4, done)
    return done


def _weight_inputs(node: Any) -> tuple[int, ...]:
    if node.op_type == "Gather":
        return (0,) if attribute(node, "axis", 0) == 0 else ()
    if node.op_type in _RECURRENT:
        return (1, 2)
    return (1,) if node.op_type != "MatMul" or constant(node.inputs[1]) is not None else (0,)


def _replace(node: Any, index: int, parameters: Mapping[str, Tensor], int4: bool, done: Weights) -> None:
    value = node.inputs[index]
    array = constant(value)
    if array is None or array.ndim < 2 or array.dtype != np.float32 or not array.any():
        return
    rounded = _quantized_input(node, index)
    if array.size < _LEAST and not rounded:
        return
    if node.op_type == "MatMul" and array.ndim != 2:
        return
    use = (value.name, node.op_type, index, attribute(node, "transB", 0), attribute(node, "group", 1), rounded)
    if use in done.made:
        node.replace_input_with(index, done.made[use])
        return
    matrix, axis = _rows(node, index, array)
    chunked = node.op_type == "MatMul" and index == 1 and int4  # blocked DequantizeLinear came with opset 21
    integers = _read(torch.from_numpy(matrix), chunks=_CHUNKS if chunked else ())
    if integers is None:
        integers = _folded(matrix, parameters.get(value.name))
    if integers is None:
        return
    name = value.name
    if node.op_type == "Gather":
        _gather(node, integers, name)
    elif axis is None:
        done.made[use] = _reshaped(node, integers, array.shape, name, group=attribute(node, "group", 1))
        done.stored.append(f"{node.op_type} {node.outputs[0].name}")
    else:
        # Convolutions, and integer kernels, take int8.
        as_int4 = int4 and integers.four and not rounded and not is_standard(node, "Conv", "ConvTranspose")
        done.made[use] = _linear(node, integers, array.shape, axis, name, as_int4)
        if rounded and not integers.plain:
            done.uneven.append(f"{node.op_type} {node.outputs[0].name}")
        done.int4 += as_int4
        done.int8 -= as_int4
    done.int8 += 1
    if use in done.made:
        node.replace_input_with(index, done.made[use])


def _quantized_input(node: Any, index: int) -> bool:
    other = node.inputs[1 - index] if node.op_type == "MatMul" else node.inputs[0]
    return other is not None and is_standard(other.producer(), "DequantizeLinear")


def _rows(node: Any, index: int, array: NDArray[Any]) -> tuple[NDArray[Any], int | None]:
    """The weight as rows (outputs) x columns, and the axis of its rows where it has one of its own."""
    if node.op_type in _RECURRENT:
        return array.reshape(-1, array.shape[-1]), None
    if node.op_type == "ConvTranspose":
        groups = attribute(node, "group", 1)
        if groups > 1:
            pieces = array.reshape(groups, array.shape[0] // groups, array.shape[1], -1)
            return np.ascontiguousarray(pieces.swapaxes(1, 2)).reshape(groups * array.shape[1], -1), None
        axis = 1
    elif node.op_type == "Gemm":
        axis = 0 if attribute(node, "transB", 0) else 1
    elif node.op_type == "MatMul":
        axis = 1 if index == 1 else 0
    else:
        axis = 0
    return np.ascontiguousarray(np.moveaxis(array, axis, 0)).reshape(array.shape[axis], -1), axis


def _read(matrix: Tensor, chunks: tuple[int, ...] = ()) -> _Integers | None:
    grid = read_grid(matrix, most_bits=8)
    if grid is not None:
        return _in_int8(grid, matrix)
    for chunk in chunks:
        if chunk < matrix.shape[1] and matrix.shape[1] % chunk == 0:
            grid = read_grid(matrix, most_bits=8, chunk=chunk)
            if grid is not None:
                return _in_int8(grid, matrix)
    return None


def _in_int8(grid: Grid, matrix: Tensor) -> _Integers:
    """Without zero points where the numbers then still fit: that is what integer kernels take."""
    columns = torch.arange(matrix.shape[1])
    scale, zero_point = grid.at(columns)
    signed = (matrix.double() / scale).round().to(torch.int32)  # q - zero_point, whatever the grid's form
    if int(signed.min()) >= -128 and int(signed.max()) <= 127:
        q, zeros = signed, torch.zeros_like(grid.zero_point)
    else:
        q, zeros = signed + zero_point.to(torch.int32), grid.zero_point
    ends = [int(t.min()) for t in (q, zeros)], [int(t.max()) for t in (q, zeros)]
    four = min(ends[0]) >= -8 and max(ends[1]) <= 7
    return _Integers(
        q.numpy().astype(np.int8), grid.scale.float().numpy(), zeros.numpy().astype(np.int8), grid.chunk, four
    )


def _folded(matrix: NDArray[Any], original: Tensor | None) -> _Integers | None:
    """The integers of the model's own weight, if the graph's is that one with each row times a number."""
    if original is None or original.ndim < 2 or original.numel() != matrix.size:
        return None
    rows = original.detach().float().cpu().flatten(1)
    if rows.shape != matrix.shape:
        return None
    integers = _read(rows)
    if integers is None or not integers.plain:
        return None
    q = integers.q.astype(np.float64)
    squares = (q * q).sum(1, keepdims=True)
    scale = np.where(squares > 0, (matrix * q).sum(1, keepdims=True) / np.where(squares > 0, squares, 1), 1.0)
    # A row times a negative number: a scale is positive, so the integers turn; -128 has no counterpart.
    q = np.where(scale < 0, -q, q)
    scale = np.abs(scale).astype(np.float32)
    near = np.abs(scale * q - matrix) <= 4 * _ROUNDING * np.abs(matrix) + np.finfo(np.float32).tiny
    if not near.all() or q.max() > 127:
        return None
    return _Integers(q.astype(np.int8), scale, np.zeros(scale.shape, np.int8), matrix.shape[1], integers.four)


def _linear(node: Any, integers: _Integers, shape: tuple[int, ...], axis: int, name: str, int4: bool) -> Any:
    """DequantizeLinear in the tensor's own layout, one scale a row, or a scale for each block of a MatMul's columns."""
    graph, tools = node.graph, ir()
    layout = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    q = np.ascontiguousarray(np.moveaxis(integers.q.reshape(layout), 0, axis))
    kind = tools.DataType.INT4 if int4 else tools.DataType.INT8
    blocked = integers.scale.shape[1] > 1
    scale = np.ascontiguousarray(np.moveaxis(integers.scale, 0, axis)) if blocked else integers.scale[:, 0]
    inputs = [_constant(graph, f"{name}_q", q, kind), new_constant(graph, f"{name}_scale", scale)]
    if integers.zero_point.any():
        zeros = (
            np.ascontiguousarray(np.moveaxis(integers.zero_point, 0, axis)) if blocked else integers.zero_point[:, 0]
        )
        inputs.append(_constant(graph, f"{name}_zero_point", zeros, kind))
    attributes = {"axis": 1 - axis, "block_size": integers.chunk} if blocked else {"axis": axis}
    return add_node(node, "DequantizeLinear", inputs, f"{name}_dq", attributes)


def _constant(graph: Any, name: str, array: NDArray[np.int8], kind: Any) -> Any:
    """int4 has no type in NumPy; ml_dtypes, which onnx brings, has one."""
    tools = ir()
    if kind == tools.DataType.INT4:
        return new_constant(graph, name, array.astype(kind.numpy()), kind)
    return new_constant(graph, name, array)


def _reshaped(node: Any, integers: _Integers, shape: tuple[int, ...], name: str, group: int) -> Any:
    """As rows x columns in the file, dequantized and brought into the op's layout in front of it."""
    graph = node.graph
    inputs = [new_constant(graph, f"{name}_q", integers.q), new_constant(graph, f"{name}_scale", integers.scale[:, 0])]
    if node.op_type in _RECURRENT:
        inputs[0] = _in_int32(node, inputs[0], integers, name)
    elif integers.zero_point.any():
        inputs.append(new_constant(graph, f"{name}_zero_point", integers.zero_point[:, 0]))
    value = add_node(node, "DequantizeLinear", inputs, f"{name}_dq", {"axis": 0})
    if node.op_type == "ConvTranspose":
        split = np.array([group, shape[1], shape[0] // group, int(np.prod(shape[2:]))], np.int64)
        value = add_node(node, "Reshape", [value, new_constant(graph, f"{name}_split", split)], f"{name}_split_dq")
        value = add_node(node, "Transpose", [value], f"{name}_turned", {"perm": [0, 2, 1, 3]})
    target = new_constant(graph, f"{name}_shape", np.array(shape, np.int64))
    return add_node(node, "Reshape", [value, target], f"{name}_reshaped")


def _in_int32(node: Any, value: Any, integers: _Integers, name: str) -> Any:
    """int8 less its zero points, widened, for OpenVINO: where activations have grids it keeps what is dequantized from
    int8 as nodes, and refuses a recurrent layer whose weights are no constants. What is dequantized from int32 it
    folds."""
    to = {"to": ir().DataType.INT32}
    value = add_node(node, "Cast", [value], f"{name}_wide", to)
    if integers.zero_point.any():
        zeros = new_constant(node.graph, f"{name}_zero_point", integers.zero_point)
        value = add_node(
            node, "Sub", [value, add_node(node, "Cast", [zeros], f"{name}_zero_wide", to)], f"{name}_offset"
        )
    return value


def _gather(node: Any, integers: _Integers, name: str) -> None:
    """Rows are picked as integers: dequantizing a whole vocabulary at each call would cost more than the network."""
    graph, output = node.graph, node.outputs[0]
    picked = []
    for part, array in (("q", integers.q), ("zero_point", integers.zero_point), ("scale", integers.scale)):
        if part == "zero_point" and not array.any():
            continue
        table = new_constant(graph, f"{name}_{part}", array)
        value = add_node(node, "Gather", [table, node.inputs[1]], f"{output.name}_{part}", {"axis": 0})
        if part != "scale":
            value = add_node(node, "Cast", [value], f"{output.name}_{part}_float", {"to": ir().DataType.FLOAT})
        picked.append(value)
    value = picked[0]
    if len(picked) == 3:
        value = add_node(node, "Sub", picked[:2], f"{output.name}_offset")
    value = add_node(node, "Mul", [value, picked[-1]], f"{output.name}_value")
    value.type, value.shape = output.type, output.shape
    output.replace_all_uses_with(value, replace_graph_outputs=True)
