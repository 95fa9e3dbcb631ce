# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph in memory (onnx_ir's), read and edited: constants, quantized values, Q and DQ pairs between nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import require

__all__ = [
    "Affine",
    "add_node",
    "affine_of",
    "attribute",
    "constant",
    "evaluate",
    "ir",
    "is_standard",
    "new_constant",
    "quantize_between",
    "remove_unused",
]

# Nodes that an exporter, or this room, leaves between a constant and its reader.
_FOLDED = ("Transpose", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Cast", "Sub")


def ir() -> Any:
    """The package that onnxscript, and so torch's exporter, keeps graphs in."""
    return require("onnx_ir", extra="onnx")


@dataclasses.dataclass(frozen=True)
class Affine:
    """One grid for a whole tensor: value = scale · (q - zero_point), q uint8 (int8 where `signed`)."""

    scale: float
    zero_point: int
    signed: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest value."""
        low, high = (-128, 127) if self.signed else (0, 255)
        return self.scale * (low - self.zero_point), self.scale * (high - self.zero_point)


def is_standard(node: Any, *kinds: str) -> Any:
    """Whether a node is one of these ops of ONNX itself; None, the producer of an input, is not."""
    return node is not None and node.op_type in kinds and node.domain in ("", "ai.onnx")


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The plain value of a node's attribute."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    return list(value) if isinstance(value, tuple) else value


def constant(value: Any) -> NDArray[Any] | None:
    """The array of an initializer or a Constant node, also behind nodes that only change its layout or type; else None.

    torch's exporter folds such changes for small tensors alone: a vocabulary's transpose and the gates of an LSTM,
    sliced and put in another order, are nodes. Integers of recurrent layers are widened in the file
    (`integer_weights`).
    """
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
        array: NDArray[Any] = value.const_value.numpy()
        return array
    node = value.producer()
    if is_standard(node, "Constant") and "value" in node.attributes:
        held: NDArray[Any] = node.attributes["value"].value.numpy()
        return held
    if is_standard(node, *_FOLDED) and len(node.outputs) == 1:
        inputs = [None if one is None else constant(one) for one in node.inputs]
        if all(array is not None or one is None for array, one in zip(inputs, node.inputs, strict=True)):
            return evaluate(node, inputs)[0]
    return None


def evaluate(node: Any, inputs: list[NDArray[Any] | None]) -> list[NDArray[Any]]:
    """Outputs of one node, by itself, in floating point where it computes at all: ONNX's reference implementation."""
    onnx, tools = require("onnx", extra="onnx"), ir()
    reference = require("onnx.reference", extra="onnx")
    proto = tools.serde.serialize_node(node)
    feeds = {name: array for name, array in zip(proto.input, inputs, strict=True) if array is not None}
    make = onnx.helper.make_tensor_value_info
    typed = [make(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None) for name, array in feeds.items()]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    version = node.version or (node.graph.opset_imports.get("", 18) if node.graph is not None else 18)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([proto], "node", typed, outputs), opset_imports=[onnx.helper.make_opsetid("", version)]
    )
    answers: list[NDArray[Any]] = reference.ReferenceEvaluator(model).run(None, feeds)
    return answers


def new_constant(graph: Any, name: str, array: Any, dtype: Any = None) -> Any:
    """A new initializer, its name made unique."""
    tools = ir()
    unique, number = name, 0
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    tensor = tools.tensor(array, dtype=dtype, name=unique)
    value = tools.Value(name=unique, shape=tensor.shape, type=tools.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def add_node(before: Any, kind: str, inputs: list[Any], name: str, attributes: dict[str, Any] | None = None) -> Any:
    """A new node of one output in front of another; the answer is that output, without type or shape."""
    tools = ir()
    node = tools.node(kind, inputs, attributes=attributes or {}, outputs=[tools.Value(name=name)])
    before.graph.insert_before(before, node)
    return node.outputs[0]


def affine_of(node: Any) -> Affine | None:
    """The grid of a QuantizeLinear or DequantizeLinear of 8 bits, if it is one constant grid for the whole tensor."""
    if not is_standard(node, "QuantizeLinear", "DequantizeLinear"):
        return None
    scale = constant(node.inputs[1])
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.uint8(0)
    if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype not in (np.uint8, np.int8):
        return None
    return Affine(float(scale.reshape(())), int(zero_point.reshape(())), bool(zero_point.dtype == np.int8))


def quantize_between(value: Any, grid: Affine, users: list[tuple[Any, int]], name: str) -> Any:
    """Puts QuantizeLinear and DequantizeLinear on `value` for these uses (node, input index); gives the rounded value.

    Uses by the graph's own outputs are not among them: replace those by the answer.
    """
    tools = ir()
    graph = value.graph if value.graph is not None else value.producer().graph
    kind = np.int8 if grid.signed else np.uint8
    scale = new_constant(graph, f"{name}_scale", np.float32(grid.scale))
    zero_point = new_constant(graph, f"{name}_zero_point", kind(grid.zero_point))
    q = tools.Value(name=f"{name}_q", type=tools.TensorType(zero_point.dtype), shape=value.shape)
    rounded = tools.Value(name=f"{name}_rounded", type=tools.TensorType(tools.DataType.FLOAT), shape=value.shape)
    nodes = [
        tools.node("QuantizeLinear", [value, scale, zero_point], outputs=[q]),
        tools.node("DequantizeLinear", [q, scale, zero_point], outputs=[rounded]),
    ]
    producer = value.producer()
    if producer is None:
        first = next(iter(graph))
        graph.insert_before(first, nodes)
    else:
        graph.insert_after(producer, nodes)
    for node, index in users:
        node.replace_input_with(index, rounded)
    return rounded


def remove_unused(model: Any) -> None:
    """Takes out nodes and initializers that nothing reads."""
    require("onnx_ir.passes.common", extra="onnx").RemoveUnusedNodesPass()(model)
