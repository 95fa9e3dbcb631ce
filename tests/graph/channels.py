# SPDX-License-Identifier: Apache-2.0
"""Patterns in which channels are split, reordered or laid out anew, and in which an operation runs over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.pattern import IMAGE, conv, fixed, param, pattern


@pattern(
    "split_slice",
    IMAGE,
    {"a": (4, 7)},
    lambda: {"a": conv(3, 11), "u": conv(4, 5), "v": conv(7, 5)},
    frozen={"u.weight": "output"},
)
def _(self, x):
    """The numbers stand in the code: no attribute of the model can say that they changed."""
    y = F.relu(self.a(x))
    return self.u(y[:, :4]) + self.v(y[:, 4:])


@pattern(
    "split_sizes_attribute",
    IMAGE,
    {"a": (4, 7)},
    lambda: {"sizes": (4, 7), "a": conv(3, 11), "u": conv(4, 5), "v": conv(7, 5)},
)
def _(self, x):
    u, v = F.relu(self.a(x)).split(self.sizes, 1)
    return self.u(u) + self.v(v)


@pattern("flatten_hwc", IMAGE, {"a": 7}, lambda: {"a": conv(3, 7), "head": nn.Linear(336, 4)})
def _(self, x):
    """Coupling i is every seventh column of `head`, where flattening channels first makes it 48 in a row."""
    return self.head(F.relu(self.a(x)).permute(0, 2, 3, 1).flatten(1))


@pattern("view_static", IMAGE, {"a": 5}, lambda: {"a": conv(3, 5), "head": nn.Linear(240, 4)})
def _(self, x):
    """LeNet's `view`: the number stands in the code, and after a cut the batch would change instead."""
    return self.head(F.relu(self.a(x)).view(-1, 240))


@pattern(
    "instnorm_running",
    IMAGE,
    {"a+norm": 7},
    lambda: {
        "a": conv(3, 7),
        "norm": nn.InstanceNorm2d(7, affine=True, track_running_stats=True),
        "plain": nn.InstanceNorm2d(7),
        "head": conv(7, 4),
    },
)
def _(self, x):
    """In eval mode the first takes its running statistics, the second those of each image and channel: both exact."""
    return self.head(F.relu(self.plain(self.norm(self.a(x)))))


@pattern("pixel_shuffle", IMAGE, {"a": 3}, lambda: {"a": conv(3, 12), "head": conv(3, 4)})
def _(self, x):
    """Coupling i is channels 4i to 4i + 3 of `a`."""
    return self.head(F.relu(F.pixel_shuffle(self.a(x), 2)))


@pattern("pixel_unshuffle", IMAGE, {"a": 5}, lambda: {"a": conv(3, 5), "head": conv(20, 4)})
def _(self, x):
    return self.head(F.relu(F.pixel_unshuffle(self.a(x), 2)))


