# SPDX-License-Identifier: Apache-2.0
"""Ops that only move data are executed on the labels: no stride or head arithmetic is written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.graph.join import Value
from featherweight.graph.labels import expand, shrink, varies
from featherweight.graph.walk import Call, Rule, Walk, execute, plain

__all__ = ["RULES"]

_MOVES = [
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "squeeze",
    "unsqueeze",
    "repeat",
    "tile",
    "narrow",
    "unbind",
    "pixel_shuffle",
    "pixel_unshuffle",
    "diagonal",
    "unfold",
    "view_as",
    "reshape_as",
    "select",
    "repeat_interleave",
]


def move(walk: Walk, call: Call) -> Any:
    found = execute(call, walk, call["self"])
    if isinstance(found, Value) and found.planes:
        walk.tell(call, found)
    return found


def shuffle(walk: Walk, call: Call) -> Any:
    """channel_shuffle: the module goes on to deal out as many groups, so what is left of them stays a product."""
    value = call["self"]
    apart = (value.shape[0], call["groups"], -1, *value.shape[2:])
    walk.planes += [shrink(expand(plane, value.shape).reshape(apart)) for plane in value.planes]
    return move(walk, call)


def widen(walk: Walk, call: Call) -> Value:
    """expand: along axes that grow, it is one position and fits what it meets."""
    value, shape = call["self"], call.out
    more = len(shape) - len(value.shape)
    planes = tuple(plane.reshape((1,) * more + tuple(plane.shape)) for plane in value.planes)
    grown = {axis for axis, size in enumerate(shape) if axis < more or value.shape[axis - more] != size}
    found = Value(shape, planes, value.uniform, frozenset(grown | {axis + more for axis in value.fits}), value.tensor)
    if planes:
        walk.tell(call, found)
    return found


def shift(walk: Walk, call: Call) -> Value:
    """roll and flip: nothing moves for planes that do not vary along their axes."""
    value, dims = call["self"], call["dims"]
    rank = len(value.shape)
    axes = {axis % rank for axis in ([dims] if isinstance(dims, int) else dims or range(rank))}
    still = [plane for plane in value.planes if not axes & set(varies(walk.labels, plane))]
    moved = [plane for plane in value.planes if axes & set(varies(walk.labels, plane))]
    found: Value = execute(call, walk, dataclasses.replace(value, planes=tuple(moved)))
    return dataclasses.replace(found, planes=(*still, *found.planes))


def part(walk: Walk, call: Call) -> Any:
    """chunk, split: equal parts stay equal, position by position, since code that asks for equal parts goes on to."""
    value = call["self"]
    parts = execute(call, walk, value)
    axis = (call["dim"] or 0) % len(value.shape)
    tie(walk, parts, axis)
    for one in parts[:1]:
        walk.tell(call, one)
    return parts


def tie(walk: Walk, parts: Sequence[Value], axis: int) -> None:
    first = walk.vector(parts[0], axis)
    for other in parts[1:]:
        if other.shape != parts[0].shape:
            continue
        mine = walk.vector(other, axis)
        if first is not None and mine is not None:
            walk.labels.unite(first, mine)
        elif (only := first if first is not None else mine) is not None:
            walk.labels.freeze(only, "the other part of the split has no channels")


def cut_out(walk: Walk, call: Call) -> Value:
    """A slice. Slices that tile an axis evenly are parts of a split, written by hand."""
    value = call["self"]
    found: Value = execute(call, walk, value)
    axis = (call["dim"] or 0) % len(value.shape)
    start, size = call["start"] or 0, found.shape[axis]
    if size == value.shape[axis] or walk.vector(value, axis) is None:
        return found
    walk.tell(call, found)
    if call["step"] in (None, 1):
        key = (id(call.node.args[0]), axis)
        seen = walk.slices.setdefault(key, [])
        seen.append((start if start >= 0 else start + value.shape[axis], found))
        starts = sorted({at for at, _ in seen})
        even = all(other.shape == found.shape for _, other in seen)
        if even and size and starts == list(range(0, value.shape[axis], size)):
            tie(walk, [other for _, other in seen], axis)
    return found


def concatenate(walk: Walk, call: Call) -> Value:
    values = [value for value in call["tensors"] if value.shape != (0,)]
    for value in values:
        walk.role(value, dict.fromkeys(range(len(value.shape)), "output"))
    return _joined(walk, call, values, (call["dim"] or 0) % len(call.out))


def stack(walk: Walk, call: Call) -> Value:
    axis = (call["dim"] or 0) % len(call.out)
    values = [
        dataclasses.replace(
            value,
            shape=(*value.shape[:axis], 1, *value.shape[axis:]),
            planes=tuple(plane.unsqueeze(axis) for plane in value.planes),
            fits=frozenset(),
        )
        for value in call["tensors"]
    ]
    return _joined(walk, call, values, axis)


def _joined(walk: Walk, call: Call, values: list[Value], axis: int) -> Value:
    """Side by side along `axis`; along all other axes the same position is the same channel."""
    along = [{varies(walk.labels, plane) for plane in value.planes} for value in values]
    mixed: set[tuple[int, ...]] = {axes for axes in set().union(*along) if axis in axes and len(axes) > 1}
    whole = []
    for axes in sorted(mixed):
        if all(axes in mine for mine in along):  # heads x positions, cut in half and put together again
            whole.append(_side_by_side(walk, values, axes, axis))
        else:
            values = [
                walk.pin(value, [axis] if axes in mine else [], "it is joined to a tensor without channels")
                for value, mine in zip(values, along, strict=True)
            ]
    others, ours = [], []
    for value in values:
        planes = [(plane, varies(walk.labels, plane)) for plane in value.planes]
        shape = tuple(1 if i == axis else size for i, size in enumerate(value.shape))
        rest = tuple(plane for plane, axes in planes if axes and axis not in axes)
        others.append(dataclasses.replace(value, shape=shape, planes=rest))
        mine = [plane for plane, axes in planes if axes == (axis,)]
        ours.append(mine[0] if mine else torch.zeros([1] * len(shape), dtype=torch.int64))
    joined = [*walk.joiner.join(others, "it is joined to a tensor without channels"), *whole]
    if any(bool(plane.any()) for plane in ours):
        pieces = [
            expand(plane, [v.shape[i] if i == axis else 1 for i in range(plane.ndim)])
            for plane, v in zip(ours, values, strict=True)
        ]
        joined.append(shrink(torch.cat(pieces, axis)))
    found = Value(call.out, tuple(joined), all(value.uniform for value in values), tensor=_same_tensor(values))
    if joined:
        walk.tell(call, found)
    return found


def _same_tensor(values: Sequence[Value]) -> str | None:
    names = {value.tensor for value in values}
    return names.pop() if len(names) == 1 else None


def _side_by_side(walk: Walk, values: Sequence[Value], axes: tuple[int, ...], axis: int) -> Tensor:
    pieces = []
    for value in values:
        plane = next(plane for plane in value.planes if varies(walk.labels, plane) == axes)
        pieces.append(expand(plane, [size if i in axes else 1 for i, size in enumerate(value.shape)]))
    return torch.cat(pieces, axis)


def pad(walk: Walk, call: Call) -> Value:
    """What is added along an axis of channels is no channel."""
    value, amounts = call["self"], list(call["pad"] if call["pad"] is not None else call["padding"])
    rank, planes = len(value.shape), []
    padded = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    for plane in value.planes:
        if not padded & set(varies(walk.labels, plane)):
            planes.append(plane)
        elif call["mode"] in (None, "constant"):
            full = expand(
                plane, [size if plane.shape[i] > 1 or i in padded else 1 for i, size in enumerate(value.shape)]
            )
            planes.append(shrink(F.pad(full, amounts)))
        else:
            walk.labels.freeze(plane.reshape(-1), f"{call.name} repeats channels")
    return Value(call.out, tuple(planes), value.uniform and not call["value"])


def index(walk: Walk, call: Call) -> Value:
    """Indexing: by constants it is executed; by data it passes what does not vary along the indexed axes."""
    value = call["self"]
    nodes = list(call.node.args[1]) if len(call.node.args) > 1 else []  # type: ignore[arg-type]
    constants = [None if node is None else walk.concrete(node) for node in nodes]
    if all(node is None or isinstance(at, Tensor) for node, at in zip(nodes, constants, strict=True)):
        return _moved(call, walk, value, constants)
    given = [None if item is None else item for item in call["indices"]]
    axes = {axis for axis, item in enumerate(given) if item is not None}
    loose = [plane for plane in value.planes if not axes & set(varies(walk.labels, plane))]
    for plane in value.planes:
        if axes & set(varies(walk.labels, plane)):
            walk.labels.freeze(plane.reshape(-1), "it is indexed by data")
    zeros = [None if item is None else torch.zeros(item.shape, dtype=torch.int64) for item in given]
    found = dataclasses.replace(value, planes=tuple(loose))
    try:
        return _moved(call, walk, found, zeros)
    except (RuntimeError, IndexError):  # a mask: how many it picks is data
        walk.freeze(found, "it is indexed by a mask")
        return Value(call.out)


def _moved(call: Call, walk: Walk, value: Value, indices: Sequence[Tensor | None]) -> Value:
    found: Value = execute(dataclasses.replace(call, args={"self": value, "indices": list(indices)}), walk, value)
    return found


def pick(walk: Walk, call: Call) -> Any:
    """gather, index_select, sort, topk: along their axis by data (or by constants)."""
    value = call["self"]
    dim = call["dim"] if isinstance(call["dim"], int) else -1
    if call.name == "index_select":
        at = walk.concrete(call.node.args[2])
        if isinstance(at, Tensor):
            return execute(dataclasses.replace(call, args={**call.args, "index": at}), walk, value)
    value = walk.pin(value, [dim], f"{call.name} picks along it by data")
    if isinstance(call.out, list):
        return [Value(shape, value.planes) for shape in call.out]
    return Value(call.out, value.planes)


def write(walk: Walk, call: Call) -> Value:
    """copy_: what is written becomes what was there."""
    target, source = call["self"], call["src"]
    if not target.planes:
        walk.freeze(source, "it is written into a tensor without channels")
        return Value(target.shape)
    return dataclasses.replace(walk.pointwise([target, source]), shape=target.shape)


def fill(walk: Walk, call: Call) -> Value:
    return Value(call.out, (), True)


def alike(walk: Walk, call: Call) -> Value:
    """zeros_like and the like: of other values, but as large as what they are like, and so cut with it."""
    return dataclasses.replace(call.values[0], shape=call.out, tensor=None)


def constant(walk: Walk, call: Call) -> Any:
    return plain(call)


def columns(walk: Walk, call: Call) -> Value:
    """im2col: each channel becomes its kernel's positions, channel by channel."""
    value = walk.pin(call["self"], [-1, -2], "im2col moves a window over it")
    taps = call["kernel_size"][0] * call["kernel_size"][1]
    channels = walk.vector(value, -3)
    plane = () if channels is None else (channels.repeat_interleave(taps).reshape(-1, 1),)
    shape = call.out
    return Value(shape, tuple(p.reshape((1,) * (len(shape) - 2) + tuple(p.shape)) for p in plane))


RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), shuffle),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), widen),
    **dict.fromkeys(("roll", "flip"), shift),
    **dict.fromkeys(("chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes", "tensor_split"), part),
    "slice": cut_out,
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
    "stack": stack,
    **dict.fromkeys(
        ("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
        pad,
    ),
    "im2col": columns,
    "index": index,
    **dict.fromkeys(("gather", "index_select", "sort", "topk"), pick),
    "copy": write,
    **dict.fromkeys(
        [
            "zeros",
            "ones",
            "full",
            "empty",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
            "scalar_tensor",
            "fill",
            "zero",
        ],
        fill,
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), alike),
    **dict.fromkeys(
        [
            "arange",
            "linspace",
            "eye",
            "tril_indices",
            "triu_indices",
            "item",
            "_local_scalar_dense",
            "sym_size",
            "_assert_tensor_metadata",
            "_assert_scalar",
            "_assert_async",
            "_set_grad_enabled",
            "rand",
            "randn",
            "rand_like",
            "randn_like",
            "bernoulli",
            "bucketize",
            "searchsorted",
            "one_hot",
        ],
        constant,
    ),
}
