# SPDX-License-Identifier: Apache-2.0
"""Patterns on tokens without attention: MLPs, norms, embeddings and tied ones, windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.pattern import IMAGE, TOKENS, WORDS, conv, fixed, param, pattern


@pattern(
    "mlp",
    TOKENS,
    {"a": 7, "b": 5},
    lambda: {"a": nn.Linear(9, 7), "b": nn.Linear(7, 5, bias=False), "head": nn.Linear(5, 4)},
)
def _(self, x):
    return self.head(torch.tanh(self.b(F.relu(self.a(x)))))


@pattern(
    "swiglu", TOKENS, {"gate+up": 7}, lambda: {"gate": nn.Linear(9, 7), "up": nn.Linear(9, 7), "down": nn.Linear(7, 9)}
)
def _(self, x):
    return self.down(F.silu(self.gate(x)) * self.up(x))


@pattern("swiglu_fused_chunk", TOKENS, {"both": 7}, lambda: {"both": nn.Linear(9, 14), "down": nn.Linear(7, 9)})
def _(self, x):
    gate, up = self.both(x).chunk(2, -1)
    return self.down(F.silu(gate) * up)


@pattern("glu", TOKENS, {"both": 7}, lambda: {"both": nn.Linear(9, 14), "down": nn.Linear(7, 9)})
def _(self, x):
    return self.down(F.glu(self.both(x)))


@pattern(
    "prenorm_mlp",
    TOKENS,
    {"enter+norm+b+last": 5, "a": 7},
    lambda: {
        "enter": nn.Linear(9, 5),
        "norm": nn.LayerNorm(5),
        "a": nn.Linear(5, 7),
        "b": nn.Linear(7, 5),
        "last": nn.LayerNorm(5),
        "head": nn.Linear(5, 4),
    },
    norms=("enter+norm+b+last",),
)
def _(self, x):
    x = self.enter(x)
    x = x + self.b(F.gelu(self.a(self.norm(x))))
    return self.head(self.last(x))


@pattern(
    "layernorm_without_affine",
    TOKENS,
    {"enter": 5},
    lambda: {"enter": nn.Linear(9, 5), "norm": nn.LayerNorm(5, elementwise_affine=False), "head": nn.Linear(5, 4)},
    norms=("enter",),
)
def _(self, x):
    """No tensor says how wide the norm is: `normalized_shape` must follow."""
    return self.head(self.norm(self.enter(x)))


@pattern(
    "rmsnorm",
    TOKENS,
    {"enter+norm": 5},
    lambda: {"enter": nn.Linear(9, 5), "norm": nn.RMSNorm(5), "head": nn.Linear(5, 4)},
    norms=("enter+norm",),
)
def _(self, x):
    return self.head(self.norm(self.enter(x)))


@pattern(
    "rmsnorm_by_hand",
    TOKENS,
    {"enter+scale": 5},
    lambda: {"enter": nn.Linear(9, 5), "scale": param(5), "head": nn.Linear(5, 4)},
    norms=("enter+scale",),
)
def _(self, x):
    """Llama's, with its cast to float32 inside."""
    x = self.enter(x)
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return self.head(self.scale * y.to(x.dtype))


@pattern(
    "rmsnorm_scaled_by_constant",
    TOKENS,
    {"enter+scale": 5},
    lambda: {"width": 5, "enter": nn.Linear(9, 5), "scale": param(5), "head": nn.Linear(5, 4)},
    norms=("enter+scale",),
)
def _(self, x):
    """The norm of all channels times the root of a width that is an attribute: which is a number, not a size."""
    return self.head(F.normalize(self.enter(x), dim=-1) * self.width**0.5 * self.scale)


@pattern(
    "mlp_mixer",
    TOKENS,
    {"enter+norm+c2": 7, "t1": 6, "c1": 4},
    lambda: {
        "enter": nn.Linear(9, 7),
        "norm": nn.LayerNorm(7),
        "t1": nn.Linear(5, 6),
        "t2": nn.Linear(6, 5),
        "c1": nn.Linear(7, 4),
        "c2": nn.Linear(4, 7),
        "head": nn.Linear(7, 3),
    },
    norms=("enter+norm+c2",),
)
def _(self, x):
    """Tokens are mixed by linear layers on the transpose: their ends are the tokens, which stay."""
    x = self.enter(x)
    x = x + self.t2(F.gelu(self.t1(self.norm(x).transpose(1, 2)))).transpose(1, 2)
    x = x + self.c2(F.gelu(self.c1(x)))
    return self.head(x.mean(1))


@pattern(
    "gmlp_gate",
    TOKENS,
    {"both+norm": 6},
    lambda: {"both": nn.Linear(9, 12), "norm": nn.LayerNorm(6), "mix": nn.Linear(5, 5), "down": nn.Linear(6, 9)},
    norms=("both+norm",),
)
def _(self, x):
    u, v = self.both(x).chunk(2, -1)
    return self.down(u * self.mix(self.norm(v).transpose(1, 2)).transpose(1, 2))


