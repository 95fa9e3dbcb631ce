# SPDX-License-Identifier: Apache-2.0
"""The networks that are timed: published shapes, random weights; what a weight is matters to no runtime, only whether it is 0.

Zeros are the smallest weights of each layer, the same share everywhere but in the first convolution (depthwise ones and
embeddings stay whole as well), so that no runtime is helped by where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from benchmarks.reconstruct.subjects.cost import resnet50_network
from benchmarks.reconstruct.subjects.crepe import Crepe


@dataclass(frozen=True)
class Network:
    """A module with the inputs of one call at a batch size, and the shares of zeros at which it is timed."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    sparsities: tuple[float, ...]


class InvertedResidual(nn.Module):
    """A thin layer widened, filtered channel by channel, and made thin again (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        width = inputs * factor
        widen = [] if factor == 1 else [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        self.layers = nn.Sequential(
            *widen,
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0 for 224 x 224 images, 3.5 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    inputs = 32
    for factor, outputs, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for i in range(repeats):
            layers.append(InvertedResidual(inputs, outputs, stride if i == 0 else 1, factor))
            inputs = outputs
    layers += [nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1280, 1000))


class Encoder(nn.Module):
    """A BERT-like encoder over embedded tokens: attention and a GELU network, each with LayerNorm behind (Devlin et al. 2019)."""

    def __init__(self, layers: int, width: int, heads: int, length: int = 128, words: int = 30_522) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.ModuleDict(
                {name: nn.Linear(width, width) for name in ("query", "key", "value", "out")}
                | {"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
                | {name: nn.LayerNorm(width) for name in ("norm1", "norm2")}
            )
            self.blocks.append(block)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.places)
        for block in self.blocks:
            query, key, value = (
                block[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
            )
            attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = block["norm1"](x + block["out"](attended))
            x = block["norm2"](x + block["down"](nn.functional.gelu(block["up"](x))))
        return x


class Unit(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
        )


class CrossStage(nn.Module):
    """YOLOv5's C3: residual bottlenecks on one half of the channels."""

    def __init__(self, inputs: int, outputs: int, repeats: int, residual: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.left, self.right, self.out = Unit(inputs, half), Unit(inputs, half), Unit(2 * half, outputs)
        self.blocks = nn.ModuleList(nn.Sequential(Unit(half, half), Unit(half, half, 3)) for _ in range(repeats))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        for block in self.blocks:
            left = left + block(left) if self.residual else block(left)
        return self.out(torch.cat((left, self.right(x)), 1))


class Pyramid(nn.Module):
    """YOLOv5's SPPF: one pooling three times, all of it joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out = Unit(width, width // 2), Unit(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.inner(x)]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        return self.out(torch.cat(pooled, 1))


class Yolo(nn.Module):
    """A detector shaped as YOLOv5s: backbone, pyramid down and up, three heads of 85 numbers for 3 anchors; 7.2 million."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Unit(3, 32, 6, 2), Unit(32, 64, 3, 2), CrossStage(64, 64, 1))
        self.stem[0][0].padding = (2, 2)
        self.eighth = nn.Sequential(Unit(64, 128, 3, 2), CrossStage(128, 128, 2))
        self.sixteenth = nn.Sequential(Unit(128, 256, 3, 2), CrossStage(256, 256, 3))
        self.last = nn.Sequential(Unit(256, 512, 3, 2), CrossStage(512, 512, 1), Pyramid(512))
        self.in5, self.up4 = Unit(512, 256), CrossStage(512, 256, 1, False)
        self.in4, self.up3 = Unit(256, 128), CrossStage(256, 128, 1, False)
        self.down4, self.out4 = Unit(128, 128, 3, 2), CrossStage(256, 256, 1, False)
        self.down5, self.out5 = Unit(256, 256, 3, 2), CrossStage(512, 512, 1, False)
        self.heads = nn.ModuleList(nn.Conv2d(width, 255, 1) for width in (128, 256, 512))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        third = self.eighth(self.stem(x))
        fourth = self.sixteenth(third)
        inner5 = self.in5(self.last(fourth))
        inner4 = self.in4(self.up4(torch.cat((interpolate(inner5, scale_factor=2.0), fourth), 1)))
        out3 = self.up3(torch.cat((interpolate(inner4, scale_factor=2.0), third), 1))
        out4 = self.out4(torch.cat((self.down4(out3), inner4), 1))
        out5 = self.out5(torch.cat((self.down5(out4), inner5), 1))
        return tuple(head(x) for head, x in zip(self.heads, (out3, out4, out5), strict=True))


def _images(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def _tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 30_522, (batch, 128), generator=torch.Generator().manual_seed(1)),)


def _frames(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 1024, generator=torch.Generator().manual_seed(1)),)


NETWORKS = {
    "resnet50": Network(resnet50_network, _images(224), (0.8, 0.9, 0.95)),
    "mobilenet_v2": Network(mobilenet_v2, _images(224), (0.85,)),
    "bert_6x384": Network(lambda: Encoder(6, 384, 12), _tokens, (0.9,)),
    "bert_12x768": Network(lambda: Encoder(12, 768, 12), _tokens, (0.9,)),
    "yolo": Network(Yolo, _images(640), (0.85,)),
    "crepe_full": Network(lambda: Crepe(32), _frames, (0.9,)),
}


def pruned(name: str, sparsity: float) -> nn.Module:
    """The network in eval mode, seeded, its BatchNorms as if trained, with this share of zeros in every layer but the first."""
    torch.manual_seed(0)
    model = NETWORKS[name].make().eval()
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(1 + 0.2 * torch.rand(module.num_features, generator=generator))
    layers = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    for i, layer in enumerate(layers):
        if (i == 0 and isinstance(layer, nn.Conv2d)) or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            continue
        with torch.no_grad():
            flat = layer.weight.view(-1)
            flat[flat.abs().argsort()[: round(sparsity * flat.numel())]] = 0
    return model
