# SPDX-License-Identifier: Apache-2.0
"""Which hand-written attentions our plain one stands for. Oracle: the layer itself, on its own weights and with masks."""

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits import SelfAttention, apply
from featherweight.errors import EditError
from featherweight.plan import Slice, Swap
from tests.edits.snapshot import snapshot

WIDTH, HEADS = 12, 4
SIZE = WIDTH // HEADS


class Parts(nn.Module):
    """All queries, all keys, all values; heads put together by the width of the input."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.depth = HEADS, 3
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(2 * drop)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        return self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.factor()).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(x.shape)))

    def factor(self) -> float:
        return SIZE**-0.5


class PerHead(Parts):
    """BLOOM's: queries, keys and values head by head."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        return self.qkv(x).view(b, n, self.num_heads, 3, c // self.num_heads).permute(3, 0, 2, 1, 4).unbind(0)


class Scaled(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 0.37

    def factor(self) -> float:
        return self.temperature


class Biased(Parts):
    """Swin's: a bias for each distance."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias.sum()


class Sigmoid(Parts):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.proj(((q @ k.transpose(-2, -1)).sigmoid() @ v).transpose(1, 2).reshape(x.shape))


class Causal(Parts):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


class Fixed(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(1, 7, 1)


def swapped(old: nn.Module) -> nn.Module:
    holder = nn.ModuleDict({"attention": copy.deepcopy(old)})
    apply(holder, Swap("attention", to="self_attention"))
    return holder["attention"]


@pytest.mark.parametrize("kind", [Parts, PerHead, Scaled])
def test_it_is_found_by_trial_and_answers_alike(kind: type[Parts]) -> None:
    old = kind().double()
    random = torch.get_rng_state()
    new = swapped(old)
    assert torch.equal(torch.get_rng_state(), random)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(new(x), old(x), rtol=1e-11, atol=1e-13)
    assert list(new.state_dict()) == list(old.state_dict())


def test_linear_layers_are_the_very_same() -> None:
    old = Parts()
    holder = nn.ModuleDict({"attention": old})
    apply(holder, Swap("attention", to="self_attention"))
    assert holder["attention"].qkv is old.qkv
    assert holder["attention"].proj is old.proj


def test_dropout_falls_on_the_same_places() -> None:
    """Two rates: one on the weights, one on the output; the plain math kernel draws as the layer's own dropout does."""
    old = Parts(drop=0.2)
    new = swapped(old)
    assert (new.dropout, new.output_dropout) == (0.2, 0.4)
    assert new.training


@pytest.mark.parametrize("kind", [Biased, Sigmoid, Causal, Fixed])
def test_what_computes_something_else_is_refused(kind: type[Parts]) -> None:
    """A zero bias makes it look alike on its own weights; on random ones it does not."""
    holder = nn.ModuleDict({"attention": kind()})
    before = snapshot(holder)
    with pytest.raises(
        EditError, match=re.escape(f"attention: a {kind.__name__} does not answer as softmax attention")
    ):
        apply(holder, Swap("attention", to="self_attention"))
    assert snapshot(holder) == before


def rows(kind: type[Parts], part: int, head: int) -> list[int]:
    start = part * WIDTH + head * SIZE if kind is Parts else (head * 3 + part) * SIZE
    return list(range(start, start + SIZE))


@pytest.mark.parametrize("kind", [Parts, PerHead])
def test_heads_and_positions_within_them_are_cut(kind: type[Parts]) -> None:
    """Of heads 1 and 3, one position of the queries and keys and another of the values; written out by hand."""
    old: Any = kind().double()
    model = nn.ModuleDict({"attention": copy.deepcopy(old)})
    apply(model, Swap("attention", to="self_attention"))
    heads, qk, v = (1, 3), (0, 2), (0, 1, 2)
    keep = sorted(
        rows(kind, part, head)[i] for part, inside in enumerate((qk, qk, v)) for head in heads for i in inside
    )
    columns = tuple(head * SIZE + i for head in heads for i in v)
    for edit in (Slice("attention.qkv.weight", 0, tuple(keep)), Slice("attention.qkv.bias", 0, tuple(keep))):
        apply(model, edit)
    apply(model, Slice("attention.proj.weight", 1, columns))
    cut: SelfAttention = model["attention"]
    assert (cut.num_heads, cut.qk_size, cut.v_size) == (2, 2, 3)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    q, k, values = (t[:, list(heads)] for t in old.split(x))
    weights = (q[..., list(qk)] @ k[..., list(qk)].transpose(-2, -1) * SIZE**-0.5).softmax(-1)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    expected = F.linear(mixed, old.proj.weight[:, list(columns)], old.proj.bias)
    torch.testing.assert_close(cut(x), expected, rtol=1e-11, atol=1e-13)


def test_uneven_heads_are_refused() -> None:
    model = nn.ModuleDict({"attention": Parts()})
    apply(model, Swap("attention", to="self_attention"))
    before = snapshot(model)
    for keep in (tuple(range(1, 36)), tuple(range(24)), (*range(3), *range(12, 15), *range(27, 30))):
        with pytest.raises(EditError, match="does not keep the same number of queries, keys and values"):
            apply(model, Slice("attention.qkv.weight", 0, keep))
    assert snapshot(model) == before
