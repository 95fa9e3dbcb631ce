# SPDX-License-Identifier: Apache-2.0
"""A detector in the manner of YOLOv8: C2f blocks, fast pyramid pooling, two heads a scale; and with attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class _Bottleneck(nn.Module):
    def __init__(self, width: int, add: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = _Conv(width, width, 3), _Conv(width, width, 3), add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class _C2f(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int = 1, add: bool = False) -> None:
        super().__init__()
        self.width = outputs // 2
        self.cv1, self.cv2 = _Conv(inputs, 2 * self.width), _Conv((2 + depth) * self.width, outputs)
        self.m = nn.ModuleList(_Bottleneck(self.width, add) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class _SPPF(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = _Conv(inputs, inputs // 2), _Conv(inputs // 2 * 4, outputs)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y = self.m(x)
        z = self.m(y)
        return self.cv2(torch.cat((x, y, z, self.m(z)), 1))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.key_dim = heads, width // heads, width // heads // 2
        self.scale = self.key_dim**-0.5
        self.qkv = nn.Conv2d(width, width + 2 * heads * self.key_dim, 1)
        self.proj, self.pe = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(x).view(batch, self.heads, self.key_dim * 2 + self.head_dim, height * width)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.head_dim], dim=2)
        attention = (q.transpose(-2, -1) @ k * self.scale).softmax(dim=-1)
        mixed = (v @ attention.transpose(-2, -1)).view(batch, channels, height, width)
        return self.proj(mixed + self.pe(v.reshape(batch, channels, height, width)))


class _PSA(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.half = width // 2
        self.cv1, self.cv2 = _Conv(width, width), _Conv(width, width)
        self.attn = _Attention(self.half, 2)
        self.ffn = nn.Sequential(_Conv(self.half, self.half * 2), nn.Conv2d(self.half * 2, self.half, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.half, self.half), dim=1)
        b = b + self.attn(b)
        b = b + self.ffn(b)
        return self.cv2(torch.cat((a, b), 1))


class _Detect(nn.Module):
    """Boxes as distributions over distances, and classes, of each scale; anchors are constants of the strides."""

    def __init__(self, widths: tuple[int, ...], classes: int = 7, bins: int = 8) -> None:
        super().__init__()
        self.classes, self.bins, self.strides = classes, bins, (8, 16, 32)[: len(widths)]
        self.boxes = nn.ModuleList(
            nn.Sequential(_Conv(w, 16, 3), _Conv(16, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for w in widths
        )
        self.names = nn.ModuleList(
            nn.Sequential(_Conv(w, 12, 3), _Conv(12, 12, 3), nn.Conv2d(12, classes, 1)) for w in widths
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        batch = maps[0].shape[0]
        rows = [torch.cat((box(x), name(x)), 1) for box, name, x in zip(self.boxes, self.names, maps, strict=True)]
        flat = torch.cat([row.view(batch, 4 * self.bins + self.classes, -1) for row in rows], 2)
        box, names = flat.split((4 * self.bins, self.classes), 1)
        distances = box.view(batch, 4, self.bins, -1).transpose(2, 1).softmax(1)
        expected = (distances * torch.arange(self.bins, dtype=box.dtype, device=box.device).view(1, -1, 1, 1)).sum(1)
        centers, scale = self._anchors(maps)
        low, high = expected.chunk(2, 1)
        corners = torch.cat((centers - low, centers + high), 1) * scale
        return torch.cat((corners, names.sigmoid()), 1)

    def _anchors(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, scales = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            height, width = x.shape[2:]
            rows = torch.arange(height, dtype=x.dtype, device=x.device) + 0.5
            columns = torch.arange(width, dtype=x.dtype, device=x.device) + 0.5
            y, x_ = torch.meshgrid(rows, columns, indexing="ij")
            points.append(torch.stack((x_, y)).view(2, -1))
            scales.append(torch.full((1, height * width), float(stride), dtype=x.dtype, device=x.device))
        return torch.cat(points, 1)[None], torch.cat(scales, 1)[None]


class Yolo(nn.Module):
    """Backbone, path aggregation and decoupled heads, down to boxes; from YOLOv10 on the backbone ends in attention."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Conv(3, 8, 3, 2), _Conv(8, 16, 3, 2), _C2f(16, 16, 1, add=True), _Conv(16, 24, 3, 2))
        self.p3 = _C2f(24, 24, 2, add=True)
        self.p4 = nn.Sequential(_Conv(24, 32, 3, 2), _C2f(32, 32, 1, add=True))
        self.p5 = nn.Sequential(_Conv(32, 48, 3, 2), _C2f(48, 48, 1, add=True), _SPPF(48, 48))
        self.p5.extend([_PSA(48)] if attention else [])
        self.up4, self.up3 = _C2f(80, 32), _C2f(56, 24)
        self.down4, self.out4 = _Conv(24, 24, 3, 2), _C2f(56, 32)
        self.down5, self.out5 = _Conv(32, 32, 3, 2), _C2f(80, 48)
        self.detect = _Detect((24, 32, 48))

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat((F.interpolate(p5, scale_factor=2.0), p4), 1))
        n3 = self.up3(torch.cat((F.interpolate(n4, scale_factor=2.0), p3), 1))
        n4 = self.out4(torch.cat((self.down4(n3), n4), 1))
        return self.detect([n3, n4, self.out5(torch.cat((self.down5(n4), p5), 1))])


class YoloAttention(Yolo):
    def __init__(self) -> None:
        super().__init__(attention=True)
