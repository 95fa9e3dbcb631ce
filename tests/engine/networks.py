# SPDX-License-Identifier: Apache-2.0
"""Networks as people write them, any width: small for tests, real sizes for benchmarks. Each gives a module and its inputs."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

Network = tuple[nn.Module, tuple[Tensor, ...]]


def exported(module: nn.Module, inputs: tuple[Tensor, ...], *, opset: int = 18, dynamo: bool = True) -> onnx.ModelProto:
    """As torch.onnx writes it, by its exporter of today or by the tracing one."""
    with torch.no_grad():
        if dynamo:
            program = torch.onnx.export(module, inputs, dynamo=True, opset_version=opset, verbose=False)
            assert program is not None
            return program.model_proto
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            torch.onnx.export(module, inputs, path, dynamo=False, opset_version=opset)
            return onnx.load(path)


def settled(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with weights from the seed and statistics of BatchNorms that are not those of a new one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)

    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 16
            normal(parameter, math.sqrt(1 / fan))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                normal(layer.running_mean, 0.3)
                layer.running_var.uniform_(0.5, 2.0, generator=generator)
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                layer.weight.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def image(batch: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---- ResNet


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return torch.relu(self.bn3(self.conv3(x)) + kept)


def resnet(
    width: int = 8, depths: tuple[int, ...] = (2, 1), size: int = 32, classes: int = 10, batch: int = 1
) -> Network:
    """`width=64, depths=(3, 4, 6, 3), size=224, classes=1000` is ResNet-50."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(channels, width << stage, 2 if stage > 0 and block == 0 else 1))
            channels = 4 * (width << stage)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return settled(nn.Sequential(*layers)), (image(batch, size),)


# ---- MobileNetV2


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, activation: type[nn.Module]) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), activation()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            activation(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return x + made if self.adds else made


def mobilenet(
    width: float = 0.25,
    stages: tuple[tuple[int, int, int, int], ...] = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)),
    size: int = 32,
    classes: int = 10,
    batch: int = 1,
    activation: type[nn.Module] = nn.ReLU6,
) -> Network:
    """MobileNetV2: stages of (expansion, channels, blocks, stride). `MOBILENET_V2` and width 1, size 224 are the paper's."""

    def channels(wanted: float) -> int:
        return max(8, int(wanted * width + 4) // 8 * 8)

    now = channels(32)
    layers: list[nn.Module] = [nn.Conv2d(3, now, 3, 2, 1, bias=False), nn.BatchNorm2d(now), activation()]
    for expand, wanted, blocks, stride in stages:
        for block in range(blocks):
            layers.append(InvertedResidual(now, channels(wanted), stride if block == 0 else 1, expand, activation))
            now = channels(wanted)
    last = max(1280, int(1280 * width)) if width >= 1 else 64
    layers += [nn.Conv2d(now, last, 1, bias=False), nn.BatchNorm2d(last), activation()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)]
    return settled(nn.Sequential(*layers)), (image(batch, size),)


MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


