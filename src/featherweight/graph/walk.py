# SPDX-License-Identifier: Apache-2.0
"""The walk over a graph: each op's rule says how labels go through it. What has no rule freezes what it touches."""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.errors import GraphError
from featherweight.graph.capture import Captured, owner_of, source_of
from featherweight.graph.couplings import Role
from featherweight.graph.join import Join, Value, aligned, vector
from featherweight.graph.labels import Labels, expand, free_along, keep_axis, shrink, tidy, varies

__all__ = ["Axis", "Call", "Extent", "Product", "Rule", "Walk", "describe", "execute", "plain"]

Extent = tuple[int, int, tuple[Tensor, ...]]  # how many positions an axis has, which axis it is, and planes along it


@dataclasses.dataclass(eq=False)
class Axis:
    """One axis of a tensor of the model: its positions are the labels from `first` on."""

    tensor: str
    axis: int
    first: int
    size: int
    role: Role | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """An op whose sizes are to be told: its output's axes, and what its multiply-adds are a product of."""

    node: torch.fx.Node
    op: str
    weight: str | None
    output: tuple[Extent, ...]
    macs: tuple[int, tuple[Extent, ...]] = (0, ())


@dataclasses.dataclass(eq=False)
class Call:
    """One op at work: its arguments by name, with values in place of nodes, and the shapes that it gives."""

    node: torch.fx.Node
    name: str
    args: dict[str, Any]
    out: Any  # a shape, or a sequence of shapes

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    @property
    def values(self) -> list[Value]:
        """All tensors among the arguments."""
        found: list[Value] = []
        for argument in self.args.values():
            items = argument if isinstance(argument, list | tuple) else [argument]
            found += [item for item in items if isinstance(item, Value)]
        return found


Rule = Callable[["Walk", Call], Any]


