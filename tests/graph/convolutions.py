# SPDX-License-Identifier: Apache-2.0
"""Patterns of convolutional networks: chains, branches, groups, gates, parameters beside layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.pattern import IMAGE, conv, fixed, param, pattern


@pattern(
    "chain_flatten", IMAGE, {"a": 7, "b": 5}, lambda: {"a": conv(3, 7), "b": conv(7, 5), "head": nn.Linear(240, 6)}
)
def _(self, x):
    return self.head(F.relu(self.b(F.relu(self.a(x)))).flatten(1))


@pattern(
    "residual",
    IMAGE,
    {"stem+norm+b": 7, "a": 5},
    lambda: {
        "stem": conv(3, 7),
        "norm": nn.BatchNorm2d(7),
        "a": conv(7, 5, bias=False),
        "b": conv(5, 7),
        "head": nn.Linear(7, 6),
    },
)
def _(self, x):
    x = torch.sigmoid(self.norm(self.stem(x)))
    x = x + self.b(F.relu(self.a(x)))
    return self.head(x.mean((2, 3)))


@pattern(
    "densecat",
    IMAGE,
    {"a+norm": 5, "b+norm": 7, "c": 4},
    lambda: {
        "a": conv(3, 5),
        "b": conv(8, 7),
        "norm": nn.BatchNorm2d(15),
        "c": conv(15, 4),
        "head": nn.Linear(4, 6),
    },
)
def _(self, x):
    y = torch.cat([x, self.a(x)], 1)
    z = self.norm(torch.cat([y, self.b(y)], 1))
    return self.head(self.c(F.relu(z)).mean((2, 3)))


@pattern(
    "cat_then_add",
    IMAGE,
    {"a+c": 5, "b+c": 3},
    lambda: {"a": conv(3, 5), "b": conv(3, 3), "c": conv(3, 8), "head": conv(8, 4)},
)
def _(self, x):
    return self.head(F.relu(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))


@pattern("cat_same_twice", IMAGE, {"a": 7}, lambda: {"a": conv(3, 7), "head": conv(14, 4)})
def _(self, x):
    y = torch.tanh(self.a(x))
    return self.head(torch.cat([y, y.flip(2)], 1))


@pattern("chunk_gate", IMAGE, {"a": 7}, lambda: {"a": conv(3, 14), "head": conv(7, 4)})
def _(self, x):
    u, v = self.a(x).chunk(2, 1)
    return self.head(u * torch.sigmoid(v))


@pattern(
    "grouped_conv",
    IMAGE,
    {"stem": 3, "a": 2},
    lambda: {"stem": conv(3, 9), "a": conv(9, 6, groups=3), "head": conv(6, 4)},
)
def _(self, x):
    return self.head(F.relu(self.a(F.relu(self.stem(x)))))


@pattern(
    "grouped_conv_expand",
    IMAGE,
    {"stem": 3, "a": 5},
    lambda: {"stem": conv(3, 6), "a": conv(6, 10, groups=2), "head": conv(10, 4)},
)
def _(self, x):
    return self.head(F.relu(self.a(F.relu(self.stem(x)))))


@pattern(
    "depthwise",
    IMAGE,
    {"stem+a+norm": 7, "b": 5},
    lambda: {
        "stem": conv(3, 7),
        "a": conv(7, 7, groups=7),
        "norm": nn.BatchNorm2d(7),
        "b": conv(7, 5, 1),
        "head": nn.Linear(5, 6),
    },
)
def _(self, x):
    x = F.relu6(self.norm(self.a(F.hardswish(self.stem(x)))))
    return self.head(self.b(x).mean((2, 3)))


@pattern(
    "depthwise_mult2",
    IMAGE,
    {"stem+a": 5},
    lambda: {"stem": conv(3, 5), "a": conv(5, 10, groups=5), "head": conv(10, 4)},
)
def _(self, x):
    """Output 2i and 2i + 1 read input i: one coupling has two channels of `a`."""
    return self.head(F.relu(self.a(self.stem(x))))


@pattern(
    "transposed",
    IMAGE,
    {"stem": 7, "up": 5},
    lambda: {"stem": conv(3, 7), "up": nn.ConvTranspose2d(7, 5, 2, stride=2), "head": conv(5, 4)},
)
def _(self, x):
    return self.head(F.silu(self.up(F.relu(self.stem(x)))))


@pattern(
    "transposed_grouped",
    IMAGE,
    {"stem": 3, "up": 5},
    lambda: {"stem": conv(3, 6), "up": nn.ConvTranspose2d(6, 10, 3, groups=2), "head": conv(10, 4)},
)
def _(self, x):
    return self.head(F.silu(self.up(F.relu(self.stem(x)))))


@pattern(
    "transposed_depthwise",
    IMAGE,
    {"stem+up": 6},
    lambda: {"stem": conv(3, 6), "up": nn.ConvTranspose2d(6, 6, 3, groups=6), "head": conv(6, 4)},
)
def _(self, x):
    return self.head(F.silu(self.up(F.relu(self.stem(x)))))


@pattern(
    "se_block",
    IMAGE,
    {"a+up": 7, "down": 3},
    lambda: {"a": conv(3, 7), "down": conv(7, 3, 1), "up": conv(3, 7, 1), "head": conv(7, 4)},
)
def _(self, x):
    x = self.a(x)
    gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
    return self.head(x * torch.sigmoid(gate))


@pattern(
    "prelu", IMAGE, {"a+act": 7}, lambda: {"a": conv(3, 7), "act": nn.PReLU(7), "one": nn.PReLU(), "head": conv(7, 4)}
)
def _(self, x):
    return self.head(self.one(self.act(self.a(x))))


@pattern(
    "interpolate_skip",
    IMAGE,
    {"a": 5, "b": 7, "c": 4},
    lambda: {"a": conv(3, 5), "b": conv(5, 7), "c": conv(12, 4), "head": conv(4, 2)},
)
def _(self, x):
    a = F.relu(self.a(x))
    b = F.interpolate(self.b(F.max_pool2d(a, 2)), scale_factor=2.0, mode="bilinear")
    return self.head(F.relu(self.c(torch.cat([b, F.dropout(a, training=self.training)], 1))))


@pattern(
    "permute_linear", IMAGE, {"a": 7, "mix": 5}, lambda: {"a": conv(3, 7), "mix": nn.Linear(7, 5), "head": conv(5, 4)}
)
def _(self, x):
    x = self.mix(self.a(x).permute(0, 2, 3, 1))
    return self.head(F.relu(x).permute(0, 3, 1, 2))


@pattern(
    "tokens_flatten",
    IMAGE,
    {"a": 7, "mix": 5},
    lambda: {"a": conv(3, 7, 2, stride=2, padding=0), "mix": nn.Linear(7, 5), "head": nn.Linear(5, 4)},
)
def _(self, x):
    x = self.a(x).flatten(2).transpose(1, 2)
    return self.head(F.gelu(self.mix(x)))


@pattern("shared_conv", IMAGE, {"stem+same": 7}, lambda: {"stem": conv(3, 7), "same": conv(7, 7), "head": conv(7, 4)})
def _(self, x):
    return self.head(F.relu(self.same(F.relu(self.same(self.stem(x))))))


@pattern(
    "shared_head_fpn",
    IMAGE,
    {"low": 7, "high": 5, "p3+p4": 6, "hidden": 4},
    lambda: {
        "low": conv(3, 7),
        "high": conv(7, 5, stride=2),
        "p3": conv(7, 6, 1),
        "p4": conv(5, 6, 1),
        "hidden": conv(6, 4),
        "head": conv(4, 2),
    },
)
def _(self, x):
    low = F.relu(self.low(x))
    high = F.relu(self.high(low))
    return [self.head(F.relu(self.hidden(level))) for level in (self.p3(low), self.p4(high))]


@pattern(
    "layerscale_param",
    IMAGE,
    {"stem+a+gamma": 7},
    lambda: {"stem": conv(3, 7), "a": conv(7, 7), "gamma": param(7, 1, 1), "head": conv(7, 4)},
)
def _(self, x):
    x = self.stem(x)
    return self.head(x + self.gamma * F.relu(self.a(x)))


@pattern(
    "frozen_conv",
    IMAGE,
    {"stem": 5, "a": 7},
    lambda: {"stem": conv(3, 5), "a": conv(5, 7).requires_grad_(False), "head": conv(7, 4)},
)
def _(self, x):
    """`requires_grad=False` says that it is not trained, not that it is not cut."""
    return self.head(F.relu(self.a(F.relu(self.stem(x)))))


@pattern(
    "frozen_residual",
    IMAGE,
    {"stem+a": 7},
    lambda: {"stem": conv(3, 7), "a": conv(7, 7).requires_grad_(False), "head": conv(7, 4)},
)
def _(self, x):
    x = F.relu(self.stem(x))
    return self.head(F.relu(x + self.a(x)))


@pattern("stack_sum", IMAGE, {"a+b": 7}, lambda: {"a": conv(3, 7), "b": conv(3, 7), "head": conv(7, 4)})
def _(self, x):
    return self.head(torch.stack([self.a(x), self.b(x)]).sum(0))


@pattern(
    "chunk_c2f",
    IMAGE,
    {"enter+b": 5, "a": 3, "leave": 4},
    lambda: {"enter": conv(3, 10, 1), "a": conv(5, 3), "b": conv(3, 5), "leave": conv(15, 4, 1), "head": conv(4, 2)},
)
def _(self, x):
    parts = list(F.silu(self.enter(x)).chunk(2, 1))
    parts.append(parts[-1] + self.b(F.silu(self.a(parts[-1]))))
    return self.head(F.silu(self.leave(torch.cat(parts, 1))))


@pattern(
    "yolo_c2f_sppf",
    IMAGE,
    {"enter+b1+b2": 5, "a1": 3, "a2": 4, "leave": 6, "first": 3, "last": 7},
    lambda: {
        "enter": conv(3, 10, 1),
        "a1": conv(5, 3),
        "b1": conv(3, 5),
        "a2": conv(5, 4),
        "b2": conv(4, 5),
        "leave": conv(20, 6, 1),
        "first": conv(6, 3, 1),
        "last": conv(12, 7, 1),
        "head": conv(7, 2, 1),
    },
)
def _(self, x):
    parts = list(F.silu(self.enter(x)).chunk(2, 1))
    parts.append(parts[-1] + self.b1(F.silu(self.a1(parts[-1]))))
    parts.append(parts[-1] + self.b2(F.silu(self.a2(parts[-1]))))
    pools = [F.silu(self.first(F.silu(self.leave(torch.cat(parts, 1)))))]
    for _ in range(3):
        pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
    return self.head(F.silu(self.last(torch.cat(pools, 1))))


@pattern(
    "functional_conv",
    IMAGE,
    {"kernel+bias": 7, "a": 5},
    lambda: {"kernel": param(7, 3, 3, 3), "bias": param(7), "a": conv(7, 5), "head": conv(5, 4)},
)
def _(self, x):
    return self.head(F.relu(self.a(F.relu(F.conv2d(x, self.kernel, self.bias, padding=1)))))


@pattern("nonzero_act", IMAGE, {"a+norm": 7}, lambda: {"a": conv(3, 7), "norm": nn.BatchNorm2d(7), "head": conv(7, 4)})
def _(self, x):
    """sigmoid(0), cos(0) and the norm's shift are not zero: a zeroed channel is not one that is gone."""
    return self.head(torch.cos(torch.sigmoid(self.norm(self.a(x)))) + 1)


