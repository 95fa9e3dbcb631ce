# SPDX-License-Identifier: Apache-2.0
"""A memory of embeddings: for each class a queue of fixed size, first in, first out.

It is a ring in one tensor, so that it moves between devices and into checkpoints with the module that holds it, and a
push costs no copy of what stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Queues"]


class Queues(nn.Module):
    """For each of `classes` classes the last `size` embeddings (of `width` numbers) that were pushed.

    Takes classes x size x width numbers of memory from the start. Nothing in it has gradients.

    >>> queues = Queues(classes=2, size=3, width=1)
    >>> for value in (1.0, 2.0, 3.0, 4.0):
    ...     queues.push(1, torch.tensor([[value]]))
    >>> queues.of(1).flatten().tolist(), queues.of(0).shape
    ([2.0, 3.0, 4.0], torch.Size([0, 1]))
    """

    items: Tensor
    pushed: Tensor

    def __init__(self, classes: int, size: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("items", torch.zeros(classes, size, width, dtype=dtype))
        self.register_buffer("pushed", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, label: int, embeddings: Tensor) -> None:
        """Appends embeddings (n, width) of one class, the oldest first; those that no longer fit fall out."""
        before, n = int(self.pushed[label]), len(embeddings)
        last = embeddings[-self.size :]
        places = torch.arange(before + n - len(last), before + n, device=self.items.device) % self.size
        self.items[label, places] = last.to(self.items)
        self.pushed[label] += n

    def of(self, label: int) -> Tensor:
        """What is remembered of a class (n, width), the oldest first."""
        pushed = int(self.pushed[label])
        return self.items[label, torch.arange(max(0, pushed - self.size), pushed, device=self.items.device) % self.size]

    def sample(self, total: int) -> Tensor:
        """Up to `total` embeddings, the same number of each class that has as many, drawn without replacement.

        Draws from torch's global generator on the CPU, which checkpoints hold.
        """
        counts = self.pushed.clamp(max=self.size).tolist()
        known = [label for label, n in enumerate(counts) if n]
        each = -(-total // max(1, len(known)))
        found = []
        for label in known:
            places = torch.randperm(counts[label])[:each].to(self.items.device)
            found.append(self.items[label, places])
        return torch.cat(found) if found else self.items[0, :0]
