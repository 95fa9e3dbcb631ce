# SPDX-License-Identifier: Apache-2.0
"""Dense networks, trained once and kept, and what it takes to judge others by them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import featherweight as fw
from benchmarks.deep_compression import data
from benchmarks.deep_compression.networks import NETWORKS
from benchmarks.reconstruct.data import cache

STEPS = {"lenet_300_100": 6000, "lenet_5": 3000}


def task_of(model: nn.Module, split: int) -> fw.Task:
    """Trains on moved images of the training part of a split; evaluates on its validation part."""
    splits = data.load(split)
    return fw.Task(
        model,
        (torch.zeros(1, 1, 28, 28),),
        train=data.Batches(splits.train),
        calibration=list(splits.train.images.split(100)),
        loss=lambda outputs, batch: cross_entropy(outputs, batch[1]),
        evaluate=lambda answer: right(answer, splits.validation).float().mean().item(),
        metric="accuracy",
        samples=len(splits.validation.labels),
    )


def dense(name: str, seed: int, split: int) -> nn.Sequential:
    """The dense network in evaluation mode: trained here the first time, later read from the folder of the data."""
    steps = STEPS[name]
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    path = cache() / f"deep-compression-{split}-{name}-{seed}-{steps}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        train = fw.Train(steps=steps, lr=2e-3, weight_decay=0.01, warmup=min(100, steps // 10))
        train(model, task_of(model, split), fw.Stage(seed=seed))
        save_file(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def right(answer: Callable[..., Tensor], split: data.Split) -> Tensor:
    """Which images are read as they are labelled; a module's mode is as it was afterwards."""
    mode = answer.training if isinstance(answer, nn.Module) else None
    if isinstance(answer, nn.Module):
        answer.eval()
    found = torch.cat([answer(images).argmax(1) for images in split.images.split(500)]) == split.labels
    if isinstance(answer, nn.Module) and mode is not None:
        answer.train(mode)
    return found


def as_text(bits: Tensor) -> str:
    """A bit an image, as hexadecimal digits."""
    return np.packbits(bits.numpy()).tobytes().hex()
