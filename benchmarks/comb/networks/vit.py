# SPDX-License-Identifier: Apache-2.0
"""A vision transformer (Dosovitskiy et al. 2021; DeiT's size and recipe, Touvron et al. 2021, made small), in plain PyTorch.

Attention is written as most projects write it: one linear layer for queries, keys and values, a reshape by the number
of heads, scaled_dot_product_attention. That reshape carries sizes that a cut must follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention

from benchmarks.comb.networks.convolutions import normed


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        heard = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, -1)
        result: Tensor = self.proj(heard)
        return result


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = (
            nn.LayerNorm(width),
            nn.Linear(width, ratio * width),
            nn.Linear(ratio * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        return result


class ViT(nn.Module):
    """Images [n, 1, 28, 28] as 7 x 7 tokens; scores of 10 classes out, from the tokens' mean.

    Three convolutions make the tokens (Xiao et al. 2021): with patches of 4 x 4 pixels, 3000 steps came to 80 % only.
    """

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem1, self.stem1_bn = normed(1, width // 2, 3, 2)
        self.stem2, self.stem2_bn = normed(width // 2, width // 2, 3)
        self.patches = nn.Conv2d(width // 2, width, 3, 2, 1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem1_bn(self.stem1(x)))
        x = self.patches(relu(self.stem2_bn(self.stem2(x))))
        x = x.flatten(2).transpose(1, 2) + self.positions
        result: Tensor = self.linear(self.norm(self.blocks(x)).mean(1))
        return result
