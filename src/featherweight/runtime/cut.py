# SPDX-License-Identifier: Apache-2.0
"""Cuts a graph into parts that take turns: own nodes, foreign ones, own ones again, as few parts as dependencies allow.

A part is a model of its own. What follows from constants alone is repeated in each part that reads it, and what follows
from shapes alone (the target of a Reshape) is told apart, since a plan may be made for it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from featherweight.errors import require

__all__ = ["Graph", "Piece", "cut", "foreign_ops", "model_of", "read_graph"]

# An own part without one of these is not worth the way out of ONNX Runtime and back.
_PRODUCTS = {"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"}
# From here on a constant's elements are left out where only types are asked for.
_SMALL_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Graph:
    """A model's graph in topological order, without what no output needs. `reads` has what subgraphs capture, too."""

    proto: Any
    nodes: tuple[Any, ...]
    reads: tuple[tuple[str, ...], ...]
    maker: Mapping[str, int]
    constants: Mapping[str, Any]  # initializers, dense and sparse
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: Mapping[str, Any]  # TypeProto, where it is known


@dataclasses.dataclass(frozen=True)
class Piece:
    """Nodes that one runtime runs, in order. `of_shapes` are inputs that change with the model's input shapes alone."""

    own: bool
    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    of_shapes: frozenset[str]


def read_graph(proto: Any) -> Graph:
    """Of a ModelProto, whose local functions are put in where they are called."""
    onnx = require("onnx", extra="onnx")
    if proto.functions:
        proto = require("onnx.inliner", extra="onnx").inline_local_functions(proto)
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    outputs = tuple(value.name for value in graph.output)
    nodes = _sorted(list(graph.node), outputs)
    return Graph(
        proto=proto,
        nodes=tuple(nodes),
        reads=tuple(tuple(dict.fromkeys(_reads(node))) for node in nodes),
        maker={name: i for i, node in enumerate(nodes) for name in node.output if name},
        constants=constants,
        inputs=tuple(value.name for value in graph.input if value.name not in constants),
        outputs=outputs,
        types=_types(onnx, proto),
    )


def _reads(node: Any) -> list[str]:
    """The values that a node reads, those that its subgraphs take from around them included."""
    found = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inside = {value.name for value in graph.input}
            inside |= {tensor.name for tensor in graph.initializer}
            inside |= {tensor.values.name for tensor in graph.sparse_initializer}
            inside |= {name for each in graph.node for name in each.output}
            names = [name for each in graph.node for name in _reads(each)] + [value.name for value in graph.output]
            found += [name for name in names if name not in inside]
    return found


