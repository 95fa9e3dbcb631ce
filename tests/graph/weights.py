# SPDX-License-Identifier: Apache-2.0
"""Patterns in which a weight is more than a parameter of its layer: parametrized, computed, shared, or wrapped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from tests.graph.pattern import IMAGE, TOKENS, conv, fixed, param, pattern


@pattern(
    "weight_norm",
    IMAGE,
    {"a": 7, "b": 5},
    lambda: {"a": weight_norm(conv(3, 7)), "b": weight_norm(conv(7, 5)), "head": conv(5, 4)},
    loose=True,
)
def _(self, x):
    """The old one, by a hook. A row's norm runs over its inputs: cutting inputs of `b` would change its rows."""
    return self.head(F.relu(self.b(F.relu(self.a(x)))))


@pattern(
    "weight_norm_parametrized",
    IMAGE,
    {"a": 7, "b": 5},
    lambda: {
        "a": parametrizations.weight_norm(conv(3, 7)),
        "b": parametrizations.weight_norm(conv(7, 5)),
        "head": conv(5, 4),
    },
    loose=True,
)
def _(self, x):
    return self.head(F.relu(self.b(F.relu(self.a(x)))))


@pattern(
    "spectral_norm",
    IMAGE,
    {"a": 7},
    lambda: {"a": parametrizations.spectral_norm(conv(3, 7)), "head": conv(7, 4)},
    loose=True,
)
def _(self, x):
    """The norm is of the whole weight."""
    return self.head(F.relu(self.a(x)))


class Squash(nn.Module):
    def forward(self, weight):
        return torch.tanh(weight)


class Invertible(Squash):
    def right_inverse(self, weight):
        return torch.atanh(weight)


def squashed(layer, kind=Invertible):
    parametrize.register_parametrization(layer, "weight", kind())
    return layer


@pattern(
    "parametrized_elementwise",
    TOKENS,
    {"a": 7, "b": 5},
    lambda: {"a": squashed(nn.Linear(9, 7)), "b": squashed(nn.Linear(7, 5)), "head": nn.Linear(5, 4)},
    loose=True,
)
def _(self, x):
    return self.head(F.relu(self.b(F.relu(self.a(x)))))


@pattern(
    "parametrized_one_way",
    TOKENS,
    {"a": 7, "b": 5},
    lambda: {"a": squashed(nn.Linear(9, 7), Squash), "b": squashed(nn.Linear(7, 5), Squash), "head": nn.Linear(5, 4)},
    loose=True,
)
def _(self, x):
    return self.head(F.relu(self.b(F.relu(self.a(x)))))


@pattern(
    "weight_standardized",
    IMAGE,
    {"a": 7},
    lambda: {"a": conv(3, 7), "b": param(5, 7, 3, 3), "head": conv(5, 4)},
    norms=("a",),
    loose=True,
)
def _(self, x):
    """BiT's: each row of the weight loses its mean over the inputs, which a cut of inputs changes."""
    weight = (self.b - self.b.mean((1, 2, 3), keepdim=True)) / (self.b.std((1, 2, 3), keepdim=True) + 1e-5)
    return self.head(F.relu(F.conv2d(F.relu(self.a(x)), weight, padding=1)))


@pattern(
    "weight_from_data",
    IMAGE,
    {"a": 7},
    lambda: {"a": conv(3, 7), "make": nn.Linear(7, 9), "head": conv(1, 4)},
    loose=True,
)
def _(self, x):
    """A kernel per image, made by a linear layer and used by one grouped convolution over the batch."""
    a = F.relu(self.a(x))
    kernel = self.make(a.mean((2, 3))).view(x.shape[0], 1, 3, 3)
    y = F.conv2d(x.mean(1, keepdim=True).transpose(0, 1), kernel, padding=1, groups=x.shape[0])
    return self.head(y.transpose(0, 1))


@pattern(
    "weight_of_a_mixture",
    IMAGE,
    {"a": 7, "bank": 5},
    lambda: {"a": conv(3, 7), "mix": nn.Linear(3, 2), "bank": param(2, 5, 7, 3, 3), "head": conv(5, 4)},
    loose=True,
)
def _(self, x):
    """CondConv's: a kernel is a weighted sum of kernels."""
    gate = self.mix(x.mean((0, 2, 3))).softmax(-1)
    kernel = (gate[:, None, None, None, None] * self.bank).sum(0)
    return self.head(F.relu(F.conv2d(F.relu(self.a(x)), kernel, padding=1)))


