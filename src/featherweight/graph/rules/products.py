# SPDX-License-Identifier: Apache-2.0
"""Sums of products: linear, matmul, einsum, attention, conv, embedding. A weight's rows are the channels it makes."""

from __future__ import annotations

import dataclasses
import math
import string
from typing import Any

import torch
from torch import Tensor

from featherweight.graph.join import Value
from featherweight.graph.labels import shrink, varies
from featherweight.graph.walk import Call, Rule, Walk

__all__ = ["RULES", "affine"]


def linear(walk: Walk, call: Call) -> Value:
    x, weight = call["input"], call["weight"]
    batch = string.ascii_lowercase[: len(x.shape) - 1]
    out = "O" if len(weight.shape) == 2 else ""
    found = walk.contract(call, [x, weight], [batch + "K", out + "K"], batch + out, weight)
    return affine(walk, found, call["bias"], -1, "output")


def affine(walk: Walk, value: Value, parameter: Value | None, axis: int, role: Any) -> Value:
    """A vector of a layer's own (a bias, a scale) meets its channels."""
    if parameter is None:
        return value
    axis %= len(value.shape)
    after = (1,) * (len(value.shape) - 1 - axis)
    walk.role(parameter, {0: role})
    shaped = dataclasses.replace(
        parameter,
        shape=parameter.shape + after,
        planes=tuple(p.reshape(tuple(p.shape) + after) for p in parameter.planes),
    )
    return dataclasses.replace(walk.pointwise([value, shaped]), shape=value.shape)


def matmul(walk: Walk, call: Call) -> Value:
    a, b = call.values[-2:]
    words = _matmul_words(len(a.shape), len(b.shape))
    weight = b if b.tensor is not None else a if a.tensor is not None else None
    return walk.contract(call, [a, b], words[:2], words[2], weight)


def _matmul_words(a: int, b: int) -> tuple[str, str, str]:
    batch = string.ascii_lowercase[: max(a, b, 2) - 2]
    left = batch[len(batch) - max(a - 2, 0) :] + ("IK" if a > 1 else "K")
    right = batch[len(batch) - max(b - 2, 0) :] + ("KJ" if b > 1 else "K")
    return left, right, batch + ("I" if a > 1 else "") + ("J" if b > 1 else "")


def added(walk: Walk, call: Call) -> Value:
    """addmm, baddbmm: a product and what is added to it."""
    a, b = (call["mat1"], call["mat2"]) if call["mat1"] is not None else (call["batch1"], call["batch2"])
    if a is None:
        a, b = call["mat"], call["vec"]
    words = _matmul_words(len(a.shape), len(b.shape))
    found = walk.contract(
        call, [a, b], words[:2], words[2], b if b.tensor is not None else a if a.tensor is not None else None
    )
    extra = call["self"]
    if extra.tensor is not None and len(extra.shape) == 1:
        return affine(walk, found, extra, -1, "output")
    return dataclasses.replace(walk.pointwise([found, extra]), shape=call.out)


def of_experts(walk: Walk, call: Call) -> Value:
    """Rows in blocks, each times the matrix of its expert. Which expert is chosen by data, so that none is cut."""
    rows, weight = call.values[:2]
    weight = walk.pin(weight, [0], "an expert is chosen by data")
    planes = tuple(plane.select(0, 0) for plane in weight.planes)
    matrix = dataclasses.replace(weight, shape=weight.shape[1:], planes=planes)
    return walk.contract(call, [rows, matrix], ["aK", "KO"], "aO", matrix)


def einsum(walk: Walk, call: Call) -> Value:
    words = call["equation"].replace(" ", "")
    inputs, arrow, output = words.partition("->")
    given, values = inputs.split(","), list(call["tensors"])
    if "." in words or any(len(set(word)) < len(word) for word in given):
        for one in values:
            walk.freeze(one, "einsum with dots or repeated letters has no rule")
        return Value(call.out)
    if not arrow:
        output = "".join(sorted(letter for letter in set(inputs) - {","} if inputs.count(letter) == 1))
    value: Value = values[0]
    word = given[0]
    weights = [v for v in values if v.tensor is not None]
    if len(values) == 1:
        return walk.contract(call, values, given, output)
    for i in range(1, len(values)):  # two at a time, as it is computed
        last = i == len(values) - 1
        later = output if last else output + "".join(given[i + 1 :])
        made = output if last else "".join(dict.fromkeys(letter for letter in word + given[i] if letter in later))
        value = walk.contract(call, [value, values[i]], [word, given[i]], made, weights[0] if weights else None)
        word = made
    return value


