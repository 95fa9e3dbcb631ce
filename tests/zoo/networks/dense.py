# SPDX-License-Identifier: Apache-2.0
"""Networks that answer for every pixel: a U, parallel resolutions, a pyramid, mobile attention, sub-pixel upscaling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.networks.classic import CLASSES, conv


class UNet(nn.Module):
    """Down, up by transposed convs, and joins across (Ronneberger et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._pair(3, 12), self._pair(12, 20)
        self.bottom = self._pair(20, 32)
        self.rise2, self.up2 = nn.ConvTranspose2d(32, 20, 2, stride=2), self._pair(40, 20)
        self.rise1, self.up1 = nn.ConvTranspose2d(20, 12, 2, stride=2), self._pair(24, 12)
        self.head = nn.Conv2d(12, CLASSES, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, outputs), conv(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.up2(torch.cat([two, self.rise2(x)], 1))
        return self.head(self.up1(torch.cat([one, self.rise1(x)], 1)))


class _Exchange(nn.Module):
    """Every resolution gets the sum of all, brought to its size and width."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Sequential(conv(w, w), conv(w, w)[:2]) for w in widths)
        self.across = nn.ModuleList(
            nn.ModuleList(self._path(j, i, widths) for j in range(len(widths))) for i in range(len(widths))
        )

    @staticmethod
    def _path(source: int, target: int, widths: tuple[int, ...]) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:
            up = nn.Upsample(scale_factor=2 ** (source - target), mode="bilinear", align_corners=False)
            return nn.Sequential(*conv(widths[source], widths[target], 1)[:2], up)
        steps = [conv(widths[source], widths[source], 3, 2) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, conv(widths[source], widths[target], 3, 2)[:2])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [F.relu(x + own(x)) for x, own in zip(maps, self.own, strict=True)]
        return [
            F.relu(sum((path(x) for path, x in zip(paths, maps, strict=True)), torch.zeros(())))
            for paths in self.across
        ]


class HRNet(nn.Module):
    """Resolutions side by side that exchange what they see (Wang et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (12, 20, 28)
        self.stem = conv(3, 16, 3, 2)
        self.starts = nn.ModuleList(
            [conv(16, 12), conv(16, 20, 3, 2), nn.Sequential(conv(16, 16, 3, 2), conv(16, 28, 3, 2))]
        )
        self.exchange1, self.exchange2 = _Exchange(widths), _Exchange(widths)
        self.mix = conv(sum(widths), 32, 1)
        self.head = nn.Conv2d(32, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = self.exchange2(self.exchange1([start(x) for start in self.starts]))
        size = maps[0].shape[2:]
        raised = [maps[0], *(F.interpolate(x, size=size, mode="bilinear", align_corners=True) for x in maps[1:])]
        return self.head(self.mix(torch.cat(raised, 1)))


class PyramidSegmenter(nn.Module):
    """A pyramid whose levels share one head, with group norms (Kirillov et al., 2019)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 12, 3, 2), conv(12, 20, 3, 2), conv(20, 32, 3, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in (12, 20, 32))
        self.shared = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU())
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        tops = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in (1, 0):
            tops[i] = tops[i] + F.interpolate(tops[i + 1], scale_factor=2, mode="nearest")
        size = tops[0].shape[2:]
        raised = [F.interpolate(self.shared(top), size=size, mode="bilinear", align_corners=False) for top in tops]
        return F.interpolate(self.head(torch.stack(raised).sum(0)), scale_factor=2)


class _AxialAttention(nn.Module):
    """Attention over rows and over columns, of queries averaged along the other, with a convolution beside it."""

    def __init__(self, width: int, heads: int, key_dim: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, key_dim**-0.5
        keys, values = heads * key_dim, 2 * heads * key_dim
        self.keys, self.values = keys, values
        self.to_q, self.to_k, self.to_v = conv(width, keys, 1)[:2], conv(width, keys, 1)[:2], conv(width, values, 1)[:2]
        self.rows, self.columns = nn.Parameter(torch.randn(1, keys, 4)), nn.Parameter(torch.randn(1, keys, 4))
        self.project_row, self.project_column = conv(values, values, 1)[:2], conv(values, values, 1)[:2]
        self.detail, self.detail_out = (
            conv(2 * keys + values, 2 * keys + values, 3, groups=2 * keys + values),
            conv(2 * keys + values, width, 1)[:2],
        )
        self.project = nn.Sequential(nn.ReLU(), *conv(values, width, 1)[:2])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        batch, _, length = q.shape
        place = F.interpolate(position, size=length, mode="linear", align_corners=False)
        q = (q + place).reshape(batch, self.heads, -1, length).permute(0, 1, 3, 2)
        k = (k + place).reshape(batch, self.heads, -1, length)
        v = v.reshape(batch, self.heads, -1, length).permute(0, 1, 3, 2)
        mixed = (q @ k * self.scale).softmax(-1) @ v
        return mixed.permute(0, 1, 3, 2).reshape(batch, self.values, length)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        detail = self.detail_out(self.detail(torch.cat([q, k, v], 1)))
        row = self.project_row(self._attend(q.mean(-1), k.mean(-1), v.mean(-1), self.rows).unsqueeze(-1))
        column = self.project_column(self._attend(q.mean(-2), k.mean(-2), v.mean(-2), self.columns).unsqueeze(-2))
        return self.project(v + row + column).sigmoid() * detail


class SeaFormer(nn.Module):
    """A mobile convolutional path, attention squeezed along axes, and a gate that joins both (Wan et al., 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 12, 3, 2), conv(12, 16, 3, 2))
        self.deep = nn.Sequential(conv(16, 24, 3, 2), conv(24, 24, 3, groups=24), conv(24, 32, 1))
        self.attention = _AxialAttention(32, 4, 8)
        self.ffn = nn.Sequential(
            conv(32, 64, 1)[:2], nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU(), conv(64, 32, 1)[:2]
        )
        self.local, self.gate = conv(16, 20, 1)[:2], conv(32, 20, 1)[:2]
        self.head = nn.Sequential(conv(20, 24, 1), nn.Conv2d(24, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        deep = self.deep(fine)
        deep = deep + self.attention(deep)
        deep = deep + self.ffn(deep)
        gate = F.interpolate(F.hardsigmoid(self.gate(deep)), size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.head(self.local(fine) * gate)


class SuperResolution(nn.Module):
    """Residual blocks without norms, then channels become pixels (Lim et al., 2017)."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 28, 3, padding=1), nn.PReLU(28), nn.Conv2d(28, width, 3, padding=1))
            for _ in range(2)
        )
        self.rise = nn.Sequential(nn.Conv2d(width, 4 * 12, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.first(x)
        for block in self.blocks:
            y = y + 0.1 * block(y)
        return self.last(self.rise(first + y)) + F.interpolate(x, scale_factor=2, mode="bicubic")