@pattern(
    "conv1d",
    (fixed(2, 3, 11),),
    {"a+norm": 7, "b": 5},
    lambda: {
        "a": nn.Conv1d(3, 7, 3),
        "norm": nn.BatchNorm1d(7),
        "b": nn.Conv1d(7, 5, 3, stride=2),
        "head": nn.Linear(5, 4),
    },
)
def _(self, x):
    x = F.avg_pool1d(F.relu(self.b(F.leaky_relu(self.norm(self.a(x))))), 2)
    return self.head(x.amax(-1))


@pattern(
    "conv3d",
    (fixed(2, 2, 4, 5, 6),),
    {"a+norm": 3, "b": 5, "up": 4},
    lambda: {
        "a": nn.Conv3d(2, 3, 3, padding=1),
        "norm": nn.BatchNorm3d(3),
        "b": nn.Conv3d(3, 5, 2),
        "up": nn.ConvTranspose3d(5, 4, 2),
        "head": nn.Conv3d(4, 2, 1),
    },
)
def _(self, x):
    x = F.elu(self.b(F.max_pool3d(F.relu(self.norm(self.a(x))), (1, 2, 2))))
    return self.head(F.softplus(self.up(x)))


@pattern(
    "transposed1d",
    (fixed(2, 3, 9),),
    {"a": 7, "up": 5},
    lambda: {"a": nn.Conv1d(3, 7, 3), "up": nn.ConvTranspose1d(7, 5, 4, stride=2), "head": nn.Conv1d(5, 2, 1)},
)
def _(self, x):
    return self.head(F.mish(self.up(F.relu(self.a(x)))))


