# SPDX-License-Identifier: Apache-2.0
"""A residual network (He et al. 2016) for Fashion-MNIST: 0.7 million parameters, batch normalization, trained here.

Two blocks at each of three widths, 32, 64 and 128, after a stem of stride 2, so that the widest layers have d = 1152
inputs a row: the size that exact solvers are timed at. Five epochs take about seven minutes on one core.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from benchmarks.gradual import data as fashion
from benchmarks.reconstruct.data import trained
from benchmarks.reconstruct.subjects.subject import Model, Subject, answers

WIDTH, BATCH, EPOCHS, PEAK, WEIGHT_DECAY = 32, 128, 5, 0.2, 5e-4
CALIBRATION = 512


class Block(nn.Module):
    """Two 3 x 3 convolutions and a way around them, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        project = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity() if same else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def network(width: int = WIDTH) -> nn.Sequential:
    """The network without its weights, for images [n, 1, 28, 28]."""
    blocks = OrderedDict[str, nn.Module]()
    inputs = width
    for stage in range(3):
        outputs = width << stage
        blocks[f"block{stage}a"] = Block(inputs, outputs, 2 if stage else 1)
        blocks[f"block{stage}b"] = Block(outputs, outputs, 1)
        inputs = outputs
    stem = {"conv": nn.Conv2d(1, width, 3, 2, 1, bias=False), "bn": nn.BatchNorm2d(width), "relu": nn.ReLU()}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(inputs, 10)}
    return nn.Sequential(OrderedDict({**stem, **blocks, **head}))


def subject() -> Subject:
    """ResNet on Fashion-MNIST: accuracy on the 10,000 test images, calibrated on images that it was trained on."""
    model, splits = trained_network(), fashion.load()
    calibration = list(fashion.as_input(splits.train.images[:CALIBRATION]).split(64))

    def per_sample(candidate: Model) -> np.ndarray:
        inputs = (fashion.as_input(images) for images in splits.test.images.split(500))
        chosen = torch.cat([scores.argmax(1) for scores in answers(candidate, inputs)])
        return (chosen == splits.test.labels).double().numpy()

    return Subject(
        "resnet", model, calibration, (calibration[0][:1],), "accuracy", len(splits.test.labels), per_sample
    )  # fmt: skip


def trained_network(epochs: int = EPOCHS) -> nn.Sequential:
    """SGD with Nesterov momentum at a learning rate that rises for a fifth of the steps and then falls to zero."""
    torch.manual_seed(0)
    model = network().to(memory_format=torch.channels_last)  # a third faster to train on a CPU
    split = fashion.load().train
    per_epoch = len(split.labels) // BATCH
    steps = epochs * per_epoch
    optimizer = torch.optim.SGD(model.parameters(), PEAK, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)

    def step(i: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * learning_rate(i / steps)
        order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(i // per_epoch))
        chosen = order[i % per_epoch * BATCH :][:BATCH]
        return cross_entropy(model(augmented(split.images[chosen], i)), split.labels[chosen])

    trained(f"resnet-{WIDTH}-{epochs}", model, optimizer, step, steps)
    return model.eval().to(memory_format=torch.contiguous_format)


def learning_rate(done: float, rise: float = 0.2) -> float:
    """The share of the peak after this share of the steps: up in a line, down along a cosine."""
    return done / rise if done < rise else 0.5 + 0.5 * math.cos(math.pi * (done - rise) / (1 - rise))


def augmented(images: Tensor, seed: int) -> Tensor:
    """Every second image mirrored, and the whole batch moved by up to two pixels."""
    chance = torch.Generator().manual_seed(seed)
    x = fashion.as_input(images)
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=chance) < 0.5, x.flip(-1), x)
    down, right = torch.randint(-2, 3, (2,), generator=chance).tolist()
    return x.roll((down, right), (2, 3)).contiguous(memory_format=torch.channels_last)
