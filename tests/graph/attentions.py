# SPDX-License-Identifier: Apache-2.0
"""Patterns of attention: three heads of four dimensions, in every way that models write it down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.pattern import TOKENS, fixed, param, pattern

HEADS = {"q+k+v": 3}
DIMS = {"q+k": 4, "v": 4}


def projections(width=9, heads=3, kv=None, size=4, out=5):
    kv = heads if kv is None else kv
    return {
        "q": nn.Linear(width, heads * size),
        "k": nn.Linear(width, kv * size),
        "v": nn.Linear(width, kv * size, bias=False),
        "o": nn.Linear(heads * size, out),
    }


def split(x, heads=-1, size=4):
    """(batch, tokens, heads * size) to (batch, heads, tokens, size)"""
    return x.view(x.shape[0], x.shape[1], heads, size).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


@pattern("attn_sep_matmul", TOKENS, HEADS, projections)
def _(self, x):
    """The size of a head stands in the code, their number follows: whole heads go without further ado."""
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join((q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v))


@pattern("attn_sep_sdpa", TOKENS, HEADS, projections)
def _(self, x):
    return self.o(join(F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(self.v(x)))))


@pattern("attn_heads_fixed", TOKENS, HEADS, projections, dims=DIMS)
def _(self, x):
    """The number of heads stands in the code: at the grain of dimensions, each head loses the same one."""
    q, k, v = (split(part(x), 3, -1) for part in (self.q, self.k, self.v))
    return self.o(join((q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v))


@pattern(
    "attn_static_attrs",
    TOKENS,
    HEADS,
    lambda: {"num_heads": 3, "head_dim": 4, "all_head_size": 12, **projections()},
    dims=DIMS,
)
def _(self, x):
    """BERT's: three attributes that must follow."""
    q, k, v = (split(part(x), self.num_heads, self.head_dim) for part in (self.q, self.k, self.v))
    y = (q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v
    y = y.permute(0, 2, 1, 3).contiguous()
    return self.o(y.view((*y.shape[:-2], self.all_head_size)))


@pattern("attn_scaled_by_size", TOKENS, HEADS, lambda: {"num_heads": 3, "head_dim": 4, **projections()}, dims=DIMS)
def _(self, x):
    """The scale is computed of the size of a head: when that is cut, the scale of the uncut head must stay."""
    q, k, v = (split(part(x), self.num_heads, self.head_dim) for part in (self.q, self.k, self.v))
    return self.o(join((q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1) @ v))


@pattern(
    "attn_fused_qkv",
    TOKENS,
    {"qkv": 3, "o": 5},
    lambda: {"num_heads": 3, "qkv": nn.Linear(9, 36), "o": nn.Linear(12, 5), "head": nn.Linear(5, 4)},
    dims={"qkv": 4, "o": 5},
)
def _(self, x):
    """timm's, in which the size of a head follows from the number of heads; (3, heads, size) stays a product."""
    q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    y = (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v
    return self.head(self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)))


@pattern("attn_fused_chunk", TOKENS, {"qkv": 3}, lambda: {"qkv": nn.Linear(9, 36), "o": nn.Linear(12, 5)})
def _(self, x):
    q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
    return self.o(join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


@pattern(
    "attn_fused_per_head",
    TOKENS,
    {"qkv": 3},
    lambda: {"qkv": nn.Linear(9, 36), "o": nn.Linear(12, 5)},
    dims={"qkv": (4, 4)},
    loose=True,
)
def _(self, x):
    """GPT-NeoX's: each head's query, key and value stand beside each other."""
    q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 12).transpose(1, 2).split(4, -1)
    return self.o(join(F.scaled_dot_product_attention(q, k, v)))


@pattern(
    "attn_width_of_the_input",
    TOKENS,
    {"qkv": 3},
    lambda: {"num_heads": 3, "qkv": nn.Linear(9, 27), "o": nn.Linear(9, 5)},
    dims={"qkv": 3},
    loose=True,
)
def _(self, x):
    """The size of a head is computed of the input's width, which stays: no attribute says it."""
    b, n, c = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


