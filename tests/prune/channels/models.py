# SPDX-License-Identifier: Apache-2.0
"""Small networks with gates written into their forward: m = 1 on each coupling, to differentiate by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Gated(nn.Module):
    """Whose forward multiplies what consumers of a group read by `gates[group]`, where given."""

    gates: Mapping[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.gates = {}

    def gate(self, name: str, x: Tensor, axis: int = 1) -> Tensor:
        if name not in self.gates:
            return x
        m = self.gates[name]
        if m.ndim == 2:  # one gate a sample
            shape = [m.shape[0]] + [1] * (x.ndim - 1)
            shape[axis] = m.shape[1]
        else:
            shape = [1] * x.ndim
            shape[axis] = len(m)
        return x * m.view(shape)


class Mlp(Gated):
    """Two hidden layers, smooth, so that its gates have a Hessian everywhere. Groups: a (6), b (5)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate("a", torch.tanh(self.a(x)))
        x = self.gate("b", torch.tanh(self.b(x)))
        return self.head(x)


class Cnn(Gated):
    """A residual stage read by two consumers, with BatchNorm, a depthwise and a grouped convolution.

    Groups: stem (8, with b: the stage), a (6), deep (4 couplings of 2 channels, one of each conv group of `point`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 8, 1)
        self.deep, self.depth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 4, 1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = x + self.b(self.gate("a", torch.relu(self.norm_a(self.a(self.gate("stem", x))))))
        x = torch.tanh(self.deep(self.gate("stem", x)))
        return self.head(self.point(self.depth(x)).mean((2, 3)))


class Attention(Gated):
    """Self-attention of four heads, an MLP, layer norms. Groups: heads of `q` (4), `up` (12), and the stream `embed` (8)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        b, n, _ = y.shape
        q, k, v = (layer(y).view(b, n, -1, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-2, -1) / 2**0.5, dim=-1) @ v
        mixed = self.gate("heads", mixed)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, -1))
        return self.head((x + self.down(torch.tanh(self.up(self.norm2(x))))).mean(1))


def built(kind: type[Gated], seed: int = 0) -> Gated:
    torch.manual_seed(seed)
    model = kind().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model.eval()


INPUTS = {Mlp: (4,), Cnn: (3, 5, 5), Attention: (6, 5)}


def batch_of(kind: type[Gated], samples: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *INPUTS[kind], generator=generator, dtype=torch.float64)
    return x, torch.randn(samples, 3, generator=generator, dtype=torch.float64)


def loss_of(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs - batch[1]).square().mean()