@pattern(
    "batchnorm1d_over_tokens",
    TOKENS,
    {"a": 7},
    lambda: {"a": nn.Linear(9, 7), "norm": nn.BatchNorm1d(5), "head": nn.Linear(7, 4)},
    loose=True,
)
def _(self, x):
    """The norm's channels are the tokens here; a channel of `a` passes through it."""
    return self.head(self.norm(self.a(x)))


@pattern(
    "batchnorm1d_of_a_vector",
    (fixed(4, 9),),
    {"a+norm": 7},
    lambda: {"a": nn.Linear(9, 7), "norm": nn.BatchNorm1d(7, affine=False), "head": nn.Linear(7, 4)},
)
def _(self, x):
    return self.head(F.relu(self.norm(self.a(x))))


@pattern(
    "cls_token_pos",
    IMAGE,
    {"patch+cls+pos+norm": 5},
    lambda: {
        "patch": conv(3, 5, 2, stride=2, padding=0),
        "cls": param(1, 1, 5),
        "pos": param(1, 13, 5),
        "norm": nn.LayerNorm(5),
        "head": nn.Linear(5, 4),
    },
    norms=("patch+cls+pos+norm",),
)
def _(self, x):
    x = self.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
    return self.head(self.norm(x)[:, 0])


@pattern("tied_embedding", WORDS, {"words+mix": 7}, lambda: tied(), frozen={"words.weight": "embedding|output"})
def _(self, x):
    """The output layer's weight is the embedding: one parameter, one axis of it words, the other cut once."""
    x = self.words(x)
    return self.head(x + torch.tanh(self.mix(x)))


def tied():
    words, head = nn.Embedding(11, 7), nn.Linear(7, 11, bias=False)
    head.weight = words.weight
    return {"words": words, "mix": nn.Linear(7, 7), "head": head}


@pattern(
    "tied_embedding_projected",
    WORDS,
    {"words+back": 5, "up": 7},
    lambda: {**tied_narrow(), "up": nn.Linear(5, 7), "back": nn.Linear(7, 5)},
)
def _(self, x):
    """ALBERT's and OPT's: the embedding is narrower than the network, and the output layer is the embedding again."""
    return self.head(torch.tanh(self.back(F.gelu(self.up(self.words(x))))))


def tied_narrow():
    words, head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
    head.weight = words.weight
    return {"words": words, "head": head}


@pattern("tied_in_code", WORDS, {"words+mix": 7}, lambda: {"words": nn.Embedding(11, 7), "mix": nn.Linear(7, 7)})
def _(self, x):
    x = self.words(x)
    return F.linear(x + torch.tanh(self.mix(x)), self.words.weight)


@pattern(
    "embeddings_summed",
    WORDS,
    {"words+places+kinds+norm": 7},
    lambda: {
        "words": nn.Embedding(11, 7, padding_idx=1),
        "places": nn.Embedding(6, 7),
        "kinds": param(2, 7),
        "ids": torch.arange(6)[None],
        "norm": nn.LayerNorm(7),
        "head": nn.Linear(7, 4),
    },
    norms=("words+places+kinds+norm",),
)
def _(self, x):
    """BERT's: words, positions by a buffer of indices, and a row of a table of kinds."""
    y = self.words(x) + self.places(self.ids[:, : x.shape[1]]) + self.kinds[1]
    return self.head(self.norm(y))


@pattern(
    "sinusoidal_positions",
    TOKENS,
    {"a+waves": 6},
    lambda: {"a": nn.Linear(9, 6), "waves": fixed(1, 8, 6), "head": nn.Linear(6, 4)},
)
def _(self, x):
    """A table of positions in a buffer, longer than the sequence."""
    return self.head(torch.tanh(self.a(x) + self.waves[:, : x.shape[1]]))


@pattern(
    "window_partition",
    (fixed(2, 6, 4, 3),),
    {"enter+b": 5, "a": 7},
    lambda: {"enter": nn.Linear(3, 5), "a": nn.Linear(5, 7), "b": nn.Linear(7, 5), "head": nn.Linear(5, 4)},
)
def _(self, x):
    x = self.enter(x)
    b, h, w, c = x.shape
    y = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    y = self.b(F.gelu(self.a(y)))
    y = y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
    return self.head(x + y)


@pattern(
    "swin_shift",
    (fixed(2, 6, 4, 3),),
    {"enter+a": 5},
    lambda: {"enter": nn.Linear(3, 5), "a": nn.Linear(5, 5), "head": nn.Linear(5, 4)},
)
def _(self, x):
    """Rolled over space, never over channels."""
    x = self.enter(x)
    y = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
    return self.head(x + torch.roll(torch.tanh(self.a(y)), shifts=(1, 1), dims=(1, 2)))


@pattern(
    "patch_merging",
    (fixed(2, 6, 4, 3),),
    {"enter+norm": 5, "reduce": 7},
    lambda: {
        "enter": nn.Linear(3, 5),
        "norm": nn.LayerNorm(20),
        "reduce": nn.Linear(20, 7, bias=False),
        "head": nn.Linear(7, 4),
    },
    norms=("enter+norm",),
)
def _(self, x):
    """Swin's: coupling i is four positions of the norm and of `reduce`."""
    x = self.enter(x)
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    return self.head(torch.tanh(self.reduce(self.norm(torch.cat(parts, -1)))))