def attention(walk: Walk, call: Call) -> Value:
    """softmax(q kᵀ) v: whole heads, or positions in heads, as the grain says. A kv head serves a group of queries."""
    q, k, v = call["query"], call["key"], call["value"]
    if len(q.shape) > 2 and k.shape[-3] != q.shape[-3]:
        k, v = (_repeated(value, q.shape[-3]) for value in (k, v))
    if call["scale"] is None:
        why = "attention divides by the square root of the head's size, which would change"
        q, k = (walk.pin(value, [-1], why) for value in (q, k))
    batch = string.ascii_lowercase[: len(q.shape) - 2]
    scores = walk.contract(call, [q, k], [batch + "NK", batch + "MK"], batch + "NM")
    if call["attn_mask"] is not None:
        scores = walk.pointwise([scores, call["attn_mask"]], "the attention mask tells heads apart")
    scores = walk.pin(scores, [-1], "softmax divides it by its sum")
    scores = dataclasses.replace(scores, shape=(*q.shape[:-1], k.shape[-2]))
    return walk.contract(call, [scores, v], [batch + "NM", batch + "ME"], batch + "NE")


def _repeated(value: Value, heads: int) -> Value:
    times = heads // value.shape[-3]
    axis = len(value.shape) - 3
    shape = (*value.shape[:axis], heads, *value.shape[axis + 1 :])
    planes = tuple(plane.repeat_interleave(times, axis) if plane.shape[axis] > 1 else plane for plane in value.planes)
    return dataclasses.replace(value, shape=shape, planes=planes)


def embedding(walk: Walk, call: Call) -> Value:
    weight, at = call["weight"], call["indices"]
    walk.role(weight, {1: "output"})
    rows = tuple(plane for plane in weight.planes if 0 in varies(walk.labels, plane))
    for plane in rows:
        walk.labels.freeze(plane.reshape(-1), "its rows are looked up by data")
    columns = walk.vector(weight, 1)
    planes = () if columns is None else (columns.reshape((1,) * len(at.shape) + (-1,)),)
    if weight.tensor is not None:
        walk.weights.setdefault(weight.tensor, call.name)
    return Value(call.out, planes)


