# SPDX-License-Identifier: Apache-2.0
"""Dense networks to start from: `python -m benchmarks.comb.train [NETWORK ...]`, trained once and kept beside the data.

Fixed seeds and a fixed order of batches; the learning rate rises for a tenth of the steps and falls along a cosine. Few
hyperparameters were tried at all, and those on the validation split.
"""

from __future__ import annotations

import argparse
import functools
import time

import torch
from torch import Tensor, nn

from benchmarks.comb.networks import NETWORKS, Network
from benchmarks.comb.results import Row, add, there
from benchmarks.comb.tasks import ious, packed, work
from benchmarks.reconstruct.data import trained
from benchmarks.reconstruct.subjects.resnet import learning_rate, trained_network
from featherweight.measure import eval_copy
from featherweight.measure.macs import count_work

DECAY = {"sgd": 5e-4, "adamw": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comb.train", description=__doc__)
    parser.add_argument("networks", nargs="*", default=[*NETWORKS])
    torch.set_num_threads(1)
    known = {row["network"] for row in there("dense")}
    for name in parser.parse_args().networks:
        if name not in known:
            add("dense", measured(NETWORKS[name]))


def measured(network: Network) -> Row:
    start = time.process_time()
    model, task = dense(network.name), work(network.task)
    seconds = time.process_time() - start
    row: Row = {"network": network.name, "task": network.task, "seconds": round(seconds), **sizes(network, model)}
    for split in ("validation", "test"):
        rows = task.rows(model, split)
        row |= {split: task.summary(rows), f"{split}_rows": packed(rows), f"{split}_n": len(rows)}
        if rows.ndim == 3:
            row[f"{split}_ious"] = ious(rows).tolist()
            row[f"{split}_pixels"] = rows[:, 2].sum(0).tolist()
    return row


def sizes(network: Network, model: nn.Module) -> Row:
    """Multiply-adds of one picture, and parameters."""
    macs = sum(count_work(eval_copy(model), (work(network.task).example[:1],)).macs.values())
    return {"macs": macs, "parameters": sum(p.numel() for p in model.parameters())}


@functools.cache
def dense(name: str) -> nn.Module:
    """The trained network, in evaluation mode; trains it if nobody has. Copy it before you change it."""
    network = NETWORKS[name]
    if name == "resnet":
        return trained_network()
    torch.manual_seed(0)
    model = network.build()
    convolves = not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    if convolves:  # a third faster to train on a CPU
        model = model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(network, model)
    task = work(network.task)

    def step(i: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = network.lr * learning_rate(i / network.steps, 0.1)
        batch = task.batch(i, 0)
        x = batch[0].contiguous(memory_format=torch.channels_last) if convolves else batch[0]
        return task.loss(model(x), batch)

    trained(f"comb-{name.replace(' ', '-')}-{network.steps}", model, optimizer, step, network.steps)
    return model.eval().to(memory_format=torch.contiguous_format)


def _optimizer(network: Network, model: nn.Module) -> torch.optim.Optimizer:
    decay = DECAY[network.optimizer]
    if network.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), network.lr, 0.9, weight_decay=decay, nesterov=True)
    return torch.optim.AdamW(model.parameters(), network.lr, weight_decay=decay)


if __name__ == "__main__":
    main()
