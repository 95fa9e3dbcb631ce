# SPDX-License-Identifier: Apache-2.0
"""`swap`: one of our modules takes a layer's place and computes the same. Saves nothing by itself.

It makes a layer editable that is closed as it stands: torch's MultiheadAttention fuses its three projections and
asserts one width for all, so no head can be cut out of it; ours is four linear layers with explicit head sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits.find import find_module, replace_module
from featherweight.errors import EditError, nearest
from featherweight.plan import Swap

__all__ = ["SWAPS", "Attention", "apply_swap"]


class Attention(nn.Module):
    """torch's MultiheadAttention as four linear layers, called alike; head sizes are read from the weights.

    Takes (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal) and returns
    (output, weights or None), with axes as `batch_first` says.
    """

    # torch.nn.TransformerEncoderLayer looks these up to decide on its fused path; None says: not for this module.
    in_proj_bias = None
    in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        if old.bias_k is not None or old.add_zero_attn:
            raise EditError("attention with add_bias_kv or add_zero_attn has no plain form here; leave it as it is.")
        self.num_heads = old.num_heads
        self.dropout = old.dropout
        self.batch_first = old.batch_first
        width, where = old.embed_dim, {"device": old.out_proj.weight.device, "dtype": old.out_proj.weight.dtype}
        self.q = nn.Linear(width, width, bias=old.in_proj_bias is not None, **where)
        self.k = nn.Linear(old.kdim, width, bias=old.in_proj_bias is not None, **where)
        self.v = nn.Linear(old.vdim, width, bias=old.in_proj_bias is not None, **where)
        self.out = nn.Linear(width, width, bias=old.out_proj.bias is not None, **where)
        parts = (
            old.in_proj_weight.chunk(3)
            if old.in_proj_weight is not None
            else (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)
        )
        with torch.no_grad():
            for i, (linear, part) in enumerate(zip((self.q, self.k, self.v), parts, strict=True)):
                linear.weight.copy_(part)
                if old.in_proj_bias is not None:
                    linear.bias.copy_(old.in_proj_bias.chunk(3)[i])
            self.out.weight.copy_(old.out_proj.weight)
            if old.out_proj.bias is not None:
                self.out.bias.copy_(old.out_proj.bias)

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
        batched = query.ndim == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(linear(t)) for linear, t in ((self.q, query), (self.k, key), (self.v, value)))
        bias = _mask(attn_mask, key_padding_mask, self.num_heads, q)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs attn_mask, as in torch.nn.MultiheadAttention")
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        output = self.out(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:-1], self.num_heads, -1).transpose(1, 2)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, heads: int, q: Tensor) -> Tensor | None:
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
        bias = bias.reshape(-1, heads, *bias.shape[1:]) if bias.ndim == 3 else bias
    if padding is not None:
        row = additive(padding)[:, None, None, :]
        bias = row if bias is None else bias + row
    return bias


SWAPS: dict[str, tuple[type[nn.Module], Callable[..., nn.Module]]] = {"attention": (nn.MultiheadAttention, Attention)}


def apply_swap(model: nn.Module, edit: Swap) -> None:
    if edit.to not in SWAPS:
        raise EditError(
            f"no module named {edit.to!r} to swap in; known: {', '.join(nearest(edit.to, SWAPS)) or ', '.join(SWAPS)}."
        )
    takes, make = SWAPS[edit.to]
    old = find_module(model, edit.layer)
    if type(old) is not takes:
        raise EditError(f"{edit.layer} is a {type(old).__name__}; {edit.to!r} takes the place of {takes.__name__}.")
    replace_module(model, old, make(old))