class Walk:
    """The state of one walk: labels, the model's axes, what has statistics, and what is to be told in the end."""

    def __init__(self, captured: Captured, grain: Literal["heads", "dims"], deadline: float) -> None:
        self.labels = Labels()
        self.joiner = Join(self.labels, grain)
        self.captured, self.deadline = captured, deadline
        self.state = captured.state
        self.axes: list[Axis] = []
        self.values: dict[str, Value] = {}  # of the model's tensors
        self.planes: list[Tensor] = []  # of several axes, to be made rectangular in the end
        self.products: list[Product] = []
        self.statistics: list[tuple[Tensor, str]] = []
        self.unknown: dict[str, int] = {}
        self.weights: dict[str, str] = {}  # tensors that layers multiply by, and the op
        self.slices: dict[tuple[int, int], list[tuple[int, Value]]] = {}
        self.found: dict[torch.fx.Node, Any] = {}  # the values of all nodes
        self._live: set[torch.fx.Node] = set()
        self._concrete: dict[torch.fx.Node, Any] = {}

    # What rules call ---------------------------------------------------------------------------------------------

    def freeze(self, value: Value, why: str) -> None:
        for plane in value.planes:
            self.labels.freeze(plane.reshape(-1), why)

    def vector(self, value: Value, axis: int) -> Tensor | None:
        """The labels along an axis, at full size; None where nothing along it is a channel."""
        found = vector(self.labels, value, axis % len(value.shape))
        return None if found is None else found

    def pin(self, value: Value, axes: Sequence[int], why: str) -> Value:
        return self.joiner.pin(value, [axis % len(value.shape) for axis in axes], why)

    def pointwise(self, values: Sequence[Value], why: str = "it meets a tensor without channels") -> Value:
        """Values that broadcast against each other."""
        if values and all(value.uniform for value in values):
            return Value(tuple(np.broadcast_shapes(*(v.shape for v in values))), (), True)
        shape = tuple(np.broadcast_shapes(*(value.shape for value in values)))
        return Value(shape, self.joiner.join([aligned(value, len(shape)) for value in values], why))

    def contract(
        self, call: Call, values: Sequence[Value], words: Sequence[str], output: str, weight: Value | None = None
    ) -> Value:
        """A sum of products; its multiply-adds are told."""
        value, sizes = self.joiner.contract(values, words, output)
        for operand, word in zip(values, words, strict=True):
            if operand is weight:
                self.role(
                    operand, {axis: "output" if letter in output else "input" for axis, letter in enumerate(word)}
                )
            else:  # learned tokens, say, which no layer makes
                self.role(operand, dict.fromkeys(range(len(word)), "output"))
        name = None if weight is None else weight.tensor
        if name is not None:
            self.weights.setdefault(name, call.name)
        self.tell(call, value, (1, tuple(sizes.values())), name)
        return value

    def tell(
        self, call: Call, value: Value, macs: tuple[int, tuple[Extent, ...]] = (0, ()), weight: str | None = None
    ) -> None:
        output = tuple(self.extent(value, axis) for axis in range(len(value.shape)))
        self.products.append(Product(call.node, call.name, weight, output, macs))

    def extent(self, value: Value, axis: int) -> Extent:
        axis %= len(value.shape)
        return value.shape[axis], axis, tuple(plane for plane in value.planes if plane.shape[axis] > 1)

    def role(self, value: Value, roles: Mapping[int, Role]) -> None:
        """What the axes of the model's tensors in this value are to the op; the first word counts, output above all."""
        if value.tensor is None:
            return
        for axis, role in roles.items():
            found = self.vector(value, axis)
            if found is None:
                continue
            for own in self.axes_of(found):
                if own.role is None or role == "output":
                    own.role = role

    def axes_of(self, labels: Tensor) -> list[Axis]:
        ids = np.unique(labels.numpy())
        ids = ids[ids > 0]
        starts = np.array([axis.first for axis in self.axes])
        return [self.axes[i] for i in np.unique(np.searchsorted(starts, ids, side="right") - 1)]

    def measure(self, labels: Tensor, op: str) -> None:
        """A statistic is taken over these channels: cutting one changes it. What no output follows from is not told."""
        if self.labels.now in self._live:
            self.statistics.append((labels.reshape(-1), f"{op} at {self.where()}"))

    @property
    def heard(self) -> set[str]:
        """The model's tensors that an output follows from."""
        return {name for node, name in self.captured.tensors.items() if node in self._live}

    def where(self) -> str:
        node = self.labels.now
        return source_of(node) if isinstance(node, torch.fx.Node) else ""

    def concrete(self, node: Any) -> Any:
        """What a node computes, if no input and no parameter is in it; None otherwise."""
        if not isinstance(node, torch.fx.Node):
            return node
        if node not in self._concrete:
            self._concrete[node] = self._compute(node)
        return self._concrete[node]

    def _compute(self, node: torch.fx.Node) -> Any:
        if node in self.captured.constants:
            return self.captured.constants[node]
        if node in self.captured.tensors:
            tensor = self.state[self.captured.tensors[node]]
            return None if isinstance(tensor, nn.Parameter) else tensor
        if node.op != "call_function":
            return None
        args = torch.fx.node.map_arg((node.args, dict(node.kwargs)), self.concrete)
        missing = [n for n in node.all_input_nodes if self._concrete.get(n) is None]
        if missing or not callable(node.target):
            return None
        with torch.no_grad():
            return node.target(*args[0], **args[1])

    # The walk ----------------------------------------------------------------------------------------------------

    def run(self, rules: Mapping[str, Rule]) -> None:
        self.graph(self.captured.module, None, rules)
        self._rectangular()

    def graph(self, module: torch.fx.GraphModule, given: Sequence[Any] | None, rules: Mapping[str, Rule]) -> Any:
        """Values through one graph; `given` are a subgraph's inputs, None for the whole's."""
        env: dict[torch.fx.Node, Any] = {}
        inputs = iter(given or ())
        self._live |= _live(module.graph)
        for node in module.graph.nodes:
            if time.monotonic() > self.deadline:
                raise GraphError(
                    f"tracing took longer than `seconds` allows; it stood at {source_of(node) or node.name}. Give more seconds, "
                    "or smaller example inputs."
                )
            self.labels.now = node
            if node.op == "placeholder":
                env[node] = next(inputs) if given is not None else self._given(node)
            elif node.op == "get_attr":
                env[node] = (
                    self._given(node)
                    if isinstance(getattr(module, str(node.target), None), Tensor)
                    else getattr(module, str(node.target))
                )
            elif node.op == "output":
                outputs = torch.fx.node.map_arg(node.args[0], lambda n: env[n])
                if given is None:
                    for value in torch.utils._pytree.tree_leaves(outputs):
                        if isinstance(value, Value):
                            self.freeze(value, "it is an output of the model")
                return outputs
            else:
                env[node] = self._call(node, env, rules)
            if node in env:
                self.found[node] = env[node]
        return None

    def _given(self, node: torch.fx.Node) -> Value:
        name = self.captured.tensors.get(node)
        if name is None:
            return Value(_shape(node))
        if name not in self.values:
            self.values[name] = self._own(name, tuple(self.state[name].shape))
        return self.values[name]

    def _own(self, name: str, shape: tuple[int, ...]) -> Value:
        """A tensor of the model: each axis has labels of its own."""
        planes = []
        for axis, size in enumerate(shape):
            own = Axis(name, axis, self.labels.count, size)
            ids = self.labels.fresh(size)
            self.axes.append(own)
            if size == 1:
                self.labels.freeze(ids, "it is the only position")
            else:
                planes.append(ids.reshape((1,) * axis + (size,) + (1,) * (len(shape) - axis - 1)))
        return Value(shape, tuple(planes), tensor=name)

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], rules: Mapping[str, Rule]) -> Any:
        if node.target is operator.getitem:
            source, at = env[node.args[0]], node.args[1]  # type: ignore[index]
            return source[at] if isinstance(source, list | tuple) and isinstance(at, int) else Value(_shape(node))
        for source in node.all_input_nodes:
            env[source] = torch.utils._pytree.tree_map_only(Value, self._tidy, env[source])
        name, args = _arguments(node, env)
        if any(isinstance(value, torch.fx.GraphModule) for value in args.values()):
            return self._inner(node, args, rules)
        call = Call(node, name, args, _shape(node))
        rule = rules.get(name)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = rules["pointwise"]
        found = rule(self, call) if rule is not None else self._unknown(call)
        for value in found if isinstance(found, list | tuple) else [found]:
            if isinstance(value, Value):
                self.planes += [p for p in value.planes if sum(size > 1 for size in p.shape) > 1]
        return found

    def _tidy(self, value: Value) -> Value:
        """Classes may have come together since the value was made."""
        if all(sum(size > 1 for size in plane.shape) < 2 for plane in value.planes):
            return value
        return dataclasses.replace(value, planes=tuple(tidy(self.labels, plane) for plane in value.planes))

    def _inner(self, node: torch.fx.Node, args: dict[str, Any], rules: Mapping[str, Rule]) -> Any:
        """A region under another mode (no_grad, autocast) is a graph of its own."""
        values = list(args.values())
        at = next(i for i, value in enumerate(values) if isinstance(value, torch.fx.GraphModule))
        return self.graph(values[at], values[at + 1 :], rules)

    def _unknown(self, call: Call) -> Any:
        if any(value.planes for value in call.values):
            self.unknown[call.name] = self.unknown.get(call.name, 0) + 1
        for value in call.values:
            self.freeze(value, f"{call.name} has no rule")
        return plain(call)

    def _rectangular(self) -> None:
        """What removes a channel must leave every tensor rectangular: planes of several axes come down to the axis that
        leaves the most channels apart."""
        left = self.planes
        while left:
            ahead = []
            for plane in left:
                self.labels.now = None
                along = varies(self.labels, plane)
                if len(along) > 1:
                    axis = max(along, key=lambda a: free_along(self.labels, plane, a))
                    keep_axis(self.labels, plane, axis)
                    ahead.append(plane)
            left = [plane for plane in self.planes if len(varies(self.labels, plane)) > 1] if ahead else []


