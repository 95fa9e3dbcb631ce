# SPDX-License-Identifier: Apache-2.0
"""Grids on the edges between quantized layers: outputs of convs, sums, products, concatenations and pooling.

A model has grids on the inputs of layers. An integer runtime needs more: a convolution writes integers only where its
output has a grid, and a residual sum is done in integers only where both of its inputs and its output have one. These
edges are found on the exported graph, where they are all there, and none is hidden in Python.

An edge gets a grid where integers can come in and go on. Ops that only move data, pooling and concatenation share one
grid with what they read, so that they copy integers; where a layer's own grid stands on such an edge, that is the one.
What comes through a Relu does without the others' negative values: then a concatenation requantizes it. Norms, softmax,
activations other than Relu and Clip, and whatever feeds only these, stay in floating point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from featherweight.deploy.nodes import Affine, affine_of, constant, is_standard, quantize_between

__all__ = ["Edges", "find_edges", "is_dynamic", "is_integer", "place_edges", "quantized_by"]

_MOVES = (
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Identity",
    "DepthToSpace",
    "SpaceToDepth",
)
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_JOINS = ("Add", "Mul", "Sub")
_CLAMPS = ("Relu", "Clip")


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
    """Values that are to have a grid, in classes that share one: (values, the grid that is there already or None)."""

    classes: tuple[tuple[tuple[Any, ...], Affine | None], ...]
    integer: frozenset[Any]  # values that an integer op makes: all that reads them reads the rounded value
    clamped: frozenset[Any]  # values behind a Relu or a Clip at 0, which is free where 0 is the grid's least value
    takers: frozenset[Any]  # the integer ops that read values; other readers of a value made in floating point keep it

    @property
    def unknown(self) -> list[str]:
        """Names of values whose range has to be recorded."""
        return [
            value.name
            for values, grid in self.classes
            for value in values
            if grid is None or (grid.ends[0] < 0 and value in self.clamped)
        ]


def quantized_by(value: Any) -> Affine | None:
    """The grid of a value that comes out of a static DequantizeLinear of 8 bits."""
    node: Any = value.producer() if value is not None else None
    return affine_of(node) if is_standard(node, "DequantizeLinear") and constant(node.inputs[0]) is None else None


def is_integer(node: Any) -> bool:
    """Whether input and weight are integers such as kernels take: a weight with one scale a row, no zero points."""
    return bool(is_standard(node, "Conv", "ConvTranspose", "Gemm", "MatMul")) and (
        quantized_by(node.inputs[0]) is not None and _plain_weight(node)
    )


def is_dynamic(node: Any) -> bool:
    """Whether a matrix product takes an input with the grid of each call, and such a weight."""
    if not is_standard(node, "Gemm", "MatMul"):
        return False
    source = node.inputs[0].producer()
    dynamic = is_standard(source, "DequantizeLinear") and is_standard(
        source.inputs[0].producer(), "DynamicQuantizeLinear"
    )
    return bool(dynamic) and _plain_weight(node)


def _plain_weight(node: Any) -> bool:
    weight = node.inputs[1].producer()
    if not is_standard(weight, "DequantizeLinear") or constant(weight.inputs[0]) is None:
        return False
    return len(weight.inputs) < 3 and "block_size" not in weight.attributes


def _markers(value: Any) -> Iterator[tuple[Any, Affine]]:
    """The QuantizeLinear nodes of layers' own grids that read a value."""
    for node, index in value.uses():
        grid = affine_of(node) if index == 0 and is_standard(node, "QuantizeLinear") else None
        if grid is not None:
            yield node, grid


def _after(node: Any) -> Any:
    """What a layer gives once its Relu or Clip, which requantization does for nothing, is through."""
    value = node.outputs[0]
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output() or not is_standard(uses[0][0], *_CLAMPS) or uses[0][1] != 0:
            return value
        value = uses[0][0].outputs[0]


class _Classes:
    """Union-find over values."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def find(self, value: Any) -> Any:
        while self.parent.setdefault(value, value) is not value:
            value = self.parent[value]
        return value

    def join(self, a: Any, b: Any) -> None:
        self.parent[self.find(a)] = self.find(b)


def find_edges(graph: Any) -> Edges:
    """Which values of a graph with grids on its layers' inputs are to have one as well; changes nothing."""
    able, made = _able(graph)
    needed = _needed(graph, able, made)
    classes = _Classes()
    integer, takers = set(), set()
    for value, node in made.items():
        if value not in needed:
            continue
        integer.add(value)
        takers.add(node)
        classes.find(value)
        for source in _sources(node):
            if is_standard(node, "Concat", *_MOVES, *_POOLS):
                classes.join(source, value)
            elif is_standard(node, *_JOINS, *_CLAMPS):
                classes.find(source)
    groups: dict[Any, list[Any]] = {}
    for value in classes.parent:
        groups.setdefault(classes.find(value), []).append(value)
    found = [(tuple(values), _fixed(values)) for values in groups.values()]
    clamped = frozenset(value for value in integer if _clamped(value))
    return Edges(tuple(found), frozenset(integer), clamped, frozenset(takers))