def convolution(walk: Walk, call: Call) -> Value:
    x, weight, transposed = call["input"], call["weight"], "transpose" in call.name or bool(call["transposed"])
    if len(x.shape) < len(weight.shape):  # without a batch
        x = Value((1, *x.shape), tuple(plane.unsqueeze(0) for plane in x.planes))
    out = call.out if len(call.out) == len(weight.shape) else (1, *call.out)
    rank = len(weight.shape) - 2
    groups = call["groups"] or 1
    weight = walk.pin(weight, range(2, 2 + rank), "a kernel's positions cannot be cut")
    moving = [axis for axis in range(rank) if not _still(call, weight.shape, axis)]
    x = walk.pin(x, [2 + axis for axis in moving], "a convolution moves over it")
    # After a pixel shuffle channels vary over positions as well, and it is channels that a convolution sums over.
    mixed = [plane for plane in x.planes if 1 in (along := varies(walk.labels, plane)) and len(along) > 1]
    over = walk.pin(
        dataclasses.replace(x, planes=tuple(mixed)), range(2, 2 + rank), "a convolution sums channels over it"
    )
    x = dataclasses.replace(x, planes=(*(p for p in x.planes if not any(p is m for m in mixed)), *over.planes))
    x = dataclasses.replace(x, shape=(*x.shape[:2], *out[2:]))
    taps = math.prod(weight.shape[2:])
    matrix = Value(weight.shape[:2], tuple(_matrix(plane) for plane in weight.planes), tensor=weight.tensor)
    walk.role(weight, {0: "input", 1: "output"} if transposed else {0: "output", 1: "input"})
    if groups == 1:
        where = string.ascii_lowercase[1 : 1 + rank]
        word = "CO" if transposed else "OC"
        found, sizes = walk.joiner.contract([x, matrix], ["a" + "C" + where, word], "aO" + where)
        product = (taps, tuple(sizes.values()))
    else:
        found = _grouped(walk, x, matrix, out, groups, transposed)
        made = x if transposed else found  # rows of the weight
        product = (taps * math.prod(out) // out[1], (walk.extent(made, 1), walk.extent(matrix, 1)))
    found = affine(walk, found, call["bias"], 1, "output")
    if weight.tensor is not None:
        walk.weights.setdefault(weight.tensor, call.name)
    walk.tell(call, found, product, weight.tensor)
    if len(call.out) < len(found.shape):
        return Value(call.out, tuple(plane.squeeze(0) for plane in found.planes))
    return found


def _still(call: Call, shape: tuple[int, ...], axis: int) -> bool:
    """Along this axis each position is by itself."""

    def at(option: Any, default: int) -> Any:
        return (
            option
            if isinstance(option, str)
            else default
            if option is None
            else option[axis]
            if len(option) > 1
            else option[0]
        )

    return shape[2 + axis] == 1 and at(call["stride"], 1) == 1 and at(call["padding"], 0) in (0, "valid", "same")


def _matrix(plane: Tensor) -> Tensor:
    while plane.ndim > 2:
        plane = plane.select(-1, 0)
    return plane


def _grouped(walk: Walk, x: Value, matrix: Value, out: tuple[int, ...], groups: int, transposed: bool) -> Value:
    """Conv groups must stay equal. Where there are more groups than channels in one, whole groups are cut (depthwise:
    each channel is a group); otherwise the same positions of every group."""
    channels, made = walk.vector(x, 1), out[1]
    rows, columns = walk.vector(matrix, 0), walk.vector(matrix, 1)
    inside = x.shape[1] // groups
    labels = walk.labels
    whole = inside == 1 or groups > inside
    if rows is None:
        rows = torch.zeros(matrix.shape[0], dtype=torch.int64)
    if channels is None:
        channels = torch.zeros(x.shape[1], dtype=torch.int64)
    by_group = rows.view(groups, -1)
    entering = channels.view(groups, inside)
    if whole:
        labels.unite(by_group, by_group[:, :1])
        labels.unite(entering, by_group[:, :1], "the convolution's input has no channels")
        if columns is not None:
            labels.freeze(columns, "whole conv groups are cut")
        result = by_group[:, :1].repeat(1, made // groups).reshape(-1)
    else:
        labels.unite(by_group, by_group[:1])
        inner = columns if columns is not None else torch.zeros(matrix.shape[1], dtype=torch.int64)
        if transposed:  # rows are the input's channels, columns those made in each group
            labels.unite(entering, by_group, "the convolution's input has no channels")
            result = inner.repeat(groups)
        else:
            labels.unite(entering, inner[None], "the convolution's input has no channels")
            result = rows
    planes = [plane for plane in x.planes if 1 not in varies(labels, plane)]
    if bool(result.any()):
        planes.append(shrink(result.reshape((1, -1) + (1,) * (len(out) - 2))))
    return Value(out, tuple(planes))


def bilinear(walk: Walk, call: Call) -> Value:
    """y_o = x1 W_o x2."""
    x, y, weight = call["input1"], call["input2"], call["weight"]
    batch = string.ascii_lowercase[: len(x.shape) - 1]
    half = walk.contract(call, [x, weight], [batch + "I", "OIJ"], batch + "OJ", weight)
    return affine(
        walk, walk.contract(call, [half, y], [batch + "OJ", batch + "J"], batch + "O"), call["bias"], -1, "output"
    )


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm"), added),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), of_experts),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "embedding": embedding,
    **dict.fromkeys(
        [f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2, 3)] + ["convolution", "_convolution"],
        convolution,
    ),
    "bilinear": bilinear,
}
