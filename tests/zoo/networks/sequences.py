# SPDX-License-Identifier: Apache-2.0
"""Networks of steps: recurrent ones, and convolutions over time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.zoo.networks.classic import CLASSES

WORDS = 97


class LanguageModel(nn.Module):
    """Two LSTM layers between an embedding and an output layer that are one tensor (Merity et al., 2018)."""

    def __init__(self, width: int = 40, hidden: int = 56) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.rnn = nn.LSTM(width, hidden, num_layers=2, batch_first=True)
        self.bridge = nn.Linear(hidden, width)
        self.head = nn.Linear(width, WORDS)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bridge(self.rnn(self.embedding(words))[0])))


class Tagger(nn.Module):
    """Two GRU layers in both directions, a class for each step."""

    def __init__(self, width: int = 24, hidden: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.rnn = nn.GRU(width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.norm, self.head = nn.LayerNorm(2 * hidden), nn.Linear(2 * hidden, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(self.embedding(words))[0]))


class CRNN(nn.Module):
    """Convolutions whose columns are the steps of an LSTM in both directions (Shi et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 20, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
        )
        self.rnn = nn.LSTM(20 * 4, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        steps = x.permute(0, 3, 1, 2).flatten(2)
        return self.head(self.rnn(steps)[0]).log_softmax(-1)


class _TasNetBlock(nn.Module):
    def __init__(self, width: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.into, self.norm1 = nn.Conv1d(width, hidden, 1), nn.GroupNorm(1, hidden, eps=1e-8)
        self.depth = nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden)
        self.norm2, self.act = nn.GroupNorm(1, hidden, eps=1e-8), nn.PReLU()
        self.residual, self.skip = nn.Conv1d(hidden, width, 1), nn.Conv1d(hidden, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm2(self.act(self.depth(self.norm1(self.act(self.into(x))))))
        return x + self.residual(y), self.skip(y)


class ConvTasNet(nn.Module):
    """A learned basis, masks of two speakers from dilated depthwise convs, and back (Luo and Mesgarani, 2019)."""

    def __init__(self, basis: int = 32, width: int = 24, hidden: int = 40, speakers: int = 2) -> None:
        super().__init__()
        self.speakers, self.basis = speakers, basis
        self.encoder, self.decoder = (
            nn.Conv1d(1, basis, 16, stride=8, bias=False),
            nn.ConvTranspose1d(basis, 1, 16, stride=8, bias=False),
        )
        self.norm, self.narrow = nn.GroupNorm(1, basis), nn.Conv1d(basis, width, 1)
        self.blocks = nn.ModuleList(_TasNetBlock(width, hidden, 2**i) for i in range(3))
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(width, speakers * basis, 1))

    def forward(self, wave: Tensor) -> Tensor:
        mixture = F.relu(self.encoder(wave))
        x, total = self.narrow(self.norm(mixture)), torch.zeros(())
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        batch, _, frames = mixture.shape
        masks = torch.sigmoid(self.masks(total)).view(batch, self.speakers, self.basis, frames)
        parts = (masks * mixture.unsqueeze(1)).view(batch * self.speakers, self.basis, frames)
        return self.decoder(parts).view(batch, self.speakers, -1)


class _Causal(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(F.pad(x, (self.pad, 0))))
        y = F.relu(self.conv2(F.pad(y, (self.pad, 0))))
        return F.relu(y + self.skip(x))


class TCN(nn.Module):
    """Causal dilated convs with weight norm (Bai et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_Causal(5, 20, 1), _Causal(20, 28, 2), _Causal(28, 28, 4))
        self.head = nn.Linear(28, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class WaveNet(nn.Module):
    """Halves of a dilated conv gate each other; residual and skip come of one conv (van den Oord et al., 2016)."""

    def __init__(self, width: int = 24, skips: int = 32) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Conv1d(1, width, 1)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.outs = nn.ModuleList(nn.Conv1d(width, width + skips, 1) for _ in range(3))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(skips, 40, 1), nn.ReLU(), nn.Conv1d(40, 16, 1))
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), None
        for gated, out in zip(self.gated, self.outs, strict=True):
            a, b = gated(x).chunk(2, dim=1)
            residual, skip = out(torch.tanh(a) * torch.sigmoid(b)).split([self.width, self.skips], dim=1)
            x = x + residual
            total = skip if total is None else total + skip
        return self.last(total)
