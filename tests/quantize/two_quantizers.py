# SPDX-License-Identifier: Apache-2.0
"""One of two processes that tune one model's centroids together. It imports little, because the process starts anew."""

from __future__ import annotations

import torch
import torch._dynamo  # DistributedDataParallel imports it when it is made, in each process again
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from featherweight.quantize import TuneCentroids


def tune_on_rank(rank: int, folder: str) -> None:
    """Data are this rank's own; what it ends with goes to a file named by its rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        with torch.no_grad():
            numbers = torch.tensor([-0.3, 0.0, 0.1, 0.4])
            model[0].weight.copy_(numbers[torch.randint(0, 4, (16, 8))])
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
        tuner = TuneCentroids().attach(parallel, optimizer)
        own = torch.Generator().manual_seed(rank)
        for _ in range(8):
            optimizer.zero_grad()
            parallel(torch.randn(6, 8, generator=own)).square().mean().backward()
            optimizer.step()
            tuner.step()
        tuner.finalize()
        save_file(model.state_dict(), f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()
