# SPDX-License-Identifier: Apache-2.0
"""What gradual pruning adds to a training step: gradient masks, re-zeroing after the optimizer, and mask updates.

The same loop with and without a pruner, on two copies of one network, interleaved step by step in random order, on one
thread. Masks are updated every 20 steps here, to time many updates, and an update's extra time then counts once in 100
steps, which is the default `every`. Figures are medians over blocks of 20 rounds, each block by its mean: a median over
single steps would leave out what is done now and then. The overhead is the median of the blocks' own ratios, since the
steps of a block are fast or slow together. Times are CPU time of the process: on one thread of an idle machine that is
wall time, and on a machine that others use as well it is not theirs.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import featherweight as fw
from benchmarks.gradual import networks

SPARSITY, EVERY, UPDATE, WARMUP = 0.875, 100, 20, 20
Optimizer = Callable[[Any], torch.optim.Optimizer]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.01, 0.9)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3)


def _grey(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))


def _colour() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


def _words() -> tuple[Tensor, Tensor]:
    words = torch.randint(2000, (20, 36))
    return words[:, :-1], words[:, 1:]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Optimizer]] = {
    "CNN, batch 64, SGD": (networks.cnn, lambda: _grey(64), _sgd),
    "CNN, batch 128, SGD": (networks.cnn, lambda: _grey(128), _sgd),
    "CNN, batch 128, AdamW": (networks.cnn, lambda: _grey(128), _adamw),
    "LeNet-300-100, batch 64, SGD": (networks.lenet, lambda: _grey(64), _sgd),
    "LeNet-300-100, batch 128, AdamW": (networks.lenet, lambda: _grey(128), _adamw),
    "ResNet-18 of width 16, batch 64, SGD": (lambda: networks.resnet18(16), _colour, _sgd),
    "LSTM, 20 x 35 words, SGD": (networks.LSTM, _words, _sgd),
    "LSTM, 20 x 35 words, AdamW": (networks.LSTM, _words, _adamw),
}


def overhead(rounds: int, names: Iterable[str] = tuple(CASES)) -> dict[str, Any]:
    """One row a network: medians, and the share of a step that pruning adds, with a 95 % interval."""
    torch.set_num_threads(1)
    return {"rows": [_measure(name, rounds) for name in names]}


def _measure(name: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    make, batch, optimizer = CASES[name]
    dense, (x, y) = make(), batch()
    pruned = copy.deepcopy(dense)
    plain = _loop(dense, x, y, optimizer(dense.parameters()))
    own = optimizer(pruned.parameters())
    pruner = fw.GradualPruning(SPARSITY, end=WARMUP + rounds, every=UPDATE).attach(pruned, own, (x[:1],))
    bare, updated = _loop(pruned, x, y, own), []

    def with_pruner() -> None:
        bare()
        updated.append(pruner.step()["updated"])

    samples = _interleaved(plain, with_pruner, WARMUP + rounds)[:, WARMUP:]
    pruner.finalize()
    parameters = sum(p.numel() for p in dense.parameters())
    return {"name": name, "parameters": parameters, "n": rounds, **_shares(*samples, np.array(updated[WARMUP:]))}


def _interleaved(first: Callable[[], None], second: Callable[[], None], rounds: int) -> np.ndarray:
    """CPU milliseconds of each call, [2, rounds]; which of the two goes first in a round is left to chance."""
    samples, chance = np.empty((2, rounds)), random.Random(0)
    for i in range(rounds):
        for which, call in chance.sample([(0, first), (1, second)], 2):
            start = time.process_time_ns()
            call()
            samples[which, i] = (time.process_time_ns() - start) / 1e6
    return samples


def _loop(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    return step


def _shares(without: np.ndarray, with_: np.ndarray, updated: np.ndarray) -> dict[str, float]:
    """Milliseconds, and the overhead as a share of a step, whose interval is a bootstrap over the blocks."""
    base = without.reshape(-1, UPDATE).mean(1)
    usual = with_[~updated].reshape(-1, UPDATE - 1).mean(1)
    update = with_[updated]
    shares = (usual + (update - usual) / EVERY) / base - 1
    drawn = np.random.default_rng(0).choice(shares, (2000, len(shares)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    figures = {"without_ms": base, "with_ms": usual, "update_ms": update, "overhead": shares}
    return {name: float(np.median(values)) for name, values in figures.items()} | {
        "low": float(low),
        "high": float(high),
    }
