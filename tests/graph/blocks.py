# SPDX-License-Identifier: Apache-2.0
"""Patterns of whole blocks: attention as a module of its own, torch's modules, encoders and decoders."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from tests.graph.pattern import TOKENS, add, fixed, pattern


class SelfAttention(nn.Module):
    """As a library has it: a module of its own whose attributes say its sizes."""

    def __init__(self, width, num_heads, head_dim):
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim, self.scaling = num_heads, head_dim, num_heads * head_dim, 0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, self.embed_dim) for _ in range(3))
        self.out_proj = nn.Linear(self.embed_dim, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (
            part(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = (q @ k.transpose(2, 3) * self.scaling).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).reshape(b, n, self.embed_dim))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(5), nn.LayerNorm(5)
        self.attention = SelfAttention(5, 3, 4)
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


RESIDUAL = {"enter+layer.attention.out_proj+layer.down+layer.first+layer.second": 5, "layer.up": 7}
OF_A_BLOCK = {**RESIDUAL, "layer.attention.q_proj+layer.attention.k_proj+layer.attention.v_proj": 3}


@pattern(
    "transformer_block",
    TOKENS,
    OF_A_BLOCK,
    lambda: {"enter": nn.Linear(9, 5), "layer": Block(), "head": nn.Linear(5, 4)},
    norms=(next(iter(RESIDUAL)),),
)
def _(self, x):
    return self.head(self.layer(self.enter(x)))


@pattern(
    "shared_block",
    TOKENS,
    OF_A_BLOCK,
    lambda: {"enter": nn.Linear(9, 5), "layer": Block(), "head": nn.Linear(5, 4)},
    norms=(next(iter(RESIDUAL)),),
)
def _(self, x):
    """ALBERT's: one block, three times."""
    x = self.enter(x)
    for _ in range(3):
        x = self.layer(x)
    return self.head(x)


@pattern(
    "mha_module",
    TOKENS,
    {"enter+attn.out_proj": 6, "attn.in_proj_weight": 3},
    lambda: {"enter": nn.Linear(9, 6), "attn": nn.MultiheadAttention(6, 3, batch_first=True), "head": nn.Linear(6, 4)},
)
def _(self, x):
    x = self.enter(x)
    return self.head(x + self.attn(x, x, x, need_weights=False)[0])


@pattern(
    "mha_module_with_weights",
    (fixed(5, 2, 9),),
    {"enter+attn.out_proj": 6, "attn.in_proj_weight": 3},
    lambda: {"enter": nn.Linear(9, 6), "attn": nn.MultiheadAttention(6, 3), "head": nn.Linear(6, 4)},
    norms=("attn.in_proj_weight",),
    loose=True,
)
def _(self, x):
    """The weights that it gives are the mean over heads: of the heads that are left."""
    x = self.enter(x)
    y, weights = self.attn(x, x, x)
    return self.head(x + y), weights


@pattern(
    "mha_module_cross",
    (TOKENS[0], fixed(2, 4, 7)),
    {"enter+attn.out_proj": 6, "attn.q_proj_weight+attn.k_proj_weight+attn.v_proj_weight": 3},
    lambda: {
        "enter": nn.Linear(9, 6),
        "attn": nn.MultiheadAttention(6, 3, kdim=7, vdim=7, batch_first=True),
        "head": nn.Linear(6, 4),
    },
    loose=True,
)
def _(self, x, memory):
    x = self.enter(x)
    return self.head(x + self.attn(x, memory, memory, need_weights=False)[0])


@pattern(
    "encoder_layer",
    TOKENS,
    {
        "enter+block.self_attn.out_proj+block.linear2+block.norm1+block.norm2": 6,
        "block.linear1": 7,
        "block.self_attn.in_proj_weight": 3,
    },
    lambda: {
        "enter": nn.Linear(9, 6),
        "block": nn.TransformerEncoderLayer(6, 3, 7, dropout=0.0, batch_first=True),
        "head": nn.Linear(6, 4),
    },
    norms=("enter+block.self_attn.out_proj+block.linear2+block.norm1+block.norm2",),
)
def _(self, x):
    """In eval mode torch takes one fused operation for all of it, unless gradients are on."""
    return self.head(self.block(self.enter(x)))


def whole_transformer():
    return nn.Transformer(6, 3, 1, 1, 7, dropout=0.0, batch_first=True, norm_first=True)


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Linear(9, 6), nn.Linear(4, 6)
        self.body = whole_transformer()
        self.head = nn.Linear(6, 4)

    def forward(self, x, y):
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=y.dtype)
        return self.head(self.body(self.source(x), self.target(y), tgt_mask=mask, tgt_is_causal=True))


# The decoder's cross-attention reads the target by its queries and the source by its keys and values, all of them rows of
# one weight with one width: its columns make both residual streams one.
STREAMS = (
    "source+target+body.encoder.layers.0.linear2+body.decoder.layers.0.linear2+body.encoder.norm+body.decoder.norm"
)

add(
    "encoder_decoder_module",
    (TOKENS[0], fixed(2, 3, 4)),
    {
        STREAMS: 6,
        "body.encoder.layers.0.self_attn.in_proj_weight": 3,
        "body.decoder.layers.0.self_attn.in_proj_weight": 3,
        "body.decoder.layers.0.multihead_attn.in_proj_weight": 3,
        "body.encoder.layers.0.linear1": 7,
        "body.decoder.layers.0.linear1": 7,
    },
    EncoderDecoder,
    norms=(STREAMS,),
)
