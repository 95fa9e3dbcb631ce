# SPDX-License-Identifier: Apache-2.0
"""Networks put together at random: convolutions in residuals, concatenations and groups; MLPs and attention in stacks.

A network is a nested list of words, which hypothesis draws and makes smaller; `network` builds it and `inputs` feeds it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.graph.blocks import SelfAttention
from tests.graph.pattern import fixed, randomised

Word = tuple[Any, ...]


class Through(nn.Module):
    """`x + f(x)`, or `x` and `f(x)` side by side on `axis`."""

    def __init__(self, body: nn.Module, axis: int | None = None) -> None:
        super().__init__()
        self.body, self.axis = body, axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.axis is None else torch.cat([y, x], self.axis)


class Halves(nn.Module):
    """A gate: one half of the channels times the sigmoid of the other."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, self.axis)
        return a * torch.sigmoid(b)


class Shuffled(nn.Module):
    """Channels of two halves in turn."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def image_words() -> st.SearchStrategy[list[Word]]:
    plain = st.one_of(
        st.tuples(st.just("conv"), st.integers(4, 7)),
        st.tuples(
            st.sampled_from(
                ["grouped", "depthwise", "norm", "groups", "gate", "act", "scale", "halves", "shuffle", "prelu"]
            )
        ),
    )
    return _nested(plain)


def token_words() -> st.SearchStrategy[list[Word]]:
    plain = st.one_of(
        st.tuples(st.just("linear"), st.integers(4, 7)),
        st.tuples(st.sampled_from(["layernorm", "rmsnorm", "attention", "gated", "act", "scale", "halves", "lstm"])),
    )
    return _nested(plain)


def _nested(plain: st.SearchStrategy[Word]) -> st.SearchStrategy[list[Word]]:
    words = st.lists(plain, min_size=1, max_size=3)
    wrapped = st.tuples(st.sampled_from(["residual", "concat"]), words)
    deeper = st.tuples(st.sampled_from(["residual", "concat"]), st.lists(plain | wrapped, min_size=1, max_size=2))
    return st.lists(plain | wrapped | deeper, min_size=1, max_size=4)


def network(words: list[Word], images: bool) -> nn.Module:
    def make() -> nn.Module:
        stem = nn.Conv2d(3, 6, 3, padding=1) if images else nn.Linear(9, 6)
        body, width = _stack(words, 6, images)
        head = nn.Conv2d(width, 4, 1) if images else nn.Linear(width, 4)
        return nn.Sequential(stem, body, head)

    return randomised(make).double()


def inputs(images: bool) -> tuple[Tensor]:
    return (fixed(2, 3, 6, 4).double() if images else fixed(2, 5, 9).double(),)


def _stack(words: list[Word], width: int, images: bool) -> tuple[nn.Sequential, int]:
    parts: list[nn.Module] = []
    for word in words:
        part, width = (_image if images else _token)(word, width)
        parts.append(part)
    return nn.Sequential(*parts), width


def _through(word: Word, width: int, images: bool) -> tuple[nn.Module, int]:
    body, out = _stack(word[1], width, images)
    if word[0] == "concat":
        return Through(body, 1 if images else -1), width + out
    if out != width:
        body.append(nn.Conv2d(out, width, 1) if images else nn.Linear(out, width))
    return Through(body), width


def _image(word: Word, width: int) -> tuple[nn.Module, int]:
    match word[0]:
        case "conv":
            return nn.Conv2d(width, word[1], 3, padding=1, bias=word[1] % 2 == 0), word[1]
        case "grouped" if width % 2 == 0:
            return nn.Conv2d(width, 6, 3, padding=1, groups=2), 6
        case "depthwise":
            return nn.Conv2d(width, width, 3, padding=1, groups=width), width
        case "norm":
            return nn.BatchNorm2d(width), width
        case "groups" if width % 2 == 0:
            return nn.GroupNorm(2, width), width
        case "gate":
            return Gate(width), width
        case "scale":
            return Scale(width, 1, 1), width
        case "halves" if width % 2 == 0 and width > 6:
            return Halves(1), width // 2
        case "shuffle" if width % 2 == 0:
            return Shuffled(), width
        case "prelu":
            return nn.PReLU(width), width
        case "residual" | "concat":
            return _through(word, width, True)
    return nn.Hardswish(), width


def _token(word: Word, width: int) -> tuple[nn.Module, int]:
    match word[0]:
        case "linear":
            return nn.Linear(width, word[1]), word[1]
        case "layernorm":
            return nn.LayerNorm(width), width
        case "rmsnorm":
            return nn.RMSNorm(width), width
        case "attention":
            return SelfAttention(width, 3, 2), width
        case "gated":
            return Gated(width, 5), width
        case "scale":
            return Scale(width), width
        case "halves" if width % 2 == 0 and width > 6:
            return Halves(-1), width // 2
        case "lstm":
            return Recurrent(width), 5
        case "residual" | "concat":
            return _through(word, width, False)
    return nn.GELU(), width


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]
