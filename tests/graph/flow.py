# SPDX-License-Identifier: Apache-2.0
"""Patterns of inputs and outputs, masks, data that decides, and products that no layer stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.pattern import IMAGE, TOKENS, conv, fixed, param, pattern


@pattern(
    "einsum_linear", TOKENS, {"a": 7, "b": 5}, lambda: {"a": param(9, 7), "b": param(5, 7), "head": nn.Linear(5, 4)}
)
def _(self, x):
    x = F.relu(torch.einsum("btc,cd->btd", x, self.a))
    return self.head(F.relu(torch.einsum("btd,ed->bte", x, self.b)))


@pattern(
    "matmul_of_parameters",
    TOKENS,
    {"a+bias": 7, "b": 5},
    lambda: {"a": param(9, 7), "bias": param(7), "b": param(7, 5), "head": nn.Linear(5, 4)},
)
def _(self, x):
    """GPT-2's Conv1D: weights stand in x out, used by addmm and by @."""
    x = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.a).view(x.shape[0], x.shape[1], -1)
    return self.head(F.gelu(x) @ self.b)


@pattern(
    "moe_dense_bmm",
    TOKENS,
    {"up": 7},
    lambda: {"route": nn.Linear(9, 3), "up": param(3, 9, 7), "down": param(3, 7, 9)},
    loose=True,
)
def _(self, x):
    """Experts in one tensor, all computed and weighed: hidden unit i goes in every expert."""
    weight = self.route(x).softmax(-1)
    y = x.reshape(1, -1, x.shape[-1]).expand(3, -1, -1)
    y = torch.bmm(F.relu(torch.bmm(y, self.up)), self.down)
    return (y * weight.reshape(-1, 3).t()[:, :, None]).sum(0).view_as(x)


@pattern(
    "mask_multiplied",
    (TOKENS[0], torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])),
    {"a": 7},
    lambda: {"a": nn.Linear(9, 7), "head": nn.Linear(7, 4)},
)
def _(self, x, mask):
    x = F.relu(self.a(x)) * mask[..., None]
    return self.head(x.sum(1) / mask.sum(1, keepdim=True))


@pattern(
    "mask_filled",
    (TOKENS[0], torch.tensor([[True, False, True, True, False], [True, True, True, False, False]])),
    {"a": 7},
    lambda: {"a": nn.Linear(9, 7), "head": nn.Linear(7, 4)},
)
def _(self, x, mask):
    x = self.a(x).masked_fill(~mask[..., None], -1e4)
    return self.head(torch.where(mask[..., None], x, torch.zeros_like(x)).amax(1))


@pattern(
    "dict_output",
    TOKENS,
    {"a": 7, "b": 5},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(7, 5), "one": nn.Linear(5, 4), "two": nn.Linear(7, 3)},
)
def _(self, x):
    a = F.relu(self.a(x))
    return {"one": self.one(F.relu(self.b(a))), "rest": (self.two(a), None)}


@pattern(
    "output_is_hidden_too",
    TOKENS,
    {"b": 5},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(7, 5), "head": nn.Linear(5, 4)},
    frozen={"a.weight": "output"},
)
def _(self, x):
    """What the caller gets keeps its shape, and so does all that makes it."""
    a = F.relu(self.a(x))
    return self.head(F.relu(self.b(a))), a


@pattern(
    "input_added_to_hidden",
    TOKENS,
    {"b": 5},
    lambda: {"a": nn.Linear(9, 9), "b": nn.Linear(9, 5), "head": nn.Linear(5, 4)},
    frozen={"a.weight": "add"},
)
def _(self, x):
    return self.head(F.relu(self.b(x + self.a(x))))


@pattern(
    "two_inputs",
    (TOKENS[0], fixed(2, 5, 4)),
    {"a+b": 7, "mix": 5},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(4, 7), "mix": nn.Bilinear(9, 4, 5), "head": nn.Linear(12, 6)},
    loose=True,
)
def _(self, x, y):
    return self.head(torch.cat([torch.tanh(self.a(x)) * torch.sigmoid(self.b(y)), self.mix(x, y)], -1))


@pattern("cumulative_and_sorted", TOKENS, {"a": 7}, lambda: {"a": nn.Linear(9, 7), "head": nn.Linear(7, 4)}, loose=True)
def _(self, x):
    """Over tokens: a channel stays a channel."""
    x = self.a(x)
    return self.head(x.cumsum(1) + x.sort(1).values)


@pattern(
    "sorted_channels",
    TOKENS,
    {"b": 5},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(7, 5), "head": nn.Linear(5, 4)},
    frozen={"a.weight": "sort|topk"},
)
def _(self, x):
    """Which channel stands where depends on the data."""
    return self.head(F.relu(self.b(self.a(x).sort(-1).values)))


@pattern(
    "fourier_over_channels",
    TOKENS,
    {"b": 5},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(7, 5), "head": nn.Linear(5, 4)},
    frozen={"a.weight": "fft"},
)
def _(self, x):
    return self.head(F.relu(self.b(torch.fft.fft(self.a(x), dim=-1).real)))


@pattern(
    "data_dependent_index",
    TOKENS,
    {"b": 5},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(3, 5), "head": nn.Linear(5, 4)},
    frozen={"a.weight": "topk|index|gather"},
)
def _(self, x):
    x = self.a(x)
    best = x.mean((0, 1)).topk(3).indices
    return self.head(F.relu(self.b(x[..., best])))


@pattern("data_dependent_token", TOKENS, {"a": 7}, lambda: {"a": nn.Linear(9, 7), "head": nn.Linear(7, 4)}, loose=True)
def _(self, x):
    """The token is chosen by the data, all its channels come along (CLIP's end of text)."""
    best = x.sum(-1).argmax(1)
    return self.head(F.relu(self.a(x))[torch.arange(x.shape[0]), best])


@pattern(
    "control_flow",
    TOKENS,
    {"a": 7},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(9, 7), "head": nn.Linear(7, 4)},
    front="recorded",
    loose=True,
)
def _(self, x):
    """The way depends on the data: export refuses, one forward is recorded, and that says so."""
    x = self.a(x) if x.sum() > -1e6 else self.b(x)
    return self.head(F.relu(x))


@pattern("width_from_attribute", TOKENS, {"a": 7}, lambda: {"width": 7, "a": nn.Linear(9, 7), "head": nn.Linear(35, 4)})
def _(self, x):
    """`width` must follow the cut."""
    return self.head(F.relu(self.a(x)).reshape(-1, 5 * self.width))


@pattern(
    "unused_branch",
    IMAGE,
    {"a": 7},
    lambda: {"a": conv(3, 7), "dead": conv(7, 5), "idle": conv(3, 2), "head": conv(7, 4)},
    loose=True,
)
def _(self, x):
    """`dead` is computed and dropped, `idle` never runs: neither may break a cut of `a`."""
    x = F.relu(self.a(x))
    self.dead(x)
    return self.head(x)