@pattern("gqa_repeat", TOKENS, {"q+k+v": 2}, lambda: projections(heads=6, kv=2), dims=None)
def _(self, x):
    """A key and value head goes with the three query heads that read it."""
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    return self.o(join(F.scaled_dot_product_attention(q, k, v)))


@pattern("gqa_expand", TOKENS, {"q+k+v": 2}, lambda: projections(heads=6, kv=2))
def _(self, x):
    """Llama's `repeat_kv`, by expand and reshape."""
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    b, h, n, d = k.shape
    k = k[:, :, None].expand(b, h, 3, n, d).reshape(b, h * 3, n, d)
    v = v[:, :, None].expand(b, h, 3, n, d).reshape(b, h * 3, n, d)
    return self.o(join((q @ k.transpose(2, 3) / 2.0).softmax(-1) @ v))


@pattern("gqa_enable", TOKENS, {"q+k+v": 2}, lambda: projections(heads=6, kv=2))
def _(self, x):
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


@pattern("mqa", TOKENS, {"q": 3}, lambda: projections(kv=1), loose=True)
def _(self, x):
    """One key and value for all: a query head goes by itself."""
    q, k, v = split(self.q(x)), split(self.k(x), 1), split(self.v(x), 1)
    return self.o(join((q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v))


@pattern("rotary", TOKENS, HEADS, lambda: {"turns": fixed(2), **projections()}, dims={"v": 4}, loose=True)
def _(self, x):
    """Dimension i of a head is turned with dimension i + 2, by angles from a buffer."""
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.turns
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()

    def turned(y):
        return y * cos + torch.cat([-y[..., 2:], y[..., :2]], -1) * sin

    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join(F.scaled_dot_product_attention(turned(q), turned(k), v)))


@pattern(
    "rotary_interleaved",
    TOKENS,
    HEADS,
    lambda: {"cos": fixed(5, 2), "sin": fixed(5, 2), **projections()},
    dims={"v": 4},
    loose=True,
)
def _(self, x):
    """Dimensions 2i and 2i + 1 are one complex number."""

    def turned(y):
        even, odd = y[..., 0::2], y[..., 1::2]
        return torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], -1).flatten(-2)

    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join(F.scaled_dot_product_attention(turned(q), turned(k), v)))


@pattern("qk_norm", TOKENS, HEADS, lambda: {"qn": nn.RMSNorm(4), "kn": nn.LayerNorm(4), **projections()})
def _(self, x):
    """Norms over the dimensions of each head, one scale for all heads: whole heads are exact."""
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join(F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)))


@pattern(
    "channel_attention",
    TOKENS,
    {"qkv+temperature": 3},
    lambda: {"num_heads": 3, "temperature": param(3, 1, 1), "qkv": nn.Linear(9, 36), "o": nn.Linear(12, 5)},
    dims={},
    loose=True,
)
def _(self, x):
    """XCiT's: dimensions attend to dimensions, so that only whole heads leave the softmax as it is."""
    q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
    weight = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
    return self.o((weight.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


@pattern(
    "talking_heads",
    TOKENS,
    {"q+k": 3, "before+v": 3},
    lambda: {"before": nn.Conv2d(3, 3, 1), **projections()},
    loose=True,
)
def _(self, x):
    """Scores are mixed over heads: heads of queries and keys on one side, heads of values on the other."""
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join(self.before(q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v))


@pattern(
    "window_attention",
    (fixed(2, 4, 6, 9),),
    {"qkv+table": 3, "enter+norm+o": 5},
    lambda: {
        "num_heads": 3,
        "table": param(9, 3),
        "index": (torch.arange(4)[:, None] + torch.arange(4)) % 9,
        "enter": nn.Linear(9, 5),
        "norm": nn.LayerNorm(5),
        "qkv": nn.Linear(5, 36),
        "o": nn.Linear(12, 5),
        "head": nn.Linear(5, 4),
    },
    norms=("enter+norm+o",),
)
def _(self, x):
    """Swin's, with its table of biases by relative position: a head is a column of it."""
    x = self.enter(x)
    b, h, w, c = x.shape
    y = self.norm(x).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    q, k, v = self.qkv(y).reshape(y.shape[0], 4, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
    y = ((q @ k.transpose(-2, -1) / 2.0 + bias).softmax(-1) @ v).transpose(1, 2).reshape(y.shape[0], 4, -1)
    y = self.o(y).view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
    return self.head(x + y)


@pattern("relative_bias_embedding", TOKENS, {"q+k+v+bias": 3}, lambda: {"bias": nn.Embedding(9, 3), **projections()})
def _(self, x):
    """T5's: a table of buckets x heads, looked up by distance."""
    near = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) + 4
    bias = self.bias(near).permute(2, 0, 1)[None]
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v))


