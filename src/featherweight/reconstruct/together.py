# SPDX-License-Identifier: Apache-2.0
"""Several processes under torchrun: each solves its share of the problems, and all end with the same weights.

A problem is solved by one process, from all of the calibration data, as a single process would solve it: two processes
give what one gives, to the last bit. Only answers travel, as tensors; nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["broadcast", "join", "meet", "processes", "rank", "share"]


def join() -> None:
    """Joins the process group that torchrun prepared, unless that was done: nccl where there are GPUs, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def processes() -> int:
    """How many processes work on this model."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(costs: Mapping[str, float]) -> dict[str, int]:
    """Which process solves which problem: the dearest first, each to the one that has least to do.

    >>> share({"conv": 3.0, "fc": 1.0})
    {'conv': 0, 'fc': 0}
    """
    load = [0.0] * processes()
    owner = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += costs[name]
    return {name: owner[name] for name in costs}


def broadcast(tensors: Sequence[Tensor] | None, facts: Any, source: int) -> tuple[list[Tensor], Any]:
    """Tensors and JSON-able facts from one process to all. Others pass None; alone, both come back as they are."""
    if processes() == 1:
        return list(tensors or ()), facts
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = rank() == source and tensors is not None
    head = None
    if mine and tensors is not None:
        shapes = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        head = torch.tensor(list(json.dumps([shapes, facts]).encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([0 if head is None else len(head)], device=device)
    dist.broadcast(length, source)
    if head is None:
        head = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(head, source)
    shapes, facts = json.loads(bytes(head.tolist()).decode())
    found = []
    for i, (dtype, shape) in enumerate(shapes):
        if mine and tensors is not None:
            tensor = tensors[i].to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        dist.broadcast(tensor, source)
        found.append(tensor)
    return found, facts


def meet() -> None:
    """Waits until all processes have come here."""
    if processes() > 1:
        dist.barrier()
