# SPDX-License-Identifier: Apache-2.0
"""`self_attention`: a hand-written self-attention with one linear layer for queries, keys and values, made plain.

Such modules (timm's and DeiT's among them) compute the head size from the width of their input (`C // num_heads`) and
put heads together with `reshape(B, N, C)`, so that no head can be cut out and no attribute mends that. Ours keeps their
two linear layers under their own names, with explicit head sizes. What the layer computes is found by trial: the plain
attention that answers alike on random weights and inputs, in float64, or none. So a plan replayed later finds the same.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits.exact import Exact, double
from featherweight.errors import EditError

__all__ = ["SelfAttention", "read_self_attention"]


@dataclass(frozen=True)
class _Form:
    """Which child is which, how the fused outputs are laid out, and what the scores are multiplied by."""

    fused: str
    out: str
    heads: int
    layout: Literal["parts", "heads"]
    scale: float
    attention_dropout: str | None
    output_dropout: str | None


class SelfAttention(nn.Module):
    """Softmax attention of x (..., tokens, channels) to itself: a fused linear layer, heads, and an output layer.

    `qk_size` and `v_size` are the positions of one head in queries and keys, and in values. The fused layer's rows are
    either all queries, all keys, all values ("parts"), or these three head by head ("heads"). The scale of the scores
    stays that of the head as it was built. `read_self_attention` makes it from a layer that computes the same.
    """

    def __init__(self, old: nn.Module, form: _Form) -> None:
        super().__init__()
        self.fused_name, self.out_name = form.fused, form.out
        self.num_heads: int = form.heads
        self.layout, self.scale = form.layout, form.scale
        # Under their own names: the state dict stays, and parameters keep their identity.
        for name in dict.fromkeys(n for n, _ in old.named_children() if n in (form.fused, form.out)):
            self.add_module(name, old.get_submodule(name))
        width: Any = self.get_submodule(form.out).in_features
        self.qk_size: int = width // form.heads
        self.v_size: int = self.qk_size
        self.dropout = _rate(old, form.attention_dropout)
        self.output_dropout = _rate(old, form.output_dropout)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.get_submodule(self.fused_name)(x)
        sizes = (self.qk_size, self.qk_size, self.v_size)
        if self.layout == "parts":
            parts = fused.split([self.num_heads * size for size in sizes], dim=-1)
            q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for part in parts)
        else:
            q, k, v = fused.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2).split(sizes, dim=-1)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        output = self.get_submodule(self.out_name)(mixed.transpose(-3, -2).flatten(-2))
        return F.dropout(output, self.output_dropout, self.training)

    def part_and_head(self, row: int) -> tuple[str, int]:
        """What a row of the fused layer makes: "qk" of queries and keys ("q" and "k"), or "v"; and of which head."""
        sizes = {"q": self.qk_size, "k": self.qk_size, "v": self.v_size}
        head, row = (0, row) if self.layout == "parts" else divmod(row, sum(sizes.values()))
        for part, size in sizes.items():
            span = size * self.num_heads if self.layout == "parts" else size
            if row < span:
                return part, row // size if self.layout == "parts" else head
            row -= span
        raise EditError(f"row {row} is outside the fused layer.")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, qk_size={self.qk_size}, v_size={self.v_size}, scale={self.scale:.4g}"


def read_self_attention(old: nn.Module) -> SelfAttention:
    """The plain form of a layer, with that layer's own linear layers. Raises `EditError` where there is none.

    >>> class Fused(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)
    ...     def forward(self, x):
    ...         B, N, C = x.shape
    ...         q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
    ...         weights = (q @ k.transpose(-2, -1) * (C // self.num_heads) ** -0.5).softmax(-1)
    ...         return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))
    >>> read_self_attention(Fused()).num_heads
    2
    """
    if any(form for form in _forms(old)):
        probe = double(old)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in probe.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise.to(parameter.device) / max(parameter.shape[-1], 1) ** 0.5)
        for form in _forms(old):
            width = old.get_submodule(form.fused).in_features
            x = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)  # type: ignore[call-overload]
            if _alike(probe, SelfAttention(probe, form), x.to(next(probe.parameters()).device)):
                return SelfAttention(old, form)
    raise EditError(
        f"a {type(old).__name__} does not answer as softmax attention with one linear layer for queries, keys and "
        "values does; 'self_attention' cannot take its place."
    )


def _forms(old: nn.Module) -> Iterator[_Form]:
    """All that the layer could be, the likeliest first."""
    layers = {name: child for name, child in old.named_children() if type(child) is nn.Linear}
    drops = [name for name, child in old.named_children() if isinstance(child, nn.Dropout) and child.p > 0]
    floats = [value for value in vars(old).values() if type(value) is float]
    for fused, out in itertools.permutations(layers, 2):
        inner = layers[out].in_features
        own = {id(t) for name in (fused, out) for t in layers[name].parameters()}
        if layers[fused].out_features != 3 * inner or any(id(t) not in own for t in old.parameters()):
            continue
        counts = {
            name: value for name, value in vars(old).items() if type(value) is int and value > 0 and inner % value == 0
        }
        for heads in dict.fromkeys(
            sorted(counts.values(), key=lambda n: [k for k in counts if counts[k] == n and "head" in k] == [])
        ):
            scales = dict.fromkeys([(inner // heads) ** -0.5, *floats, 1.0, layers[fused].in_features ** -0.5])
            places = [
                (a, b)
                for a in (None, *drops)
                for b in (None, *drops)
                if (a is None or a != b) and len({a, b} - {None}) == len(drops)
            ]
            for layout, scale, (a, b) in itertools.product(("parts", "heads"), scales, places):
                yield _Form(fused, out, heads, layout, scale, a, b)  # type: ignore[arg-type]


def _alike(old: nn.Module, new: nn.Module, x: Tensor) -> bool:
    """In eval mode; and in training mode from the same seed, where dropout must fall on the same places."""
    devices = [x.device] if x.device.type == "cuda" else []
    for training in (False, True) if any(isinstance(m, nn.Dropout) and m.p > 0 for m in old.modules()) else (False,):
        answers: list[Any] = []
        for module in (old, new):
            with torch.random.fork_rng(devices=devices), torch.no_grad(), Exact():
                torch.manual_seed(0)
                try:
                    answers.append(copy.deepcopy(module).train(training)(x))
                except Exception:  # a layer of other arguments, or of a fixed number of tokens, is none of ours
                    return False
        theirs, ours = answers
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return False
        if not float((theirs - ours).abs().amax()) <= 1e-9 * float(theirs.abs().amax()):
            return False
    return True


def _rate(old: nn.Module, name: str | None) -> float:
    if name is None:
        return 0.0
    rate: Any = old.get_submodule(name).p
    return float(rate)
