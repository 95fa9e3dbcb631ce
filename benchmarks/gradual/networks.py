# SPDX-License-Identifier: Apache-2.0
"""The networks that are measured, in plain PyTorch: one family of small CNNs by width, LeNet-300-100, a ResNet-18, an LSTM."""

from __future__ import annotations

from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def cnn(width: int = 24) -> nn.Sequential:
    """Four convolutions, global pooling, one linear layer: 136,882 parameters at width 24, for 28 x 28 grey images."""
    w = width
    convolutions = _conv(1, w, 5, 2), _conv(w, 2 * w, 3, 2), _conv(2 * w, 4 * w, 3, 2), _conv(4 * w, 4 * w, 3)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10))


def lenet() -> nn.Sequential:
    """LeNet-300-100: 266,610 parameters in three linear layers, each used once an image."""
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(nn.Flatten(), *layers)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 3, stride), nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        )
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.short(x))


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 as it is used on 32 x 32 colour images: 11.2 million parameters at width 64, 0.7 at 16."""
    blocks: list[nn.Module] = [_conv(3, width, 3)]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        blocks += [_Residual(inputs, outputs, 1 if stage == 0 else 2), _Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class LSTM(nn.Module):
    """A language model of 2.1 million parameters: words [batch, length] in, scores of the next ones [.., words] out."""

    def __init__(self, words: int = 2000, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.output = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.output(self.lstm(self.embedding(words))[0])
        return scores
