# SPDX-License-Identifier: Apache-2.0
"""One of two processes that train one model on grids together. It imports little, because the process starts anew."""

from __future__ import annotations

import torch
import torch._dynamo  # DistributedDataParallel imports it when it is made, in each process again
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from featherweight.quantize import QAT


def quantize_on_rank(rank: int, folder: str) -> None:
    """Data are this rank's own, of another range on each; what it ends with goes to a file named by its rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
        own = torch.Generator().manual_seed(rank)
        hook = QAT(bits=3, activation_bits=4).attach(parallel, optimizer)
        for _ in range(8):
            optimizer.zero_grad()
            x, y = (1 + 3 * rank) * torch.randn(6, 8, generator=own), torch.randint(0, 4, (6,), generator=own)
            F.cross_entropy(parallel(x), y).backward()
            optimizer.step()
            hook.step()
        hook.finalize()
        save_file(model.state_dict(), f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()
