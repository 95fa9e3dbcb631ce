# SPDX-License-Identifier: Apache-2.0
"""A quantized model as standard ONNX QDQ: int8 weights, int32 biases, grids on inputs and on the edges between layers.

A QDQ graph is a float graph with pairs of QuantizeLinear and DequantizeLinear in it. It means the same everywhere, and
a runtime that has an integer kernel for "DQ, op, Q" uses it. Where a runtime has none, the graph is computed in
floating point, as slowly as that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featherweight.deploy.arithmetic import dequantize
from featherweight.deploy.edges import find_edges, is_dynamic, is_integer, place_edges, quantized_by
from featherweight.deploy.nodes import (
    add_node,
    affine_of,
    attribute,
    constant,
    ir,
    is_standard,
    new_constant,
    remove_unused,
)
from featherweight.deploy.ranges import affine, record_ranges
from featherweight.deploy.weights import integer_weights

__all__ = ["Integers", "edges_without_ranges", "in_integers", "with_edges", "without_integers"]


@dataclasses.dataclass(frozen=True)
class Integers:
    """What an ONNX file holds as integers: counts of tensors, and sentences on what stayed in floating point.

    `int8` and `int4` are weights, `biases` int32 biases, `inputs` layers' own grids, `edges` grids placed between
    layers, `dynamic` layers whose input takes the grid of each call.
    """

    int8: int = 0
    int4: int = 0
    biases: int = 0
    inputs: int = 0
    edges: int = 0
    dynamic: int = 0
    notes: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        """Whether anything at all is an integer."""
        return self.int8 + self.int4 + self.inputs + self.dynamic > 0

    @property
    def words(self) -> str:
        """The counts, in words."""
        counts = {
            "int8 weights": self.int8,
            "int4 weights": self.int4,
            "int32 biases": self.biases,
            "grids on layers' inputs": self.inputs,
            "grids between layers": self.edges,
            "layers with dynamic inputs": self.dynamic,
        }
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no integers"


def in_integers(model: Any, parameters: Mapping[str, Tensor], *, int4: bool) -> Integers:
    """Puts the graph's weights and biases into integers; grids on inputs are there (`markers.mark`). Saves 4x bytes."""
    _absorb_pads(model)
    weights = integer_weights(model, parameters, int4=int4)
    _float_ends(model)
    biases = _biases(model)
    dynamic, left = _dynamic(model)
    _widen_clips(model)
    inputs = sum(is_standard(node, "QuantizeLinear") for node in model.graph)
    remove_unused(model)
    notes = (*weights.notes, *left, *_symmetric(model))
    return Integers(weights.int8, weights.int4, biases, inputs, 0, dynamic, notes)


def _symmetric(model: Any) -> list[str]:
    """ONNX Runtime leaves a Relu out only before a grid of least value 0, and computes in floats else: measured 4x."""
    count = 0
    for node in model.graph:
        grid = affine_of(node) if is_standard(node, "QuantizeLinear") else None
        if grid is not None and grid.ends[0] < 0 and is_standard(node.inputs[0].producer(), "Relu"):
            count += 1
    if not count:
        return []
    return [
        f"{count} grids with values below 0 read what a Relu gives: ONNX Runtime computes the layers before them in floating "
        "point, slower than without any grid. Quantize with activation_symmetric=False."
    ]


