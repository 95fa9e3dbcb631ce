# SPDX-License-Identifier: Apache-2.0
"""Norms: per channel (batch, instance) a cut is exact; over channels (layer, RMS, group) statistics change."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from featherweight.graph.join import Value
from featherweight.graph.labels import varies
from featherweight.graph.rules.products import affine
from featherweight.graph.walk import Call, Rule, Walk

__all__ = ["RULES"]


def per_channel(walk: Walk, call: Call) -> Any:
    x: Value = call["input"]
    if call["training"] or (call["use_input_stats"] and call["running_mean"] is None):
        _measured(
            walk, x, [axis for axis in range(len(x.shape)) if axis != 1 and (axis > 1 or call["training"])], call.name
        )
    for name in ("weight", "bias", "running_mean", "running_var"):
        x = affine(walk, x, call[name], 1, "scale")
    return [x, *(None,) * (len(call.out) - 1)] if isinstance(call.out, list) else x


def over_trailing(walk: Walk, call: Call) -> Any:
    """layer_norm and rms_norm, over the last axes."""
    x: Value = call["input"]
    rank, count = len(x.shape), len(call["normalized_shape"])
    x = _measured(walk, x, list(range(rank - count, rank)), call.name)
    for name in ("weight", "bias"):
        if call[name] is not None:
            walk.role(call[name], dict.fromkeys(range(count), "scale"))
            x = dataclasses.replace(walk.pointwise([x, call[name]]), shape=x.shape)
    return [x, *(None,) * (len(call.out) - 1)] if isinstance(call.out, list) else x


def _measured(walk: Walk, x: Value, axes: list[int], op: str) -> Value:
    """Over these axes statistics are taken. What varies along others too (heads x positions) is settled to those."""
    planes: list[Tensor] = []
    for plane in x.planes:
        along = set(varies(walk.labels, plane))
        if along & set(axes) and along - set(axes):
            planes += walk.pin(Value(x.shape, (plane,)), sorted(along & set(axes)), f"{op} is taken along it").planes
            continue
        if along & set(axes):
            walk.measure(plane, op)
        planes.append(plane)
    return dataclasses.replace(x, planes=tuple(planes))


def grouped(walk: Walk, call: Call) -> Any:
    """group_norm: whole groups where there are more groups than channels in one, and then exact; else the same
    positions of every group."""
    x: Value = call["input"]
    groups = call["num_groups"] or call["group"]
    x = walk.pin(x, range(2, len(x.shape)), "group_norm is taken along it")
    labels, inside = walk.vector(x, 1), x.shape[1] // groups
    if labels is not None:
        by_group = labels.view(groups, inside)
        if inside == 1 or groups > inside:
            walk.labels.unite(by_group, by_group[:, :1])
        else:
            walk.labels.unite(by_group, by_group[:1])
            walk.measure(labels, "group_norm")
    for name in ("weight", "bias"):
        x = affine(walk, x, call[name], 1, "scale")
    return [x, *(None,) * (len(call.out) - 1)] if isinstance(call.out, list) else x


def prelu(walk: Walk, call: Call) -> Value:
    x: Value = call["self"]
    return affine(walk, x, call["weight"], 1, "scale") if len(x.shape) > 1 and call["weight"].shape[0] > 1 else x


RULES: dict[str, Rule] = {
    **dict.fromkeys(("batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm"), per_channel),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), over_trailing),
    **dict.fromkeys(("group_norm", "native_group_norm"), grouped),
    **dict.fromkeys(("prelu", "_prelu_kernel"), prelu),
}
