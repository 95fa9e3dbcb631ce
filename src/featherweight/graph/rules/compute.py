# SPDX-License-Identifier: Apache-2.0
"""Ops that compute position by position, or along axes: pointwise, reductions, softmax, pooling."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from featherweight.graph.join import Value
from featherweight.graph.labels import shrink, varies
from featherweight.graph.walk import Call, Rule, Walk

__all__ = ["RULES"]


def same(walk: Walk, call: Call) -> Value:
    """One tensor in, the same positions out."""
    value: Value = call.values[0]
    return dataclasses.replace(value, shape=call.out)


def pointwise(walk: Walk, call: Call) -> Any:
    values = call.values
    if not values:
        return Value(call.out)
    if len(values) == 1:
        return same(walk, call)
    found = walk.pointwise(values)
    for value in values:
        if value.tensor is not None:
            walk.role(value, dict.fromkeys(range(len(value.shape)), "scale"))
    return found


def _axes(call: Call, rank: int) -> list[int]:
    dim = call["dim"]
    if dim is None or dim == []:
        return list(range(rank))
    return [axis % rank for axis in ([dim] if isinstance(dim, int) else dim)]


def _drop(value: Value, axes: list[int], shape: tuple[int, ...]) -> Value:
    """Without the axes, or with size 1 there, as the op's own shape says."""
    planes = []
    for plane in value.planes:
        if len(shape) != len(value.shape):
            for axis in sorted(axes, reverse=True):
                plane = plane.select(axis, 0)
        planes.append(shrink(plane))
    return Value(shape, tuple(planes))


def statistic(walk: Walk, call: Call) -> Any:
    """sum, mean, norm, max: over channels it is a statistic that changes with a cut, and has no channels itself."""
    if len(call.values) > 1:  # max of two tensors
        return pointwise(walk, call)
    value: Value = call.values[0]
    axes = _axes(call, len(value.shape))
    planes = []
    for plane in value.planes:
        along = set(varies(walk.labels, plane))
        if along and along <= set(axes):
            walk.measure(plane, call.name)
        else:
            planes.append(plane)
    value = walk.pin(dataclasses.replace(value, planes=tuple(planes)), axes, f"{call.name} is taken along it")
    return _shaped(call, value, axes)


def extreme(walk: Walk, call: Call) -> Any:
    """argmax, median: which of the channels it is, is their business."""
    value: Value = call.values[0]
    axes = _axes(call, len(value.shape))
    return _shaped(call, walk.pin(value, axes, f"{call.name} chooses among them"), axes)


def _shaped(call: Call, value: Value, axes: list[int]) -> Any:
    if isinstance(call.out, list):
        return [None if shape is None else _drop(value, axes, shape) for shape in call.out]
    return _drop(value, axes, call.out)


def softmax(walk: Walk, call: Call) -> Value:
    value: Value = call.values[0]
    return walk.pin(value, [call["dim"]], f"{call.name} divides it by its sum")


def running(walk: Walk, call: Call) -> Any:
    """cumsum and the like: along an axis of channels each depends on those before."""
    value = walk.pin(call.values[0], [call["dim"]], f"{call.name} runs along it")
    return [dataclasses.replace(value, shape=s) for s in call.out] if isinstance(call.out, list) else value


def square(walk: Walk, call: Call) -> Value:
    """triu, tril: of the last two axes, positions matter."""
    return walk.pin(call.values[0], [-1, -2], f"{call.name} tells its positions apart")


def spatial(walk: Walk, call: Call) -> Any:
    """Pooling and resizing: over their axes positions are mixed, over all others nothing is."""
    value: Value = call.values[0]
    digits = re.search(r"([123])d", call.name)
    count = int(digits[1]) if digits else len(value.shape) - 2
    value = walk.pin(value, range(-count, 0), f"{call.name} mixes its positions")
    outs = call.out if isinstance(call.out, list) else [call.out]
    found = [Value(shape, value.planes) for shape in outs]
    return found if isinstance(call.out, list) else found[0]


def gated(walk: Walk, call: Call) -> Value:
    """glu: the first half times the sigmoid of the second."""
    value: Value = call["self"]
    axis = call["dim"] % len(value.shape)
    labels = walk.vector(value, axis)
    rest = walk.pin(value, [], "")
    planes = tuple(plane for plane in rest.planes if axis not in varies(walk.labels, plane))
    if labels is not None:
        first, second = labels.chunk(2)
        walk.labels.unite(first, second)
        planes += (first.reshape([-1 if i == axis else 1 for i in range(len(value.shape))]),)
    return Value(call.out, planes)


_SAME = [
    "relu",
    "relu6",
    "gelu",
    "silu",
    "mish",
    "selu",
    "celu",
    "elu",
    "leaky_relu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "hardshrink",
    "softshrink",
    "softplus",
    "softsign",
    "tanhshrink",
    "threshold",
    "rrelu",
    "log_sigmoid",
    "logsigmoid",
    "abs",
    "neg",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "to",
    "_to_copy",
    "type_as",
    "lift_fresh_copy",
    "lift_fresh",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "native_dropout",
    "float",
    "double",
    "half",
    "bfloat16",
    "dropout_",
    "fake_quantize_per_tensor_affine",
    "requires_grad_",
    "nan_to_num",
    "square",
    "view_as_real_copy",
    "positive",
    "resolve_conj",
    "resolve_neg",
    "conj",
    "pin_memory",
    "cpu",
    "cuda",
]
_POINTWISE = [
    "pointwise",
    "where",
    "masked_fill",
    "addcmul",
    "addcdiv",
    "lerp",
    "clamp",
    "rsub",
    "__and__",
    "__or__",
    "__xor__",
    "float_power",
    "true_divide",
]
_STATISTIC = [
    "sum",
    "mean",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "nansum",
    "logsumexp",
    "amax",
    "amin",
    "max",
    "min",
]
_EXTREME = ["argmax", "argmin", "aminmax", "all", "any", "prod", "median", "count_nonzero"]
_SPATIAL = [
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"_adaptive_avg_pool{n}d" for n in (2, 3)),
    "mkldnn_max_pool2d",
    *(
        f"upsample_{kind}"
        for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    ),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
]

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_STATISTIC, statistic),
    **dict.fromkeys(_EXTREME, extreme),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "cummax", "diff"), running),
    **dict.fromkeys(("triu", "tril"), square),
    **dict.fromkeys(_SPATIAL, spatial),
    "glu": gated,
}
