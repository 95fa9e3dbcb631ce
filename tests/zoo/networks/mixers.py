# SPDX-License-Identifier: Apache-2.0
"""Networks of tokens: mixers without attention, attention over channels, fused projections, torch's own transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.networks.classic import CLASSES


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int = 8) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class _Mixer(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(width), _mlp(tokens, 20)
        self.norm2, self.channels = nn.LayerNorm(width), _mlp(width, 72)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MlpMixer(nn.Module):
    """Linear layers over tokens and over channels in turn (Tolstikhin et al., 2021)."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.patches = _Patches(width)
        self.blocks = nn.Sequential(_Mixer(16, width), _Mixer(16, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x))).mean(1))


class _SpatialGate(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(width), nn.Linear(tokens, tokens), width

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return u * self.mix(self.norm(v).transpose(-1, -2)).transpose(-1, -2)


class GatedMlp(nn.Module):
    """Half of the channels, mixed over tokens, gate the other half (Liu et al., 2021)."""

    def __init__(self, width: int = 40, hidden: int = 56) -> None:
        super().__init__()
        self.patches = _Patches(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.into = nn.ModuleList(nn.Linear(width, 2 * hidden) for _ in range(2))
        self.gates = nn.ModuleList(_SpatialGate(hidden, 16) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for norm, into, gate, out in zip(self.norms, self.into, self.gates, self.out, strict=True):
            x = x + out(gate(F.gelu(into(norm(x)))))
        return self.head(self.norm(x).mean(1))


class _CrossCovariance(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        mixed = weights.softmax(-1) @ v
        return self.proj(mixed.permute(0, 3, 1, 2).reshape(batch, length, width))


class XCiT(nn.Module):
    """Attention between channels; patches talk through depthwise convs (El-Nouby et al., 2021)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = _Patches(width)
        self.norm1, self.attention = nn.LayerNorm(width), _CrossCovariance(width)
        self.norm2 = nn.LayerNorm(width)
        self.local = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.GELU(),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
        )
        self.norm3, self.mlp = nn.LayerNorm(width), _mlp(width, 80)
        self.gammas = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        batch, length, width = x.shape
        side = int(length**0.5)
        x = x + self.gammas[0] * self.attention(self.norm1(x))
        maps = self.norm2(x).permute(0, 2, 1).reshape(batch, width, side, side)
        x = x + self.gammas[1] * self.local(maps).reshape(batch, width, length).permute(0, 2, 1)
        x = x + self.gammas[2] * self.mlp(self.norm3(x))
        return self.head(self.norm(x).mean(1))


class _FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int, talking: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.before = nn.Linear(heads, heads) if talking else None
        self.after = nn.Linear(heads, heads) if talking else None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.before is None or self.after is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
            mixed = self.after(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class FusedViT(nn.Module):
    """One projection makes queries, keys and values; a class token and positions are parameters (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int = 48, heads: int = 4, talking: bool = False) -> None:
        super().__init__()
        self.patches = _Patches(width)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.ModuleList(_FusedAttention(width, heads, talking) for _ in range(2))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.ModuleList(_mlp(width, 80) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for norm1, attention, norm2, mlp in zip(self.norm1, self.attention, self.norm2, self.mlp, strict=True):
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x)[:, 0])


class TalkingHeads(FusedViT):
    """Heads mixed before and after the softmax (Shazeer et al., 2020; CaiT)."""

    def __init__(self) -> None:
        super().__init__(talking=True)


class TorchTransformer(nn.Module):
    """torch's own encoder and decoder layers around nn.MultiheadAttention."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(11, width), nn.Linear(11, width)
        self.encoder = nn.TransformerEncoderLayer(width, 4, 80, batch_first=True, norm_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoderLayer(width, 4, 72, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.decoder(self.target(target), self.encoder(self.source(source))))