def _clamped(value: Any) -> bool:
    """Whether a convolution or a sum gives a value through a Relu or a Clip from 0 on."""
    node = value.producer()
    if not is_standard(node, *_CLAMPS) or not is_standard(node.inputs[0].producer(), "Conv", *_JOINS):
        return False
    low = constant(node.inputs[1]) if is_standard(node, "Clip") and len(node.inputs) > 1 else None
    return bool(is_standard(node, "Relu")) or (low is not None and float(low) >= 0)


def _sources(node: Any) -> list[Any]:
    """The computed inputs of data: all of a sum, product or concatenation, else the first."""
    many = is_standard(node, "Concat", *_JOINS)
    return [value for value in (node.inputs if many else node.inputs[:1]) if constant(value) is None]


def _able(graph: Any) -> tuple[set[Any], dict[Any, Any]]:
    """Values that can come as integers; and those of them that an integer op would make, with that op."""
    able = {value for value in graph.inputs if any(_markers(value))}
    made: dict[Any, Any] = {}
    for node in graph:
        output = node.outputs[0]
        if is_standard(node, "Conv") and is_integer(node):
            made[_after(node)] = node
        elif is_standard(node, *_JOINS):
            sources = _sources(node)
            if len(sources) == 2 and all(value in able for value in sources):
                made[_after(node)] = node
        elif is_standard(node, "Concat", *_MOVES, *_POOLS, *_CLAMPS) and output not in made:
            sources = _sources(node)
            if sources and all(value in able for value in sources):
                made[output] = node
        if output in made or any(_markers(output)) or quantized_by(output) is not None:
            able.add(output)
    return able, made


def _needed(graph: Any, able: set[Any], made: Mapping[Any, Any]) -> set[Any]:
    """Of these values those that some integer op goes on with, and outputs of convs."""
    needed = set()
    takers: dict[Any, list[Any]] = {}
    for value, node in made.items():
        for source in _sources(node):
            takers.setdefault(source, []).append(value)
    for value in reversed([value for node in graph for value in node.outputs[:1]]):
        if value in able and (
            any(_markers(value))
            or any(taker in needed for taker in takers.get(value, ()))
            or (value in made and is_standard(made[value], "Conv"))
        ):
            needed.add(value)
    return needed


def _fixed(values: Iterable[Any]) -> Affine | None:
    """The widest of the layers' own grids on these values: with it nothing saturates that did not before."""
    grids = [grid for value in values for _, grid in _markers(value)]
    grids += [grid for value in values if (grid := quantized_by(value)) is not None]
    return max(grids, key=lambda grid: grid.scale, default=None)


def place_edges(edges: Edges, grid_of: Callable[[tuple[str, ...]], Affine]) -> int:
    """Puts the grids into the graph; `grid_of` gives one to values that have none. The answer is how many are new."""
    new = 0
    for values, fixed in edges.classes:
        grid = fixed if fixed is not None else grid_of(tuple(value.name for value in values))
        for value in values:
            if quantized_by(value) is not None:
                continue
            # ONNX Runtime computes a conv in floating point if its Relu has to be done; QLinearConcat takes any grids.
            alone = grid.ends[0] < 0 and value in edges.clamped
            own = (
                next((own for _, own in _markers(value) if own.ends[0] >= 0), None) or grid_of((value.name,))
                if alone
                else grid
            )
            new += _place(value, own, edges)
    return new


def _place(value: Any, grid: Affine, edges: Edges) -> int:
    """One value: all that read it read its rounding, if an integer op makes it; else only integer ops do."""
    integer = value in edges.integer
    same = [node for node, other in _markers(value) if other == grid]
    rounded = [dq.outputs[0] for node in same for dq, _ in node.outputs[0].uses()]
    keep = {dq.producer().inputs[0].producer() for dq in rounded}
    users = [
        (node, index) for node, index in list(value.uses()) if node not in keep and (integer or node in edges.takers)
    ]
    outputs = value.is_graph_output() and integer
    if not users and not outputs:
        return 0
    if rounded:
        for node, index in users:
            node.replace_input_with(index, rounded[0])
        answer, new = rounded[0], 0
    else:
        answer, new = quantize_between(value, grid, users, value.name), 1
    if outputs:
        _rename_output(value, answer)
    return new


def _rename_output(value: Any, rounded: Any) -> None:
    """The graph's output is the rounded value, under the output's name."""
    graph = value.producer().graph
    name = value.name
    value.name, rounded.name = f"{name}_float", name
    rounded.type, rounded.shape = value.type, value.shape
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = rounded