# ---- EfficientNet, MobileNetV3


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, max(4, channels // 4), 1),
            activation(),
            nn.Conv2d(max(4, channels // 4), channels, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x * self.layers(x)
        return made


class Widened(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        taps: int,
        stride: int,
        activation: type[nn.Module],
        gate: type[nn.Module] | None,
    ) -> None:
        super().__init__()
        hidden = 6 * inputs
        layers: list[nn.Module] = [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), activation()]
        layers += [nn.Conv2d(hidden, hidden, taps, stride, taps // 2, groups=hidden, bias=False)]
        layers += [nn.BatchNorm2d(hidden), activation()]
        if gate is not None:
            layers.append(Gate(hidden, activation, gate))
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return made + x if self.adds else made


def efficientnet(
    activation: type[nn.Module] = nn.SiLU, gate: type[nn.Module] | None = nn.Sigmoid, size: int = 32, batch: int = 1
) -> Network:
    """EfficientNet's blocks; Lite's with `activation=nn.ReLU6, gate=None`, MobileNetV3's with Hardswish and Hardsigmoid."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), activation()]
    layers += [
        Widened(inputs, outputs, taps, stride, activation, gate)
        for inputs, outputs, taps, stride in ((8, 8, 3, 1), (8, 16, 5, 2), (16, 16, 5, 1), (16, 24, 3, 2))
    ]
    layers += [nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), activation()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10)]
    return settled(nn.Sequential(*layers)), (image(batch, size),)


# ---- YOLO (v5's blocks)


class ConvSiLU(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, taps: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, taps, stride, (taps - 1) // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(inplace=True),
        )


class Residual(nn.Module):
    def __init__(self, channels: int, adds: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.adds = ConvSiLU(channels, channels), ConvSiLU(channels, channels, 3), adds

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv2(self.conv1(x))
        return x + made if self.adds else made


class C3(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int = 1, adds: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.conv2, self.conv3 = ConvSiLU(inputs, half), ConvSiLU(inputs, half), ConvSiLU(2 * half, outputs)
        self.blocks = nn.Sequential(*(Residual(half, adds) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv3(torch.cat((self.blocks(self.conv1(x)), self.conv2(x)), 1))
        return made


class SPPF(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvSiLU(channels, channels // 2), ConvSiLU(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        one = self.pool(x)
        two = self.pool(one)
        made: Tensor = self.conv2(torch.cat((x, one, two, self.pool(two)), 1))
        return made


class Yolo(nn.Module):
    def __init__(self, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(ConvSiLU(3, w, 6, 2), ConvSiLU(w, 2 * w, 3, 2), C3(2 * w, 2 * w, depth))
        self.stage3 = nn.Sequential(ConvSiLU(2 * w, 4 * w, 3, 2), C3(4 * w, 4 * w, 2 * depth))
        self.stage4 = nn.Sequential(ConvSiLU(4 * w, 8 * w, 3, 2), C3(8 * w, 8 * w, 3 * depth))
        self.stage5 = nn.Sequential(ConvSiLU(8 * w, 16 * w, 3, 2), C3(16 * w, 16 * w, depth), SPPF(16 * w))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.lead5, self.lead4 = ConvSiLU(16 * w, 8 * w), ConvSiLU(8 * w, 4 * w)
        self.join4, self.join3 = C3(16 * w, 8 * w, depth, False), C3(8 * w, 4 * w, depth, False)
        self.down3, self.down4 = ConvSiLU(4 * w, 4 * w, 3, 2), ConvSiLU(8 * w, 8 * w, 3, 2)
        self.out4, self.out5 = C3(8 * w, 8 * w, depth, False), C3(16 * w, 16 * w, depth, False)
        self.heads = nn.ModuleList(nn.Conv2d(c * w, outputs, 1) for c in (4, 8, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        three = self.stage3(self.stem(x))
        four = self.stage4(three)
        five = self.lead5(self.stage5(four))
        middle = self.lead4(self.join4(torch.cat((self.up(five), four), 1)))
        p3 = self.join3(torch.cat((self.up(middle), three), 1))
        p4 = self.out4(torch.cat((self.down3(p3), middle), 1))
        p5 = self.out5(torch.cat((self.down4(p4), five), 1))
        return tuple(head(p) for head, p in zip(self.heads, (p3, p4, p5), strict=True))


def yolo(width: int = 4, depth: int = 1, size: int = 64, outputs: int = 21, batch: int = 1) -> Network:
    """`width=32, size=640, outputs=255` is YOLOv5s up to its heads."""
    return settled(Yolo(width, depth, outputs)), (image(batch, size),)


class Detector(nn.Module):
    """What stands behind the heads: v5's boxes from a grid, or v8's from distributions over distances."""

    def __init__(self, width: int, distances: bool, classes: int = 2) -> None:
        super().__init__()
        self.distances, self.classes = distances, classes
        self.network = Yolo(width, 1, 64 + classes if distances else 3 * (5 + classes))
        self.expected = nn.Conv2d(16, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.network(x)
        if self.distances:
            box, scores = torch.cat([head.flatten(2) for head in heads], 2).split((64, self.classes), 1)
            parts = box.unflatten(1, (4, 16)).transpose(2, 1).softmax(1)
            first, last = self.expected(parts).flatten(1, 2).chunk(2, 1)
            return torch.cat(((last - first) / 2, (first + last) / 2, scores.sigmoid()), 1)
        found = []
        for head, stride in zip(heads, (8, 16, 32), strict=True):
            batch, _, height, width = head.shape
            y = head.view(batch, 3, 5 + self.classes, height, width).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid = torch.stack((columns, rows), 2).view(1, 1, height, width, 2).float()
            boxes = torch.cat(((y[..., :2] * 2 - 0.5 + grid) * stride, (y[..., 2:4] * 2) ** 2 * stride, y[..., 4:]), -1)
            found.append(boxes.view(batch, -1, 5 + self.classes))
        return torch.cat(found, 1)


def detector(width: int = 4, distances: bool = False, size: int = 64, batch: int = 1) -> Network:
    return settled(Detector(width, distances)), (image(batch, size),)


# ---- transformers


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, joint: bool) -> None:
        super().__init__()
        self.heads, self.joint = heads, joint
        if joint:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        if self.joint:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        q, k, v = (each.reshape(shape).transpose(1, 2) for each in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.heads)
        if mask is not None:
            scores = scores + mask
        mixed = torch.softmax(scores, -1) @ v
        made: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return made


class Block(nn.Module):
    """`first`: norms lie before attention and MLP (ViT), else behind the sums (BERT)."""

    def __init__(self, width: int, heads: int, first: bool, activation: nn.Module) -> None:
        super().__init__()
        self.attention, self.first = Attention(width, heads, joint=first), first
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.first:
            x = x + self.attention(self.norm1(x), mask)
            made: Tensor = x + self.mlp(self.norm2(x))
            return made
        x = self.norm1(x + self.attention(x, mask))
        behind: Tensor = self.norm2(x + self.mlp(x))
        return behind


class ViT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, patch: int, size: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, True, nn.GELU()) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.position
        for block in self.blocks:
            x = block(x, None)
        made: Tensor = self.head(self.norm(x)[:, 0])
        return made


def vit(
    width: int = 32, depth: int = 2, heads: int = 4, patch: int = 8, size: int = 32, classes: int = 10, batch: int = 1
) -> Network:
    """`width=384, depth=12, heads=6, patch=16, size=224, classes=1000` is ViT-S/16."""
    return settled(ViT(width, depth, heads, patch, size, classes)), (image(batch, size),)


class Bert(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, words: int, tokens: int, tanh: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        gelu = nn.GELU(approximate="tanh" if tanh else "none")
        self.blocks = nn.ModuleList(Block(width, heads, False, gelu) for _ in range(depth))

    def forward(self, ids: Tensor, attended: Tensor) -> Tensor:
        x: Tensor = self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]])
        mask = (1.0 - attended[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for block in self.blocks:
            x = block(x, mask)
        return x


def bert(
    width: int = 32,
    depth: int = 2,
    heads: int = 4,
    tokens: int = 24,
    words: int = 100,
    batch: int = 2,
    tanh: bool = False,
) -> Network:
    """`width=384, depth=6, heads=12` and `width=768, depth=12, heads=12`, 128 tokens, are MiniLM's and BERT-base's encoders."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(words, (batch, tokens), generator=generator)
    attended = (torch.arange(tokens) < torch.tensor([tokens] + [tokens - 5] * (batch - 1))[:, None]).long()
    return settled(Bert(width, depth, heads, words, tokens, tanh)), (ids, attended)


class Rotary(nn.Module):
    """A decoder's block as Llama has it: RMSNorm, rotated queries and keys, fewer keys than queries, a causal mask, SwiGLU."""

    def __init__(self, width: int, heads: int, words: int) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.words = nn.Embedding(words, width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width // 2, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        speeds = 10_000 ** (-torch.arange(0, self.head, 2).float() / self.head)
        angles = torch.outer(torch.arange(x.shape[2]).float(), speeds).repeat(1, 2)
        first, last = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-last, first), -1) * angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        y = self.norm1(x)
        q, k, v = (
            each(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        q, k, v = self.turned(q), self.turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        made: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return made


def rotary(width: int = 32, heads: int = 4, tokens: int = 24, words: int = 100, batch: int = 2) -> Network:
    ids = torch.randint(words, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return settled(Rotary(width, heads, words)), (ids,)


ALL: dict[str, Any] = {"resnet": resnet, "mobilenet": mobilenet, "yolo": yolo, "vit": vit, "bert": bert}
