# SPDX-License-Identifier: Apache-2.0
"""Patterns of recurrent layers: unit i is a row of every gate, and a column of what the layer feeds itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.pattern import TOKENS, fixed, pattern

LSTM2 = {"rnn.weight_ih_l0": 7, "rnn.weight_ih_l1": 7}
BOTH_WAYS = {f"rnn.weight_ih_{name}": 7 for name in ("l0", "l0_reverse", "l1", "l1_reverse")}


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
