# SPDX-License-Identifier: Apache-2.0
"""A cut carried out on the exported program, where every constant is a node: the way for code that no attribute mends.

What numbers in a model's code fix (`view(b, n, 12, 64)`) stands in the graph as an argument, and labels say what it
must become. The result answers as the cut model would, and is terminal: a program of this one input shape, for ONNX.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import GraphError
from featherweight.graph.capture import Captured, capture
from featherweight.graph.combing import Assembly
from featherweight.graph.join import Value
from featherweight.graph.limit import limited
from featherweight.graph.rules import RULES
from featherweight.graph.walk import Walk

__all__ = ["Program", "rewrite"]


class Program(nn.Module):
    """An exported program with its tensors under the model's own names. Called as the model is."""

    def __init__(
        self, graph: torch.fx.GraphModule, fed: list[str | None], tensors: Mapping[str, Tensor], specs: Any
    ) -> None:
        super().__init__()
        self._graph, self._fed, self._specs = [graph], fed, specs  # a list, so that its constants are no submodules
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, tensor)
            else:
                owner.register_buffer(leaf, tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = iter(pytree.tree_leaves((args, kwargs)))
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        found = self._graph[0](*(next(given) if name is None else tensors[name] for name in self._fed))
        return pytree.tree_unflatten(list(found)[-self._specs.num_leaves :], self._specs)


def rewrite(
    model: nn.Module,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    removed: Mapping[str, np.ndarray],
    *,
    grain: Literal["heads", "dims"] = "heads",
    seconds: float = 300.0,
) -> Program:
    """The model's exported program with these couplings (indices by group of its trace) cut out. The model stays as is.

    Tensors are sliced, and every size in the graph follows from the labels that are left. Saves what the cut channels
    cost. Raises `GraphError` where the model cannot be exported, and for an operation whose sizes cannot be told.

    >>> class Fixed(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = nn.Linear(3, 12), nn.Linear(12, 2)
    ...     def forward(self, x):
    ...         return self.b(self.a(x).view(-1, 4, 3).relu().view(-1, 12))
    >>> program = rewrite(Fixed(), (torch.randn(5, 3),), {"a": np.array([0])})
    >>> program.a.weight.shape, program(torch.randn(5, 3)).shape
    (torch.Size([9, 3]), torch.Size([5, 2]))
    """
    with limited(seconds, "exporting the model") as deadline:
        captured = capture(model, inputs)
        if captured.front != "export":
            raise GraphError(
                f"only an exported program can be rewritten, and this model cannot be exported: {captured.notes[0]}"
            )
        walk = Walk(captured, grain, deadline)
        walk.run(RULES)
        sizes = _Sizes(walk, Assembly(walk), removed)
    graph = copy.deepcopy(captured.module)
    same = dict(zip(_nodes(graph), _nodes(captured.module), strict=True))
    for node, original in same.items():
        change = _CHANGES.get(_name(original))
        if change is not None and original in walk.found:
            change(node, original, sizes)
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.recompile()
    placeholders = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
    fed = [_feed(node, captured) for node in placeholders]
    tensors = {name: sizes.tensor(name) for name in dict.fromkeys(n for n in captured.tensors.values())}
    tensors |= {_constant(node): captured.constants[node] for node in placeholders if node in captured.constants}
    return Program(graph, fed, tensors, captured.outputs)


def _feed(node: torch.fx.Node, captured: Captured) -> str | None:
    return captured.tensors.get(node) or (_constant(node) if node in captured.constants else None)


def _constant(node: torch.fx.Node) -> str:
    return f"constants.{node.name}"


def _nodes(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """All nodes, those of regions under another mode included."""
    inner = [m for m in module.children() if isinstance(m, torch.fx.GraphModule)]
    return [*module.graph.nodes, *(node for m in inner for node in _nodes(m))]


def _name(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.split("::")[-1].rstrip("_")


class _Sizes:
    """What is left of each value of a walk when some couplings are gone."""

    def __init__(self, walk: Walk, assembly: Assembly, removed: Mapping[str, np.ndarray]) -> None:
        self.walk = walk
        gone = np.zeros(walk.labels.count, dtype=bool)
        for name, indices in removed.items():
            gone[assembly.classes_of(name)[indices]] = True
        self.gone = gone[assembly.roots]  # by label

    def kept(self, value: Value, axis: int) -> np.ndarray:
        """Which positions of an axis are left."""
        left = np.ones(value.shape[axis], dtype=bool)
        for plane in value.planes:
            if plane.shape[axis] > 1:  # a plane of several axes is rectangular: a position goes where all of it does
                others = tuple(other for other in range(plane.ndim) if other != axis)
                left &= (~self.gone[plane.numpy()]).any(axis=others)
        return left

    def shape(self, value: Value) -> list[int]:
        return [int(self.kept(value, axis).sum()) for axis in range(len(value.shape))]

    def value(self, node: Any) -> Value:
        found = self.walk.found[node]
        if not isinstance(found, Value):
            raise GraphError(f"{node} has several values where one is expected.")
        return found

    def tensor(self, name: str) -> Tensor:
        """The model's tensor, sliced."""
        tensor = self.walk.state[name]
        if name not in self.walk.values:
            return tensor
        value, data = self.walk.values[name], tensor.detach()
        for axis in range(data.ndim):
            data = data.index_select(axis, torch.from_numpy(np.flatnonzero(self.kept(value, axis))).to(data.device))
        return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


Change = Callable[[torch.fx.Node, torch.fx.Node, _Sizes], None]


def _set(node: torch.fx.Node, name: str, value: Any) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def _get(node: torch.fx.Node, name: str, default: Any = None) -> Any:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name)
    found = node.args[at] if at < len(node.args) else node.kwargs.get(name)
    return default if found is None else found


def _shape_as(argument: str) -> Change:
    def change(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
        if original.target in (torch.ops.aten.view.dtype,):
            return
        _set(node, argument, sizes.shape(sizes.value(original)))

    return change


def _widened(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    wanted, new = list(_get(original, "size")), sizes.shape(sizes.value(original))
    _set(node, "size", [-1 if old == -1 else size for old, size in zip(wanted, new, strict=True)])


def _unflattened(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    axis = _get(original, "dim") % len(sizes.value(_get(original, "self")).shape)
    _set(node, "sizes", sizes.shape(sizes.value(original))[axis : axis + len(_get(original, "sizes"))])


def _parted(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    axis = _get(original, "dim", 0)
    left = [int(sizes.kept(part, axis % len(part.shape)).sum()) for part in sizes.walk.found[original]]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], left, axis), {}


def _sliced(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    value = sizes.value(_get(original, "self"))
    axis = _get(original, "dim", 0) % len(value.shape)
    left, size = sizes.kept(value, axis), value.shape[axis]
    if left.all():
        return
    start, end = (
        min(max(at + size if at < 0 else at, 0), size)
        for at in (_get(original, "start", 0), _get(original, "end", size))
    )
    step = _get(original, "step", 1)
    picked = np.zeros(size, dtype=bool)
    picked[start:end:step] = True
    order = np.cumsum(left) - 1
    chosen = order[np.flatnonzero(picked & left)]
    steps = set(np.diff(chosen).tolist())
    if len(steps) > 1:
        raise GraphError(f"the slice at {original.name} takes positions that are no longer evenly apart.")
    step = steps.pop() if steps else 1
    for name, new in (("start", int(chosen[0])), ("end", int(chosen[-1]) + 1), ("step", step)):
        _set(node, name, new)


def _selected(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    value = sizes.value(_get(original, "self"))
    axis = _get(original, "dim") % len(value.shape)
    left, at = sizes.kept(value, axis), _get(original, "index")
    _set(node, "index", int(left[: at % value.shape[axis]].sum()))


def _indexed(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    """Constant indices along an axis that loses positions are counted anew, and those of cut positions dropped."""
    value, output = sizes.value(_get(original, "self")), sizes.value(original)
    indices = list(_get(original, "indices"))
    for axis, at in enumerate(indices):
        if at is None or sizes.kept(value, axis).all():
            continue
        where = sizes.walk.concrete(at)
        if sum(i is not None for i in indices) > 1 or not isinstance(where, Tensor) or where.ndim != 1:
            raise GraphError(
                f"the index at {original.name} picks cut positions together with others; it cannot be told."
            )
        left = sizes.kept(value, axis)
        picked = where.numpy()[sizes.kept(output, axis)] % value.shape[axis]
        name = f"_index_{node.name}"
        owner = node.graph.owning_module
        owner.register_buffer(name, torch.from_numpy((np.cumsum(left) - 1)[picked]), persistent=False)  # type: ignore[union-attr]
        with node.graph.inserting_before(node):
            new = list(_get(node, "indices"))
            new[axis] = node.graph.get_attr(name)
        _set(node, "indices", new)


def _repeated(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    value, axis = sizes.value(original), _get(original, "dim")
    if _get(original, "output_size") is not None and axis is not None:
        _set(node, "output_size", sizes.shape(value)[axis])


def _convolved(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    groups = _get(original, "groups", 1)
    value = sizes.value(_get(original, "input"))
    axis = 1 if len(value.shape) == len(sizes.value(_get(original, "weight")).shape) else 0
    if groups > 1:
        _set(node, "groups", _groups(sizes.kept(value, axis), groups))


def _group_normed(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    groups = _get(original, "num_groups")
    _set(node, "num_groups", _groups(sizes.kept(sizes.value(_get(original, "input")), 1), groups))


def _groups(left: np.ndarray, groups: int) -> int:
    return int(left.reshape(groups, -1).any(axis=1).sum())


def _layer_normed(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    count = len(_get(original, "normalized_shape"))
    _set(node, "normalized_shape", sizes.shape(sizes.value(original))[-count:])


def _made(node: torch.fx.Node, original: torch.fx.Node, sizes: _Sizes) -> None:
    """zeros and ones are as long as what they meet: the state of an LSTM, or an operand of the same shape."""
    mine = sizes.value(original)
    for user in original.users:
        name = _name(user)
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            results = sizes.walk.found[user]
            state = next((r for r in results[1:] if r.shape == mine.shape), None)
        elif name.endswith("_cell"):
            found = sizes.walk.found[user]
            state = found[0] if isinstance(found, list) else found
        else:
            state = sizes.walk.found.get(user)
        if isinstance(state, Value) and state.shape == mine.shape:
            _set(node, "size", sizes.shape(state))
            return


_CHANGES: dict[str, Change] = {
    **dict.fromkeys(("view", "_unsafe_view"), _shape_as("size")),
    "reshape": _shape_as("shape"),
    "expand": _widened,
    "unflatten": _unflattened,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk"), _parted),
    "slice": _sliced,
    "select": _selected,
    "index": _indexed,
    "repeat_interleave": _repeated,
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2, 3)], _convolved),
    "group_norm": _group_normed,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_normed),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), _made),
}