def plain(call: Call) -> Any:
    """What an op gives, without channels."""
    if call.out is None:
        return None
    if isinstance(call.out, list):
        return [Value(shape) if shape is not None else None for shape in call.out]
    return Value(call.out)


def execute(call: Call, walk: Walk, value: Value, argument: str = "self") -> Any:
    """Runs an op that only moves data on the labels themselves."""
    several = isinstance(call.out, list)
    shapes = call.out if several else [call.out]
    results: list[list[Tensor]] = [[] for _ in shapes]
    target: Any = call.node.target
    move = (
        torch.ops.aten.reshape.default if call.name in ("view", "_unsafe_view") else target
    )  # labels may lie otherwise
    names = [arg.name for arg in target._schema.arguments if not arg.kwarg_only]
    fixed = {name: _stand_in(argument) for name, argument in call.args.items()}
    for plane in value.planes:
        given = {**fixed, argument: expand(plane, value.shape)}
        moved = move(*(given[name] for name in names))
        for found, one in zip(results, moved if several else [moved], strict=True):
            small = shrink(one)
            if small.numel() > 1:
                found.append(small)
            elif value.shape and small.numel() and small.reshape(-1)[0] > 0 and varies(walk.labels, plane):
                walk.labels.freeze(small.reshape(-1), "it is picked out by its position")
    values = [
        Value(tuple(shape), tuple(planes), value.uniform, tensor=value.tensor)
        for shape, planes in zip(shapes, results, strict=True)
    ]
    return values if several else values[0]


def _stand_in(argument: Any) -> Any:
    """A tensor of the shape of a value, for ops that only ask for that."""
    return torch.zeros((), dtype=torch.int64).expand(argument.shape) if isinstance(argument, Value) else argument


def _live(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Nodes that an output follows from, and those that write in place."""
    found: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op == "output" or node in found or (schema is not None and schema.is_mutable):
            found |= {node, *node.all_input_nodes}
    return found


def _arguments(node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> tuple[str, dict[str, Any]]:
    """The op's name without namespace and without the mark of in-place ops, and its arguments by name."""
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target)), {str(i): arg for i, arg in enumerate(args)} | kwargs
    found = {
        argument.name: argument.default_value if argument.has_default_value() else None for argument in schema.arguments
    }
    found |= dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    name = schema.name.split("::")[-1]
    return name if name.startswith("__") else name.rstrip("_"), found


def _shape(node: torch.fx.Node) -> Any:
    def one(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [one(item) for item in value]
        return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None

    return one(node.meta.get("val"))


def describe(node: object) -> tuple[str, str, str]:
    """The op, its source line and its module, for a report."""
    if not isinstance(node, torch.fx.Node):
        return "", "", ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0], source_of(node), owner_of(node)
