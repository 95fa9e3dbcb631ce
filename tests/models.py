# SPDX-License-Identifier: Apache-2.0
"""Small models of every kind that methods must serve, each with the inputs it takes; all end in a linear layer `head`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.b(F.relu(self.a(x)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Tied(nn.Module):
    """A language model in small: the embedding is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.words(tokens)))).mean(1)


class Functional(nn.Module):
    """Weights held bare and used by functions, as subclassed models do."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding=1)).mean((2, 3))
        return self.head(F.gelu(self.mix(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 8)
        self.right = nn.Linear(4, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(F.relu(self.left(x)) * torch.sigmoid(self.right(y)))


def _mlp() -> nn.Module:
    layers = [("fc", nn.Linear(8, 16)), ("act", nn.ReLU()), ("mid", nn.Linear(16, 8)), ("head", nn.Linear(8, 6))]
    return nn.Sequential(_named(layers))


def _depthwise() -> nn.Module:
    layers = [
        ("stem", nn.Conv2d(3, 8, 1)),
        ("depth", nn.Conv2d(8, 8, 3, groups=8)),
        ("point", nn.Conv2d(8, 8, 1)),
        ("act", nn.ReLU6()),
        ("grouped", nn.Conv2d(8, 8, 3, groups=2)),
    ]
    return nn.Sequential(
        _named([*layers, ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", nn.Linear(8, 6))])
    )


def _transposed() -> nn.Module:
    layers = [
        ("up", nn.ConvTranspose2d(3, 8, 2, stride=2)),
        ("act", nn.SiLU()),
        ("line", nn.ConvTranspose2d(8, 8, 3, groups=2)),
    ]
    return nn.Sequential(
        _named([*layers, ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", nn.Linear(8, 6))])
    )


def _volume() -> nn.Module:
    layers = [("solid", nn.Conv3d(1, 4, 2)), ("flat", nn.Flatten(2)), ("line", nn.Conv1d(4, 8, 3)), ("act", nn.ReLU())]
    return nn.Sequential(
        _named([*layers, ("pool", nn.AdaptiveAvgPool1d(1)), ("end", nn.Flatten()), ("head", nn.Linear(8, 6))])
    )


def _named(layers: list[tuple[str, nn.Module]]) -> OrderedDict[str, nn.Module]:
    return OrderedDict(layers)


def _image(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 8, 8),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "mlp": (_mlp, lambda n: (torch.randn(n, 8),)),
    "residual": (Residual, _image),
    "depthwise and grouped": (_depthwise, _image),
    "transposed": (_transposed, _image),
    "1-d and 3-d": (_volume, lambda n: (torch.randn(n, 1, 4, 4, 4),)),
    "recurrent": (Recurrent, lambda n: (torch.randn(n, 5, 6),)),
    "transformer": (Transformer, lambda n: (torch.randn(n, 5, 8),)),
    "tied": (Tied, lambda n: (torch.randint(0, 12, (n, 5)),)),
    "functional": (Functional, _image),
    "two inputs": (TwoInputs, lambda n: (torch.randn(n, 5), torch.randn(n, 4))),
}
