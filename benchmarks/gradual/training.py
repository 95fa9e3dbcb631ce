# SPDX-License-Identifier: Apache-2.0
"""One training run: the same loop for dense and for pruned networks, with the library at work in three lines of it.

All runs have the same number of steps, the same batches in the same order (by seed), and the same learning rates, so a
dense network is trained exactly as long as a pruned one. Pruning takes the second to the sixth tenth of the steps,
while the learning rate is still above a third of its start, and the masks then stand still for the rest.
"""

from __future__ import annotations

import dataclasses
import gzip
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import featherweight as fw
from benchmarks.gradual import data, networks

BATCH, WIDTH = 64, 24
LEARNING_RATE, WEIGHT_DECAY = 0.1, 5e-4


@dataclasses.dataclass(frozen=True)
class Run:
    """What tells one run from another. `watch` > 0 evaluates that often, and before and after each mask update."""

    sparsity: float = 0.0
    seed: int = 0
    steps: int = 3000
    width: int = WIDTH
    every: int = 100
    schedule: str = "cubic"
    watch: int = 0

    @property
    def pruning(self) -> fw.GradualPruning:
        end = 6 * self.steps // 10
        begin = end if self.schedule == "one_shot" else self.steps // 10
        return fw.GradualPruning(self.sparsity, begin=begin, end=end, every=self.every, schedule=self.schedule)


def runs(jobs: Sequence[Run], workers: int) -> list[dict[str, Any]]:
    """Trains each, `workers` at a time in processes of one thread each."""
    done = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for result in pool.map(train, jobs) if workers > 1 else map(train, jobs):
            done.append(result)
            print(
                f"{len(done)} of {len(jobs)} runs: {result['sparsity']:.1%} zeros, {result['seconds']:.0f} s",
                flush=True,
            )
    return done


def train(run: Run) -> dict[str, Any]:
    """The run's options and what came of it. `right` has a bit an image of the test split, as hexadecimal digits."""
    start, splits = time.perf_counter(), data.load()
    torch.manual_seed(run.seed)
    model = networks.cnn(run.width)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    pruner = run.pruning.attach(model, optimizer, (torch.zeros(1, 1, 28, 28),)) if run.sparsity else None
    curve: list[dict[str, Any]] = []
    for step, (x, y) in enumerate(data.batches(splits.train, BATCH, run.steps, run.seed)):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        before = _accuracy(model, splits.validation) if run.watch and _due(run, step) else None
        facts = pruner.step() if pruner else {"sparsity": 0.0, "updated": False}
        if before is not None:
            after = _accuracy(model, splits.validation) if facts["updated"] else before
            rate = scheduler.get_last_lr()[0]
            curve.append({"step": step, "lr": rate, "before": before, "after": after, "sparsity": facts["sparsity"]})
        scheduler.step()
    if pruner:
        pruner.finalize()
    outcome = {**dataclasses.asdict(run), **weigh(model), "validation": _accuracy(model, splits.validation)}
    right = _right(model, splits.test)
    test = {"test": right.float().mean().item(), "right": np.packbits(right.numpy()).tobytes().hex()}
    return {**outcome, **test, "curve": curve, "seconds": round(time.perf_counter() - start, 1)}


def _due(run: Run, step: int) -> bool:
    """At each mask update, a few steps after it, every `watch` steps, and at the end."""
    p = run.pruning
    update = p.end if step >= p.end else step - (step - p.begin) % p.every
    recovers = run.sparsity > 0 and step >= p.begin and step - update in (0, 5, 10, 20)
    return recovers or step % run.watch == 0 or step + 1 == run.steps


def _right(model: nn.Module, split: data.Split) -> Tensor:
    """Which images are classified as they are labelled; the model's mode is as it was afterwards."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        answers = [model(data.as_input(images)).argmax(1) for images in split.images.split(1000)]
    model.train(mode)
    return torch.cat(answers) == split.labels


def _accuracy(model: nn.Module, split: data.Split) -> float:
    return _right(model, split).float().mean().item()


def weigh(model: nn.Module) -> dict[str, Any]:
    """Sparsity of the pruned layers and of the network, and bytes: of the file, and of dense fp32 with and without gzip."""
    parameters = list(model.parameters())
    weights = [p.detach() for p in parameters if p.dim() > 1 and bool((p == 0).any())]
    zeros = sum(int((p == 0).sum()) for p in parameters)
    dense = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        fw.save(model, fw.Plan(), folder)
        packed = (Path(folder) / "model.safetensors").stat().st_size
    return {
        "layer_sparsity": sum(int((p == 0).sum()) for p in weights) / max(1, sum(p.numel() for p in weights)),
        "network_sparsity": zeros / sum(p.numel() for p in parameters),
        "parameters": sum(p.numel() for p in parameters),
        "nonzeros": sum(p.numel() for p in parameters) - zeros,
        "dense_bytes": len(dense),
        "packed_bytes": packed,
        "gzip_bytes": len(gzip.compress(dense, 6)),
    }