@pattern("alibi", TOKENS, {"q+k+v+slopes": 3}, lambda: {"slopes": fixed(3, 1, 1), **projections()})
def _(self, x):
    far = torch.arange(x.shape[1], dtype=x.dtype) * self.slopes
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join((q @ k.transpose(-1, -2) / 2.0 + far).softmax(-1) @ v))


@pattern("causal_mask_buffer", TOKENS, HEADS, lambda: {"mask": torch.ones(8, 8).tril().bool(), **projections()})
def _(self, x):
    n = x.shape[1]
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(~self.mask[:n, :n], float("-inf"))
    return self.o(join(scores.softmax(-1) @ v))


@pattern(
    "padding_mask",
    (TOKENS[0], torch.tensor([[True, True, True, True, False], [True, True, True, False, False]])),
    HEADS,
    projections,
)
def _(self, x, mask):
    bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -1e9)[:, None, None]
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    return self.o(join(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


@pattern("einsum_attention", TOKENS, HEADS, projections)
def _(self, x):
    q, k, v = (part(x).unflatten(-1, (-1, 4)) for part in (self.q, self.k, self.v))
    weight = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return self.o(torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2))


@pattern(
    "einsum_heads_in_the_weight",
    TOKENS,
    {"q+k+v+o": 3},
    lambda: {
        name: param(*shape) for name, shape in {"q": (9, 3, 4), "k": (9, 3, 4), "v": (9, 3, 4), "o": (3, 4, 5)}.items()
    },
    loose=True,
)
def _(self, x):
    """Weights of three axes: width, head, size of a head."""
    q, k, v = (torch.einsum("bnc,chd->bhnd", x, weight) for weight in (self.q, self.k, self.v))
    y = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
    return torch.einsum("bhnd,hdo->bno", y, self.o)


@pattern("linear_attention", TOKENS, HEADS, projections, dims=DIMS, loose=True)
def _(self, x):
    """Keys meet values first; no softmax, so that dimensions are exact as well."""
    q, k, v = (split(part(x), 3, -1) for part in (self.q, self.k, self.v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return self.o(join(q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2)[..., None])))


@pattern(
    "learned_queries",
    TOKENS,
    {"queries": 7, **HEADS},
    lambda: {"queries": param(4, 7), **projections(), "q": nn.Linear(7, 12)},
)
def _(self, x):
    """DETR's and Perceiver's: queries are a parameter, whose channels `q` reads."""
    q = self.q(self.queries.expand(x.shape[0], -1, -1))
    return self.o(join(F.scaled_dot_product_attention(split(q), split(self.k(x)), split(self.v(x)))))


@pattern(
    "attention_pooling",
    TOKENS,
    {"a": 7, "score": 5},
    lambda: {"a": nn.Linear(9, 7), "score": nn.Linear(7, 5), "one": nn.Linear(5, 1), "head": nn.Linear(7, 4)},
)
def _(self, x):
    x = F.relu(self.a(x))
    weight = self.one(torch.tanh(self.score(x))).softmax(1)
    return self.head((x * weight).sum(1))


@pattern(
    "cross_attention",
    (TOKENS[0], fixed(2, 4, 6)),
    {"enter+o": 7, "memory": 5, **HEADS},
    lambda: {
        "enter": nn.Linear(9, 7),
        "memory": nn.Linear(6, 5),
        **projections(),
        "q": nn.Linear(7, 12),
        "k": nn.Linear(5, 12),
        "v": nn.Linear(5, 12),
        "o": nn.Linear(12, 7),
        "head": nn.Linear(7, 4),
    },
)
def _(self, x, memory):
    x, memory = self.enter(x), F.relu(self.memory(memory))
    y = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(memory)), split(self.v(memory)))
    return self.head(x + self.o(join(y)))