def _sorted(nodes: list[Any], outputs: Iterable[str]) -> list[Any]:
    """Those that the outputs need, each after what it reads; else in the file's order."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = [{maker[name] for name in _reads(node) if name in maker} for node in nodes]
    wanted: set[int] = set()
    waiting = [maker[name] for name in outputs if name in maker]
    while waiting:
        index = waiting.pop()
        if index not in wanted:
            wanted.add(index)
            waiting += needs[index]
    if all(max(needs[i], default=-1) < i for i in wanted):
        return [nodes[i] for i in sorted(wanted)]
    order = [i for group in _alternate(sorted(wanted), needs, dict.fromkeys(wanted, True)) for i in group]
    return [nodes[i] for i in order]


def _types(onnx: Any, proto: Any) -> dict[str, Any]:
    """Of values whose types are declared or can be inferred; weights take no part in that."""
    light = _without_weights(onnx, proto)
    try:
        inferred = onnx.shape_inference.infer_shapes(light).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        inferred = light.graph
    values = [*inferred.value_info, *inferred.output, *inferred.input]
    return {value.name: value.type for value in values if value.type.WhichOneof("value")}


def _without_weights(onnx: Any, proto: Any) -> Any:
    light = onnx.ModelProto(ir_version=max(proto.ir_version, 4), opset_import=proto.opset_import)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    declared = {value.name for value in graph.input}
    for tensor in proto.graph.initializer:
        if _bytes(tensor) < _SMALL_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def _bytes(tensor: Any) -> int:
    """Close enough: what is stored in other fields than raw_data is small, or counted by its elements."""
    return len(tensor.raw_data) or 8 * _count(tensor.dims)


def _count(dims: Iterable[int]) -> int:
    size = 1
    for each in dims:
        size *= each
    return size


def foreign_ops(graph: Graph, ops: Collection[str], types: Collection[int]) -> dict[int, str]:
    """Nodes that the core cannot run whatever the shapes, by index, with the reason. `types` are those it can hold."""
    found = {}
    for index, node in enumerate(graph.nodes):
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            continue
        if node.domain not in ("", "ai.onnx") or node.op_type not in ops:
            found[index] = "the engine has no such op"
            continue
        known = [graph.types[name] for name in (*node.input, *node.output) if name in graph.types]
        if any(not _held(each, types) for each in known):
            found[index] = "it handles values that the engine cannot hold"
    return found


def _held(value: Any, types: Collection[int]) -> bool:
    return value.WhichOneof("value") == "tensor_type" and value.tensor_type.elem_type in types


def cut(graph: Graph, foreign: Collection[int]) -> tuple[Piece, ...]:
    """In the order of running. Own nodes that stand without a product among foreign ones go with these."""
    still = _still(graph, foreign)
    moving = [i for i in range(len(graph.nodes)) if i not in still]
    needs = {i: {graph.maker[n] for n in graph.reads[i] if n in graph.maker} - still for i in moving}
    own = {i: i not in foreign for i in moving}
    groups = _alternate(moving, needs, own)
    while light := [i for g in groups if own[g[0]] and len(groups) > 1 and not _has_product(graph, g) for i in g]:
        own |= dict.fromkeys(light, False)
        groups = _alternate(moving, needs, own)
    of_shapes = _of_shapes(graph, foreign)
    where = {name: number for number, g in enumerate(groups) for i in g for name in graph.nodes[i].output}
    wanted: dict[str, set[int]] = {name: {-1} for name in graph.outputs}
    closed = [_with_still(graph, group, still) for group in groups]
    for number, group in enumerate(closed):
        for i in group:
            for name in graph.reads[i]:
                wanted.setdefault(name, set()).add(number)
    return tuple(
        _piece(
            graph,
            own[groups[number][0]],
            group,
            of_shapes,
            [n for n in where if where[n] == number and wanted.get(n, set()) - {number}],
        )
        for number, group in enumerate(closed)
    )


def _has_product(graph: Graph, group: Iterable[int]) -> bool:
    return any(graph.nodes[i].op_type in _PRODUCTS for i in group)


def _piece(graph: Graph, own: bool, nodes: Sequence[int], of_shapes: Collection[str], outputs: Sequence[str]) -> Piece:
    made = {name for i in nodes for name in graph.nodes[i].output}
    reads = dict.fromkeys(name for i in nodes for name in graph.reads[i])
    inputs = tuple(name for name in reads if name not in made and name not in graph.constants)
    return Piece(own, tuple(nodes), inputs, tuple(outputs), frozenset(of_shapes) & frozenset(inputs))


def _still(graph: Graph, foreign: Collection[int]) -> set[int]:
    """Nodes that follow from constants alone, but for those that make an output of the model."""
    found: set[int] = set()
    for i, node in enumerate(graph.nodes):
        if i in foreign or any(name in graph.outputs for name in node.output):
            continue
        if all(name in graph.constants or graph.maker.get(name) in found for name in graph.reads[i]):
            found.add(i)
    return found


def _of_shapes(graph: Graph, foreign: Collection[int]) -> set[str]:
    """Values that follow from shapes and constants alone, and the same each time."""
    found: set[str] = set()
    known = set(graph.constants)
    for i, node in enumerate(graph.nodes):
        if i not in foreign and all(name in known for name in graph.reads[i]):
            known.update(node.output)
            found.update(name for name in node.output if any(each in found for each in graph.reads[i]))
        if node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx"):
            known.update(node.output)
            found.update(node.output)
    return found


def _with_still(graph: Graph, group: Iterable[int], still: Collection[int]) -> list[int]:
    """A group with the still nodes that it needs, in topological order."""
    found = set(group)
    waiting = list(found)
    while waiting:
        needs = {graph.maker[name] for name in graph.reads[waiting.pop()] if name in graph.maker}
        fresh = {i for i in needs if i in still} - found
        found |= fresh
        waiting += fresh
    return sorted(found)


def _alternate(nodes: Sequence[int], needs: Any, own: Mapping[int, bool]) -> list[list[int]]:
    """Groups of one colour in an order that dependencies allow; each takes all that it can, so that they are fewest."""
    both = [_greedy(nodes, needs, own, first) for first in (True, False)]
    return min(both, key=len)


def _greedy(nodes: Sequence[int], needs: Any, own: Mapping[int, bool], colour: bool) -> list[list[int]]:
    missing = {i: len(needs[i]) for i in nodes}
    readers: dict[int, list[int]] = {i: [] for i in nodes}
    for i in nodes:
        for each in needs[i]:
            readers[each].append(i)
    ready = {True: deque[int](), False: deque[int]()}
    for i in nodes:
        if not missing[i]:
            ready[own[i]].append(i)
    groups: list[list[int]] = []
    while ready[True] or ready[False]:
        group: list[int] = []
        while ready[colour]:
            index = ready[colour].popleft()
            group.append(index)
            for reader in readers[index]:
                missing[reader] -= 1
                if not missing[reader]:
                    ready[own[reader]].append(reader)
        if group:
            groups.append(group)
        colour = not colour
    return groups


def model_of(graph: Graph, piece: Piece, types: Mapping[str, Any]) -> Any:
    """A piece as a ModelProto. Between pieces values have types but no shapes: these would only bind what is true."""
    onnx = require("onnx", extra="onnx")
    proto = graph.proto
    made = onnx.ModelProto(ir_version=max(proto.ir_version, 4), opset_import=proto.opset_import)
    made.graph.name = proto.graph.name or "part"
    made.graph.node.extend(graph.nodes[i] for i in piece.nodes)
    reads = {name for i in piece.nodes for name in graph.reads[i]}
    for name, tensor in graph.constants.items():
        if name in reads:
            sparse = isinstance(tensor, onnx.SparseTensorProto)
            (made.graph.sparse_initializer if sparse else made.graph.initializer).append(tensor)
    declared = {value.name: value for value in proto.graph.input}
    for name in piece.inputs:
        made.graph.input.append(declared[name] if name in declared else _value(onnx, name, types))
    for name in piece.outputs:
        made.graph.output.append(_value(onnx, name, types))
    return made


def _value(onnx: Any, name: str, types: Mapping[str, Any]) -> Any:
    value = onnx.ValueInfoProto(name=name)
    if name in types:
        value.type.CopyFrom(types[name])
        if value.type.WhichOneof("value") == "tensor_type":
            value.type.tensor_type.ClearField("shape")
    return value
