# SPDX-License-Identifier: Apache-2.0
"""`swap`: one of our modules takes a layer's place and computes the same. Saves nothing by itself.

It makes a layer editable that is closed as it stands: torch's MultiheadAttention fuses its three projections and
asserts one width for all, so no head can be cut out of it; ours is four linear layers with explicit head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits.find import find_replaceable, replace_module
from featherweight.edits.self_attention import read_self_attention
from featherweight.edits.skip import skip, skip_tuple
from featherweight.errors import EditError, OptionError, nearest
from featherweight.plan import Swap

__all__ = ["SWAPS", "Attention", "apply_swap"]


class Attention(nn.Module):
    """torch's MultiheadAttention as four linear layers `q`, `k`, `v`, `out`, called alike, with explicit head sizes.

    `q_size`, `k_size` and `v_size` are the positions of one head in each projection. Heads, and positions within them,
    are cut by slicing rows of `q`, `k` and `v` and columns of `out`; the sizes follow, and the scores' scale stays that
    of the head as it was built. Weights that torch's layer does not fuse keep their identity.

    Takes (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal) and returns
    (output, weights or None), with axes as `batch_first` says.

    >>> old = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(1, 5, 8)
    >>> torch.allclose(Attention(old)(x, x, x)[0], old(x, x, x)[0], atol=1e-6)
    True
    """

    # torch's transformer encoder looks these up to decide on its fused path; so they say: not with this module.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = old.num_heads
        self.dropout = old.dropout
        self.batch_first = old.batch_first
        self.q_size = self.k_size = self.v_size = old.head_dim
        self.scale = old.head_dim**-0.5
        fused = old.in_proj_weight
        parts = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight) if fused is None else _thirds(fused)
        biases = (None, None, None) if old.in_proj_bias is None else _thirds(old.in_proj_bias)
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(parts, biases, strict=True))
        self.out = _linear(old.out_proj.weight, old.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise OptionError("is_causal is a hint about attn_mask and needs it, as in torch.nn.MultiheadAttention.")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q = self.q(query).unflatten(-1, (-1, self.q_size)).transpose(1, 2)
        k = self.k(key).unflatten(-1, (-1, self.k_size)).transpose(1, 2)
        v = self.v(value).unflatten(-1, (-1, self.v_size)).transpose(1, 2)
        bias = _mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.scale @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if bias is None else scores + bias, dim=-1), dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        output = self.out(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights


def _thirds(fused: Tensor) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter(part.clone(), fused.requires_grad) for part in fused.detach().chunk(3))


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """A linear layer of these very parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one additive bias that broadcasts over (batch, heads, queries, keys); True means: do not attend."""

    def additive(mask: Tensor) -> Tensor:
        return (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            if mask.dtype == torch.bool
            else mask.to(q.dtype)
        )

    bias = None
    if attn_mask is not None:
        bias = additive(attn_mask)
        bias = bias.reshape(-1, q.shape[1], *bias.shape[1:]) if bias.ndim == 3 else bias
    if padding is not None:
        row = additive(padding)[:, None, None, :]
        bias = row if bias is None else bias + row
    return bias


SWAPS: dict[str, tuple[type[nn.Module], Callable[..., nn.Module]]] = {
    "attention": (nn.MultiheadAttention, Attention),
    "self_attention": (nn.Module, read_self_attention),
    "skip": (nn.Module, skip),
    "skip_tuple": (nn.Module, skip_tuple),
}


def apply_swap(model: nn.Module, edit: Swap) -> None:
    """Puts the module named `edit.to`, made from the layer, in the layer's place."""
    if edit.to not in SWAPS:
        raise EditError(
            f"no module named {edit.to!r} to swap in; known: {', '.join(nearest(edit.to, SWAPS)) or ', '.join(SWAPS)}."
        )
    takes, make = SWAPS[edit.to]
    old = find_replaceable(model, edit.layer)
    if takes is not nn.Module and type(old) is not takes:
        raise EditError(f"{edit.layer} is a {type(old).__name__}; {edit.to!r} takes the place of {takes.__name__}.")
    _check_attention(model, old, edit.layer)
    try:
        new = make(old)
    except EditError as error:
        raise EditError(f"{edit.layer}: {error}") from error
    replace_module(model, old, new)


def _check_attention(model: nn.Module, old: nn.Module, name: str) -> None:
    if not isinstance(old, nn.MultiheadAttention):
        return
    if old.bias_k is not None or old.add_zero_attn:
        raise EditError(f"{name} has add_bias_kv or add_zero_attn, which have no plain form here; leave it as it is.")
    if "weight" not in old.out_proj._parameters:
        raise EditError(f"{name}.out_proj computes its weight (a parametrization, say); remove that first.")
    fused = [t for t in (old.in_proj_weight, old.in_proj_bias) if t is not None]
    for owner, module in model.named_modules():
        if module is not old and any(t is mine for t in module._parameters.values() for mine in fused):
            raise EditError(f"{name}: its fused projection is tied to one of {owner}, and would come untied.")
