# SPDX-License-Identifier: Apache-2.0
"""Patterns on tokens without attention: MLPs, norms, embeddings, windows, recurrent layers."""

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
    frozen={"a.weight": "input|placeholder"},
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


@pattern("lstm", TOKENS, {"rnn": 7}, lambda: {"rnn": nn.LSTM(9, 7, batch_first=True), "head": nn.Linear(7, 4)})
def _(self, x):
    """Unit i is rows i, 7 + i, 14 + i and 21 + i of the weights, column i of weight_hh."""
    return self.head(self.rnn(x)[0])


@pattern("gru", TOKENS, {"rnn": 7}, lambda: {"rnn": nn.GRU(9, 7, batch_first=True), "head": nn.Linear(7, 4)})
def _(self, x):
    return self.head(self.rnn(x)[0][:, -1])


@pattern(
    "rnn_tanh", TOKENS, {"rnn": 7}, lambda: {"rnn": nn.RNN(9, 7, batch_first=True), "head": nn.Linear(7, 4)}, loose=True
)
def _(self, x):
    return self.head(self.rnn(x)[1][0])


LSTM2 = {"rnn.weight_ih_l0": 7, "rnn.weight_ih_l1": 7}
BOTH_WAYS = {f"rnn.weight_ih_{name}": 7 for name in ("l0", "l0_reverse", "l1", "l1_reverse")}


@pattern(
    "lstm_layers",
    (fixed(5, 2, 9),),
    LSTM2,
    lambda: {"rnn": nn.LSTM(9, 7, num_layers=2, bias=False), "head": nn.Linear(7, 4)},
    loose=True,
)
def _(self, x):
    """A module has one hidden size: as such both layers lose as many, or all are cut by the same index."""
    return self.head(self.rnn(x)[0])


@pattern(
    "lstm_bidirectional",
    TOKENS,
    BOTH_WAYS,
    lambda: {"rnn": nn.LSTM(9, 7, num_layers=2, bidirectional=True, batch_first=True), "head": nn.Linear(14, 4)},
    loose=True,
)
def _(self, x):
    out, (h, _) = self.rnn(x)
    return self.head(out + torch.cat([h[-2], h[-1]], -1)[:, None])


@pattern(
    "gru_layers",
    TOKENS,
    LSTM2,
    lambda: {"rnn": nn.GRU(9, 7, num_layers=2, batch_first=True), "head": nn.Linear(7, 4)},
    loose=True,
)
def _(self, x):
    return self.head(self.rnn(x)[1][-1])


@pattern(
    "gru_bidirectional",
    TOKENS,
    BOTH_WAYS,
    lambda: {"rnn": nn.GRU(9, 7, num_layers=2, bidirectional=True, batch_first=True), "head": nn.Linear(14, 4)},
    loose=True,
)
def _(self, x):
    return self.head(torch.relu(self.rnn(x)[0]))


@pattern(
    "lstm_between_layers",
    TOKENS,
    {"a": 6, "rnn": 7, "b": 5},
    lambda: {
        "a": nn.Linear(9, 6),
        "rnn": nn.LSTM(6, 7, batch_first=True),
        "b": nn.Linear(7, 5),
        "head": nn.Linear(5, 4),
    },
)
def _(self, x):
    return self.head(F.relu(self.b(self.rnn(F.relu(self.a(x)))[0])))


@pattern(
    "lstm_residual",
    TOKENS,
    {"a+rnn": 7},
    lambda: {"a": nn.Linear(9, 7), "rnn": nn.LSTM(7, 7, batch_first=True), "head": nn.Linear(7, 4)},
)
def _(self, x):
    x = self.a(x)
    return self.head(x + self.rnn(x)[0])


@pattern(
    "lstm_started_by_states",
    (TOKENS[0], fixed(2, 4)),
    {"rnn+h+c": 7},
    lambda: {
        "rnn": nn.LSTM(9, 7, batch_first=True),
        "h": nn.Linear(4, 7),
        "c": nn.Linear(4, 7),
        "head": nn.Linear(7, 4),
    },
)
def _(self, x, y):
    return self.head(self.rnn(x, (torch.tanh(self.h(y))[None], self.c(y)[None]))[0])


@pattern(
    "lstm_projected",
    TOKENS,
    {"rnn": 7},
    lambda: {"rnn": nn.LSTM(9, 7, proj_size=5, batch_first=True), "head": nn.Linear(5, 4)},
    loose=True,
)
def _(self, x):
    return self.head(self.rnn(x)[0])


@pattern("gru_cell", TOKENS, {"cell": 7}, lambda: {"cell": nn.GRUCell(9, 7), "head": nn.Linear(7, 4)}, loose=True)
def _(self, x):
    h = x.new_zeros(x.shape[0], 7)
    for step in x.unbind(1):
        h = self.cell(step, h)
    return self.head(h)