@pattern(
    "weight_masked",
    TOKENS,
    {"a": 7},
    lambda: {"a": nn.Linear(9, 7), "mask": (fixed(4, 7) > 0).float(), "weight": param(4, 7)},
    loose=True,
)
def _(self, x):
    return F.linear(F.relu(self.a(x)), self.weight * self.mask)


@pattern("weight_transposed_in_code", TOKENS, {"a": 7}, lambda: {"a": nn.Linear(9, 7), "back": nn.Linear(7, 9)})
def _(self, x):
    """An autoencoder with tied weights: the decoder is the encoder's transpose, beside a layer of its own."""
    y = torch.sigmoid(self.a(x))
    return F.linear(y, self.a.weight.t()) + self.back(y)


@pattern(
    "weight_slices",
    TOKENS,
    {"w": (4, 3)},
    lambda: {"w": param(7, 9), "head": nn.Linear(4, 4), "tail": nn.Linear(3, 4)},
    loose=True,
)
def _(self, x):
    return self.head(F.relu(F.linear(x, self.w[:4]))) + self.tail(F.relu(F.linear(x, self.w[4:])))


@pattern(
    "adapter",
    TOKENS,
    {"a": 7, "down": 2},
    lambda: {
        "a": nn.Linear(9, 7),
        "base": nn.Linear(7, 4),
        "down": nn.Linear(7, 2, bias=False),
        "up": nn.Linear(2, 4, bias=False),
    },
)
def _(self, x):
    """LoRA beside a frozen layer: its rank is a group like any other."""
    x = F.relu(self.a(x))
    return self.base(x) + self.up(self.down(x)) * 0.5


@pattern("tied_layers", TOKENS, {"enter+a+b": 7}, lambda: tied_layers())
def _(self, x):
    """Two layers hold one weight and biases of their own."""
    x = self.enter(x)
    return self.head(F.relu(self.b(F.relu(self.a(x)))))


def tied_layers():
    a, b = nn.Linear(7, 7), nn.Linear(7, 7)
    b.weight = a.weight
    return {"enter": nn.Linear(9, 7), "a": a, "b": b, "head": nn.Linear(7, 4)}


@pattern(
    "used_twice",
    TOKENS,
    {"a": 7, "c": 5},
    lambda: {"a": nn.Linear(9, 7), "c": nn.Linear(7, 5), "head": nn.Linear(5, 4), "tail": nn.Linear(7, 4)},
)
def _(self, x):
    """The second call of `a` is read by another layer: both readers lose the column."""
    return self.head(F.relu(self.c(F.relu(self.a(x))))) + self.tail(F.relu(self.a(x * 2)))


@pattern(
    "parameter_of_the_output",
    TOKENS,
    {"a": 7},
    lambda: {"a": nn.Linear(9, 7), "head": nn.Linear(7, 4), "shift": param(4)},
    frozen={"head.weight": "output"},
)
def _(self, x):
    return self.head(F.relu(self.a(x))) * self.shift


@pattern(
    "scalar_parameters",
    TOKENS,
    {"a": 7, "b": 5},
    lambda: {
        "a": nn.Linear(9, 7),
        "b": nn.Linear(7, 5),
        "gate": param(1),
        "scale": nn.Parameter(torch.tensor(0.7)),
        "head": nn.Linear(5, 4),
    },
)
def _(self, x):
    """One number for all channels: it stays and couples nothing."""
    return self.head(torch.sigmoid(self.scale * self.b(F.relu(self.a(x)) * self.gate)))


@pattern(
    "parameter_never_used",
    TOKENS,
    {"a": 7},
    lambda: {"a": nn.Linear(9, 7), "idle": param(7, 3), "count": torch.tensor(3), "head": nn.Linear(7, 4)},
)
def _(self, x):
    return self.head(F.relu(self.a(x)))


@pattern(
    "modules_in_lists",
    TOKENS,
    {"layers.0": 7, "layers.1": 5, "named.last": 6},
    lambda: {
        "layers": nn.ModuleList([nn.Linear(9, 7), nn.Linear(7, 5)]),
        "named": nn.ModuleDict({"last": nn.Linear(5, 6)}),
        "bank": nn.ParameterList([param(4, 6), param(4)]),
    },
)
def _(self, x):
    for layer in self.layers:
        x = F.relu(layer(x))
    return F.linear(F.relu(self.named["last"](x)), *self.bank)
