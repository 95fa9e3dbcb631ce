# SPDX-License-Identifier: Apache-2.0
"""Several processes under torchrun: each solves its share of the problems, and all end with the same weights.

A problem is solved by one process, from all of the calibration data, as a single process would solve it. A step of
fewer problems than processes is solved by all, who share out the rows in those loops where rows do not see one another.
Either way two processes give what one gives, to the last bit. Only answers travel, as tensors; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "add_up",
    "broadcast",
    "join",
    "meet",
    "own",
    "processes",
    "rank",
    "rows_are_shared",
    "same",
    "share",
    "shared_rows",
]

_rows_are_shared = False


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


@contextlib.contextmanager
def shared_rows() -> Iterator[None]:
    """While it lasts, all processes solve one problem: `own` gives each its rows, `add_up` brings them together."""
    global _rows_are_shared
    before, _rows_are_shared = _rows_are_shared, processes() > 1
    try:
        yield
    finally:
        _rows_are_shared = before


def rows_are_shared() -> bool:
    """Whether all processes are at the same problem now."""
    return _rows_are_shared


def own(rows: Tensor) -> Tensor:
    """The rows that are this process's: all of them, unless they are shared; then every n-th, so that long ones spread.

    >>> own(torch.arange(3)).tolist()
    [0, 1, 2]
    """
    return rows[rank() :: processes()] if _rows_are_shared else rows


def add_up(part: Tensor) -> Tensor:
    """The sum of all processes' parts, where rows are shared; each is zero in others' rows, so nothing is rounded."""
    if _rows_are_shared:
        part = part.contiguous()
        dist.all_reduce(part)
    return part


def same(tensor: Tensor) -> Tensor:
    """The first process's values, for all: where decisions must agree to the bit, so must what they are made from."""
    if processes() == 1:
        return tensor
    tensor = tensor.contiguous().clone()
    dist.broadcast(tensor, 0)
    return tensor
