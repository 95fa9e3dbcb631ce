# SPDX-License-Identifier: Apache-2.0
"""A light segmentation transformer in the manner of SeaFormer (Wan et al. 2023): mobile attention beside convolution.

Inverted residuals bring the picture to an eighth, where the spatial branch stays; the context branch goes on to a
sixteenth with squeeze-enhanced axial attention. Queries, keys and values are averaged over the columns and attended
along the rows, and the other way round, so that attention costs H^2 + W^2 rather than (HW)^2; what averaging loses, a
depthwise convolution of the three brings back. The context then gates the spatial branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid, interpolate, relu6

from benchmarks.comb.networks.convolutions import Inverted, normed


class Axial(nn.Module):
    """Squeeze-enhanced axial attention on [n, width, side, side]: `heads` heads with keys of `key` channels."""

    def __init__(self, width: int, side: int, heads: int = 4, key: int = 8) -> None:
        super().__init__()
        self.heads, self.key = heads, key
        self.q, self.q_bn = normed(width, heads * key, 1)
        self.k, self.k_bn = normed(width, heads * key, 1)
        self.v, self.v_bn = normed(width, 2 * heads * key, 1)
        self.rows_q, self.rows_k, self.columns_q, self.columns_k = (
            nn.Parameter(0.02 * torch.randn(1, heads * key, side)) for _ in range(4)
        )
        self.rows, self.rows_bn = normed(2 * heads * key, 2 * heads * key, 1)
        self.columns, self.columns_bn = normed(2 * heads * key, 2 * heads * key, 1)
        self.detail, self.detail_bn = normed(4 * heads * key, 4 * heads * key, 3, groups=4 * heads * key)
        self.mix, self.mix_bn = normed(4 * heads * key, width, 1)
        self.proj, self.proj_bn = normed(2 * heads * key, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_bn(self.q(x)), self.k_bn(self.k(x)), self.v_bn(self.v(x))
        detail = relu6(self.detail_bn(self.detail(torch.cat((q, k, v), 1))))
        along = self._attend(q.mean(3) + self.rows_q, k.mean(3) + self.rows_k, v.mean(3))
        across = self._attend(q.mean(2) + self.columns_q, k.mean(2) + self.columns_k, v.mean(2))
        heard = (
            v
            + self.rows_bn(self.rows(relu6(along)[..., None]))
            + self.columns_bn(self.columns(relu6(across)[:, :, None]))
        )
        result: Tensor = hardsigmoid(self.proj_bn(self.proj(relu6(heard)))) * self.mix_bn(self.mix(detail))
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[n, heads * channels, length] each."""
        n, _, length = q.shape
        q, k, v = (t.reshape(n, self.heads, -1, length) for t in (q, k, v))
        weights = (q.transpose(2, 3) @ k * self.key**-0.5).softmax(3)
        return (v @ weights.transpose(2, 3)).reshape(n, -1, length)


class Block(nn.Module):
    """Attention, then an inverted bottleneck with a depthwise convolution inside, each with a way around."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.attn, self.mlp = Axial(width, side), Inverted(width, width, expand=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x + self.attn(x))
        return result


class SeaFormer(nn.Module):
    """Pictures [n, 3, 96, 96] in, scores [n, classes, 96, 96] out."""

    def __init__(self, classes: int = 5, width: int = 16, depth: int = 2, side: int = 96) -> None:
        super().__init__()
        self.stem, self.stem_bn = normed(3, width, 3, 2)
        self.shallow = nn.Sequential(
            Inverted(width, width, expand=1), Inverted(width, 2 * width, 2, kernel=5), Inverted(2 * width, 2 * width)
        )
        self.spatial = nn.Sequential(Inverted(2 * width, 4 * width, 2), Inverted(4 * width, 4 * width))
        self.down = Inverted(4 * width, 6 * width, 2)
        self.context = nn.Sequential(*(Block(6 * width, side // 16) for _ in range(depth)))
        self.fine, self.fine_bn = normed(4 * width, 6 * width, 1)
        self.gate, self.gate_bn = normed(6 * width, 6 * width, 1)
        self.early, self.early_bn = normed(2 * width, 6 * width, 1)
        self.fuse, self.fuse_bn = normed(6 * width, 4 * width, 3)
        self.head = nn.Conv2d(4 * width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        quarter = self.shallow(relu6(self.stem_bn(self.stem(x))))
        eighth = self.spatial(quarter)
        context = self.context(self.down(eighth))
        gate = interpolate(hardsigmoid(self.gate_bn(self.gate(context))), scale_factor=2.0, mode="bilinear")
        eighth = self.fine_bn(self.fine(eighth)) * gate
        both = interpolate(eighth, scale_factor=2.0, mode="bilinear") + self.early_bn(self.early(quarter))
        scores = self.head(relu6(self.fuse_bn(self.fuse(both))))
        return interpolate(scores, scale_factor=4.0, mode="bilinear", align_corners=False)
