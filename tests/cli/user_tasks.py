# SPDX-License-Identifier: Apache-2.0
"""A module as a user would write it, copied into a folder of its own by the tests; each function is a way to go right or wrong."""

import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import featherweight as fw
from featherweight.errors import require


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 2))


def data(rows=160):
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 16, generator=chance)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def task(model=None, **options):
    x, y = data()

    def accuracy(answer):
        print("a line of the user's own")
        return float((answer(x).argmax(1) == y).double().mean())

    facts = {
        "train": DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True),
        "loss": lambda out, batch: cross_entropy(out, batch[1]),
        "evaluate": accuracy,
        "metric": "accuracy",
        "samples": len(y),
    }
    return fw.Task(model or net(), (x[:2],), **{**facts, **options})


def slow():
    def loss(out, batch):
        time.sleep(0.02)
        return cross_entropy(out, batch[1])

    return task(loss=loss)


def empty_loader():
    return task(train=[])


def one_shot_loader():
    return task(train=iter([data()]))


def wrong_shape():
    x, y = data()
    return task(train=[(x[:, :15], y)])


def nan_weights():
    model = net()
    model[2].weight.data[3, 5] = float("nan")
    return task(model)


def nan_loss():
    return task(loss=lambda out, batch: cross_entropy(out, batch[1]) * float("nan"))


class Unexportable(nn.Sequential):
    """Ends in an operation that ONNX does not have."""

    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x).detach()) if not self.training else super().forward(x)


def unexportable():
    return task(Unexportable(*net()))


def not_a_task():
    return net()


def broken():
    return {}["no such key"]


def broken_evaluate():
    def evaluate(answer):
        raise KeyError("my own mistake")

    return task(evaluate=evaluate)


def needs_an_argument(width):
    return net()


def needs_an_extra():
    return require("a_package_that_is_not_there", extra="train")