@pattern("manual_pixelshuffle", IMAGE, {"a": 3}, lambda: {"a": conv(3, 12), "head": conv(3, 4)})
def _(self, x):
    b, c, h, w = (x := self.a(x)).shape
    x = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return self.head(F.relu(x.reshape(b, c // 4, 2 * h, 2 * w)))


@pattern("channel_shuffle", IMAGE, {"a": 5}, lambda: {"a": conv(3, 10), "head": conv(10, 4)})
def _(self, x):
    x = F.relu(self.a(x))
    b, c, h, w = x.shape
    return self.head(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


@pattern(
    "channel_shuffle_by_op",
    IMAGE,
    {"a": 5},
    lambda: {"a": conv(3, 10), "mix": nn.ChannelShuffle(2), "head": conv(10, 4)},
)
def _(self, x):
    """The module goes on to deal out two halves, so that both lose the same."""
    return self.head(self.mix(F.relu(self.a(x))))


@pattern(
    "channel_shuffle_between_groups",
    IMAGE,
    {"stem": 3, "b": 2},
    lambda: {"stem": conv(3, 9), "a": conv(9, 6, 1, groups=3), "b": conv(6, 4, 1, groups=2), "head": conv(4, 4)},
    loose=True,
)
def _(self, x):
    """By index within a group all six channels of `a` would go together; whole groups of it could be cut."""
    x = F.channel_shuffle(self.a(F.relu(self.stem(x))), 3)
    return self.head(F.relu(self.b(x)))


@pattern(
    "shufflenet_unit",
    IMAGE,
    {"stem+out": 5, "mid+depth": 4, "last": 7},
    lambda: {
        "stem": conv(3, 10),
        "mid": conv(5, 4, 1),
        "depth": conv(4, 4, groups=4),
        "out": conv(4, 5, 1),
        "last": conv(10, 7, 1),
        "head": conv(7, 4),
    },
)
def _(self, x):
    """The shuffle sends channel i of the left and of the right to neighbours: they stay a product as one coupling."""
    left, right = self.stem(x).chunk(2, 1)
    x = torch.cat([left, F.relu(self.out(self.depth(F.relu(self.mid(right)))))], 1)
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return self.head(F.relu(self.last(x)))


@pattern(
    "gather_roll",
    IMAGE,
    {"a": 7},
    lambda: {"order": torch.tensor([3, 0, 6, 1, 5, 2, 4]), "a": conv(3, 7), "head": conv(7, 4)},
    loose=True,
)
def _(self, x):
    """Channels in an order that stands in a buffer of indices, and rolled: a cut renumbers both, or does not happen."""
    return self.head(torch.roll(F.relu(self.a(x))[:, self.order], 2, 1))


@pattern("buffer_scale", IMAGE, {"a+scale": 7}, lambda: {"a": conv(3, 7), "scale": fixed(7, 1, 1), "head": conv(7, 4)})
def _(self, x):
    return self.head(F.relu(self.a(x)) * self.scale)


@pattern(
    "cbam_channel_statistics",
    IMAGE,
    {"a": 7},
    lambda: {"a": conv(3, 7), "spatial": conv(2, 1, 3), "head": conv(7, 4)},
    norms=("a",),
    loose=True,
)
def _(self, x):
    """Mean and maximum over channels: of the channels that are left, so that a cut changes them."""
    x = F.relu(self.a(x))
    seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return self.head(x * torch.sigmoid(self.spatial(seen)))


@pattern(
    "groupnorm",
    IMAGE,
    {"a+norm": 3},
    lambda: {"a": conv(3, 6), "norm": nn.GroupNorm(2, 6), "head": conv(6, 4)},
    norms=("a+norm",),
)
def _(self, x):
    return self.head(F.relu(self.norm(self.a(x))))


@pattern(
    "groupnorm_one_group",
    IMAGE,
    {"a+norm": 5},
    lambda: {"a": conv(3, 5), "norm": nn.GroupNorm(1, 5), "head": conv(5, 4)},
    norms=("a+norm",),
)
def _(self, x):
    return self.head(F.relu(self.norm(self.a(x))))


@pattern(
    "groupnorm_each_channel",
    IMAGE,
    {"a+norm": 5},
    lambda: {"a": conv(3, 5), "norm": nn.GroupNorm(5, 5), "head": conv(5, 4)},
    loose=True,
)
def _(self, x):
    """A group of one channel is an instance norm: a channel and its group go together, and nothing else changes."""
    return self.head(F.relu(self.norm(self.a(x))))


@pattern(
    "eca",
    IMAGE,
    {"a": 7},
    lambda: {"a": conv(3, 7), "slide": nn.Conv1d(1, 1, 3, padding=1, bias=False), "head": conv(7, 4)},
    loose=True,
)
def _(self, x):
    """The convolution slides along the channels: without one of them its neighbours see others."""
    x = self.a(x)
    gate = self.slide(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
    return self.head(x * torch.sigmoid(gate)[:, :, None, None])


@pattern(
    "convnext_block",
    IMAGE,
    {"stem+depth+gamma+project": 5, "expand": 7},
    lambda: {
        "stem": conv(3, 5),
        "depth": conv(5, 5, groups=5),
        "norm": nn.LayerNorm(5),
        "expand": nn.Linear(5, 7),
        "project": nn.Linear(7, 5),
        "gamma": param(5),
        "head": conv(5, 4),
    },
    norms=("stem+depth+gamma+project",),
)
def _(self, x):
    x = self.stem(x)
    y = self.norm(self.depth(x).permute(0, 2, 3, 1))
    y = self.gamma * self.project(F.gelu(self.expand(y)))
    return self.head(x + y.permute(0, 3, 1, 2))


@pattern(
    "layernorm_channels_first",
    IMAGE,
    {"a+weight+bias": 5},
    lambda: {"a": conv(3, 5), "weight": param(5), "bias": param(5), "head": conv(5, 4)},
    norms=("a+weight+bias",),
)
def _(self, x):
    x = self.a(x)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
    return self.head(self.weight[:, None, None] * x + self.bias[:, None, None])


@pattern(
    "global_response_norm",
    (fixed(2, 8, 6, 3),),
    {"enter+gamma+beta": 7},
    lambda: {"enter": nn.Linear(3, 7), "gamma": param(1, 1, 1, 7), "beta": param(1, 1, 1, 7), "head": nn.Linear(7, 4)},
    norms=("enter+gamma+beta",),
)
def _(self, x):
    x = F.gelu(self.enter(x))
    size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    size = size / (size.mean(-1, keepdim=True) + 1e-6)
    return self.head(self.gamma * (x * size) + self.beta + x)


@pattern(
    "selective_kernel",
    IMAGE,
    {"a+b+gate": 5, "down": 3},
    lambda: {
        "a": conv(3, 5),
        "b": conv(3, 5, 5),
        "down": nn.Linear(5, 3),
        "gate": nn.Linear(3, 10),
        "head": conv(5, 4),
    },
)
def _(self, x):
    """The softmax runs over the two branches, not over channels: it stays exact."""
    both = torch.stack([self.a(x), self.b(x)], 1)
    gate = self.gate(F.relu(self.down(both.sum(1).mean((2, 3)))))
    gate = gate.view(x.shape[0], 2, -1).softmax(1)
    return self.head((both * gate[:, :, :, None, None]).sum(1))


@pattern(
    "padded_shortcut",
    IMAGE,
    {"stem": 5, "b": 3},
    lambda: {"stem": conv(3, 5), "b": conv(5, 8), "head": conv(8, 4)},
    loose=True,
)
def _(self, x):
    """ResNet's option A: the shortcut gets channels of zeros, so that five channels of `b` go with `stem`, three alone."""
    x = F.relu(self.stem(x))
    return self.head(F.pad(x, (0, 0, 0, 0, 0, 3)) + self.b(x))


@pattern("maxout", IMAGE, {"a": 5}, lambda: {"a": conv(3, 10), "head": conv(5, 4)})
def _(self, x):
    x = self.a(x)
    return self.head(torch.maximum(x[:, 0::2], x[:, 1::2]))


@pattern(
    "softmax_over_channels", IMAGE, {"a": 7}, lambda: {"a": conv(3, 7), "head": conv(7, 4)}, loose=True, norms=("a",)
)
def _(self, x):
    """What is left would get more: frozen, or cut and said to change statistics."""
    return self.head(self.a(x).softmax(1))