def _absorb_pads(model: Any) -> None:
    """A Pad with zeros, then Q, DQ, Conv: the conv pads by itself, since zero is on every grid. Else Pad is a pass."""
    for node in list(model.graph):
        quantize: Any = next(iter(node.outputs[0].consumers()), None) if is_standard(node, "Pad") else None
        if not is_standard(quantize, "QuantizeLinear") or len(list(node.outputs[0].uses())) != 1:
            continue
        convs = [conv for dq in quantize.outputs[0].consumers() for conv in dq.outputs[0].consumers()]
        pads = constant(node.inputs[1])
        fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.float32(0)
        plain = len(node.inputs) < 4 or node.inputs[3] is None
        if pads is None or fill is None or fill.any() or not plain or attribute(node, "mode", "constant") != "constant":
            continue
        begins, ends = pads[: pads.size // 2].tolist(), pads[pads.size // 2 :].tolist()
        if min(pads) < 0 or any((*begins[:2], *ends[:2])) or not all(_pads_itself(conv) for conv in convs):
            continue
        for conv in convs:
            own = attribute(conv, "pads", [0] * (pads.size - 4))
            total = [a + b for a, b in zip(own, begins[2:] + ends[2:], strict=True)]
            conv.attributes["pads"] = ir().AttrInt64s("pads", total)
        quantize.replace_input_with(0, node.inputs[0])


def _pads_itself(node: Any) -> bool:
    return bool(is_standard(node, "Conv")) and attribute(node, "auto_pad", "NOTSET") == "NOTSET"


def _float_ends(model: Any) -> None:
    """A Gemm with no output grid becomes a MatMul, for which alone ONNX Runtime has an integer kernel with floats out.

    The bias is subtracted with its sign turned: MatMul and Add would be fused to a Gemm again, before any Q and DQ.
    """
    for node in list(model.graph):
        if not is_standard(node, "Gemm") or not (is_integer(node) or is_dynamic(node)) or _ends_in_integers(node):
            continue
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0 or attribute(node, "transA", 0):
            continue
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
            continue
        graph, output, name = node.graph, node.outputs[0], node.outputs[0].name
        weight: Any = node.inputs[1].producer()
        table = weight.outputs[0]
        if attribute(node, "transB", 0):
            q = np.ascontiguousarray(np.asarray(constant(weight.inputs[0])).T)
            inputs = [new_constant(graph, f"{weight.inputs[0].name}_t", q), weight.inputs[1]]
            table = add_node(node, "DequantizeLinear", inputs, f"{name}_weight", {"axis": 1})
        product = add_node(node, "MatMul", [node.inputs[0], table], f"{name}_product")
        product.type, product.shape = output.type, output.shape
        if bias is not None:
            turned = new_constant(graph, f"{node.inputs[2].name}_negative", -bias)
            product = add_node(node, "Sub", [product, turned], f"{name}_sum")
            product.type, product.shape = output.type, output.shape
        _take_over(output, product)


def _ends_in_integers(node: Any) -> bool:
    """Whether all that a layer's output goes to, a Relu aside, is one QuantizeLinear."""
    value = node.outputs[0]
    users = list(value.consumers())
    while len(users) == 1 and is_standard(users[0], "Relu", "Clip"):
        users = list(users[0].outputs[0].consumers())
    return len(users) == 1 and bool(is_standard(users[0], "QuantizeLinear"))


def _biases(model: Any) -> int:
    """int32 at the products' scale, as accumulators are: an error of half a unit there, far below any grid's step."""
    count = 0
    for node in list(model.graph):
        if not is_standard(node, "Conv", "Gemm") or len(node.inputs) < 3 or not is_integer(node):
            continue
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            continue
        bias, grid = constant(node.inputs[2]), quantized_by(node.inputs[0])
        scales = constant(node.inputs[1].producer().inputs[1])
        if bias is None or grid is None or scales is None or bias.shape != scales.shape:
            continue
        scale = np.float32(grid.scale) * scales
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            q = np.rint(bias.astype(np.float64) / scale)
        if not np.isfinite(q).all() or np.abs(q).max() >= 2**31:
            continue  # a row whose weights are next to nothing has a scale that no int32 reaches the bias with
        name = node.inputs[2].name
        inputs = [
            new_constant(node.graph, f"{name}_q", q.astype(np.int32)),
            new_constant(node.graph, f"{name}_scale", scale),
        ]
        node.replace_input_with(
            2, add_node(node, "DequantizeLinear", inputs, f"{node.outputs[0].name}_bias", {"axis": 0})
        )
        count += 1
    return count


def _dynamic(model: Any) -> tuple[int, list[str]]:
    """How many matrix products take inputs with dynamic grids, and a note on other layers that do.

    They stay QDQ: ONNX Runtime fuses that as well as MatMulInteger, and OpenVINO computes it twice as fast.
    """
    count = 0
    left: list[str] = []
    for node in model.graph:
        if is_dynamic(node):
            count += 1
            continue
        source: Any = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if is_standard(source, "DequantizeLinear") and is_standard(
            source.inputs[0].producer(), "DynamicQuantizeLinear"
        ):
            last = _past_moves(node)
            left.append(f"{last.op_type} {last.outputs[0].name}")
    if not left:
        return count, []
    note = (
        f"Rounded to each call's grid, and computed in floating point: {', '.join(left)}. A dynamic grid saves time in "
        "matrix products alone, by symmetric weights with one scale a row."
    )
    return count, [note]


def _past_moves(node: Any) -> Any:
    """The first op behind that does more than move data."""
    while is_standard(node, "Transpose", "Reshape", "Unsqueeze", "Squeeze"):
        users = list(node.outputs[0].consumers())
        if not users:
            break
        node = users[0]
    return node


def _take_over(old: Any, new: Any) -> None:
    """`new` is read wherever `old` was, under its name."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_unused", name
    old.producer().graph.remove(old.producer(), safe=True)


def with_edges(path: Path, calibration: Iterable[Any], target: Path, scratch: Path) -> int:
    """Writes `path` to `target` with grids on edges between its quantized layers; the answer is how many are new."""
    tools = ir()
    model = tools.load(str(path))
    edges = find_edges(model.graph)
    names = edges.unknown
    ranges = record_ranges(path, names, calibration, scratch) if names else {}
    new = place_edges(edges, lambda shared: affine(ranges[name] for name in shared))
    _biases(model)
    _widen_clips(model)
    remove_unused(model)
    tools.save(model, str(target))
    return new


def _widen_clips(model: Any) -> None:
    """A Clip whose end is the grid's but for rounding is moved to it: ONNX Runtime leaves it out then and only then."""
    for node in model.graph:
        clip = node.inputs[0].producer() if is_standard(node, "QuantizeLinear") else None
        grid = affine_of(node)
        if clip is None or grid is None or not is_standard(clip, "Clip") or len(list(clip.outputs[0].uses())) != 1:
            continue
        for index, end, away in ((1, grid.ends[0], -1), (2, grid.ends[1], 1)):
            bound = constant(clip.inputs[index]) if len(clip.inputs) > index else None
            if bound is not None and 0 < away * (end - float(bound)) < 1e-3 * grid.scale:
                moved = np.nextafter(np.float32(end), np.float32(away * np.inf))
                clip.replace_input_with(index, new_constant(model.graph, f"{clip.outputs[0].name}_end", moved))


def edges_without_ranges(path: Path) -> int:
    """How many values of a file would get grids if there were data to take their ranges from."""
    return len(find_edges(ir().load(str(path)).graph).unknown)


def without_integers(path: Path, target: Path) -> None:
    """Writes the same network in float32: weights dequantized, no grids. What an integer file is to be timed against.

    Raises `ArtefactError` for a file that cannot be read.
    """
    tools = ir()
    model = tools.load(str(path))
    for node in list(model.graph):
        if is_standard(node, "DequantizeLinear"):
            array = constant(node.inputs[0])
            source = node.inputs[0].producer()
            if array is not None:
                value = new_constant(model.graph, f"{node.outputs[0].name}_float", _dequantized(node, array))
            elif is_standard(source, "QuantizeLinear", "DynamicQuantizeLinear"):
                value = source.inputs[0]
            else:
                continue
            if node.outputs[0].is_graph_output():
                value = _named(node, value)
            node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    remove_unused(model)
    tools.save(model, str(target))


def _named(node: Any, value: Any) -> Any:
    """An Identity that keeps an output's name."""
    name = node.outputs[0].name
    node.outputs[0].name = f"{name}_rounded"
    answer = add_node(node, "Identity", [value], name)
    answer.type, answer.shape = node.outputs[0].type, node.outputs[0].shape
    return answer


def _dequantized(node: Any, q: NDArray[Any]) -> NDArray[np.float32]:
    """What a DequantizeLinear makes of constant integers."""
    scale, zero = np.asarray(constant(node.inputs[1])), np.asarray(0, np.int8)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero = np.asarray(constant(node.inputs[2]))
    return dequantize(q, scale, zero, attribute(node, "axis", 1), attribute(node, "block_size", 0))
