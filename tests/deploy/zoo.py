# SPDX-License-Identifier: Apache-2.0
"""Small models of every kind that is exported, each with the inputs of one call."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convs(nn.Module):
    """Plain, depthwise, grouped and transposed convs, a norm that is folded, functional ops."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = F.max_pool2d(self.grouped(self.depthwise(x)), 2)
        return self.head(self.transposed(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.layer(steps)[0][:, -1])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.embedding(ids)))


class Several(nn.Module):
    """Two inputs, one of them a flag per row; outputs in a dict, with things in it that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor, keep: Tensor, scale: float = 1.0) -> dict:
        total = (self.a(x) + self.b(y)) * keep[:, None] * scale
        return {"logits": total, "parts": (self.a(x), None), "best": total.argmax(1), "count": 2}


class FromDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.types = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, batch: dict) -> Tensor:
        x = self.embedding(batch["ids"]) + 2 * self.types(batch["kinds"])
        return self.head((x * batch["mask"][..., None]).sum(1))


class Any(nn.Module):
    """Takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum(self.layer(x) for x in inputs)


def models() -> dict[str, tuple[nn.Module, tuple]]:
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
    steps = torch.randn(2, 3, 6)
    return {
        "convs": (Convs(), (torch.randn(2, 1, 12, 12),)),
        "convs, a batch of one": (Convs(), (torch.randn(1, 1, 12, 12),)),
        "lstm": (Recurrent(lstm), (steps,)),
        "gru": (Recurrent(nn.GRU(6, 8, batch_first=True)), (steps,)),
        "attention": (SelfAttention(), (torch.randn(2, 7, 8),)),
        "encoder": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(2, 7, 8),)),
        "tied": (Tied(), (torch.randint(0, 11, (2, 5)),)),
        "several": (Several(), (torch.randn(3, 4), torch.randn(3, 5), torch.tensor([True, False, True]), 2.0)),
        "from dict": (
            FromDict(),
            (
                {
                    "mask": torch.ones(2, 5),
                    "ids": torch.randint(0, 11, (2, 5)),
                    "kinds": torch.randint(0, 11, (2, 5)),
                },
            ),
        ),
        "any": (Any(), (torch.randn(2, 4), torch.randn(2, 4))),
    }