@pattern("bilinear_product", IMAGE, {"a+b": 7}, lambda: {"a": conv(3, 7), "b": conv(3, 7), "head": conv(7, 4)})
def _(self, x):
    return self.head(self.a(x) * torch.tanh(self.b(x)) / (1 + self.a(x).abs()))


@pattern(
    "squeeze_view",
    IMAGE,
    {"a": 7, "hidden": 5},
    lambda: {"a": conv(3, 7), "hidden": nn.Linear(7, 5), "head": nn.Linear(5, 4)},
)
def _(self, x):
    x = F.adaptive_max_pool2d(F.relu(self.a(x)), 1)
    return self.head(F.relu(self.hidden(x.view(x.size(0), -1))))


@pattern(
    "inplace_activations",
    IMAGE,
    {"a+norm+b": 7},
    lambda: {
        "a": conv(3, 7),
        "norm": nn.BatchNorm2d(7),
        "b": conv(7, 7),
        "act": nn.ReLU6(inplace=True),
        "hard": nn.Hardswish(inplace=True),
        "head": conv(7, 4),
    },
)
def _(self, x):
    x = self.act(self.norm(self.a(x)))
    y = self.hard(self.b(x))
    y += x
    return self.head(y.mul_(0.5).clamp_(-1, 1))
