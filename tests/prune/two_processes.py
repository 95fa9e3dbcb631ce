# SPDX-License-Identifier: Apache-2.0
"""One of two processes that prune one model together. It imports little, because the process starts anew."""

from __future__ import annotations

import torch
import torch._dynamo  # DistributedDataParallel imports it when it is made, in each process again
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.prune import GradualPruning


def prune_on_rank(rank: int, folder: str) -> None:
    """Data and scores are this rank's own; what it ends with goes to a file named by its rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
        own = torch.Generator().manual_seed(rank)

        def importance(name: str, weight: Tensor) -> Tensor:
            return torch.rand(weight.shape, generator=own)

        pruner = GradualPruning(0.75, begin=1, end=5, every=2, importance=importance).attach(parallel, optimizer)
        for _ in range(8):
            optimizer.zero_grad()
            x, y = torch.randn(6, 8, generator=own), torch.randint(0, 4, (6,), generator=own)
            F.cross_entropy(parallel(x), y).backward()
            optimizer.step()
            pruner.step()
        gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
        save_file(model.state_dict() | gradients, f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()
