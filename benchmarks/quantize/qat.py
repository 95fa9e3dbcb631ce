# SPDX-License-Identifier: Apache-2.0
"""Training on grids against rounding after training, from 8 to 2 bits: the same network, the same steps, the same images.

A residual network with BatchNorm on 10,000 images of Fashion-MNIST, and an LSTM and a transformer on 8 x 8 digits, read row
by row. Each dense network is trained once; from there `dense` trains on, `ptq` rounds (`Quantize`, static activations),
and `qat` trains on for just as many steps with the hook. Nobody gets more training for being quantized.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import featherweight as fw
from benchmarks import pages
from benchmarks.gradual.data import Split, as_input, batches, load
from benchmarks.gradual.paired import drop
from benchmarks.results import Row, add, read
from featherweight.digits import digits

RESULTS = Path(__file__).parent / "results" / "qat.jsonl"
SIZE = 64


@dataclasses.dataclass(frozen=True)
class Setting:
    """What tells one run from another; weights and activations in bits, 32 where they stay floats."""

    network: str
    method: str
    weights: int = 32
    activations: int = 32
    start: str = "mse"
    fold: str = "last"
    learn: bool = True
    distill: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Training:
    """Steps of the dense network and of what follows, and the learning rate of each."""

    dense: int
    steps: int
    lr: float
    more_lr: float


TRAINING = {
    "resnet": Training(900, 300, 3e-3, 1e-3),
    "lstm": Training(900, 300, 3e-3, 1e-3),
    "transformer": Training(900, 300, 3e-3, 1e-3),
}
BITS = ((8, 8), (4, 8), (4, 4), (3, 8), (3, 4), (2, 8), (2, 4))
SETTINGS = [
    Setting(network, method, *bits)
    for network in TRAINING
    for method, bits in [("dense", (32, 32)), *((m, b) for b in BITS for m in ("ptq", "qat"))]
] + [
    dataclasses.replace(Setting("resnet", "qat", *bits), **other)
    for bits in ((8, 8), (4, 4), (2, 4))
    for other in ({"fold": "first"}, {"learn": False}, {"fold": "first", "start": "lsq"}, {"distill": True})
]


class Residual(nn.Module):
    """Four convolutions with BatchNorm and one addition; 47,000 parameters and 3.7 million multiply-adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.norm_a = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.b, self.norm_b = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.c, self.norm_c = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm(self.stem(x)))
        x = relu(self.norm_b(self.b(relu(self.norm_a(self.a(x))))))
        x = relu(x + self.norm_c(self.c(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


class Rows(nn.Module):
    """An image of 8 x 8 as eight rows, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, 0])[0][:, -1])


class Encoder(nn.Module):
    """The same rows as tokens of two encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 48), nn.Parameter(torch.randn(8, 48) * 0.02)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0]) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


NETWORKS = {"resnet": Residual, "lstm": Rows, "transformer": Encoder}


class Batches:
    """`steps` batches in an order that the seed fixes, as often as they are asked for."""

    def __init__(self, network: str, steps: int, seed: int) -> None:
        self.network, self.steps, self.seed = network, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.network == "resnet":
            yield from batches(fashion()[0], SIZE, self.steps, self.seed)
            return
        x, y = digits("train")
        chance = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            chosen = torch.randint(len(x), (SIZE,), generator=chance)
            yield x[chosen], y[chosen]


@functools.cache
def fashion() -> tuple[Split, Split]:
    """The first 10,000 training images, and the test images."""
    data = load()
    return Split(*(part[:10_000] for part in data.train)), data.test


@functools.cache
def test(network: str) -> tuple[Tensor, Tensor]:
    if network != "resnet":
        return digits("test")
    split = fashion()[1]
    return as_input(split.images), split.labels


def right(network: str, model: nn.Module) -> Tensor:
    """Which test images a network has right."""
    x, y = test(network)
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(500)]) == y


def task(network: str, model: nn.Module, steps: int, seed: int) -> fw.Task:
    x = test(network)[0][:1]
    calibration = list(Batches(network, 8, seed + 100))
    loss = lambda out, batch: cross_entropy(out, batch[1])  # noqa: E731
    return fw.Task(model, (x,), train=Batches(network, steps, seed), calibration=calibration, loss=loss)


@functools.cache
def dense(network: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, training = NETWORKS[network](), TRAINING[network]
    fw.Train(steps=training.dense, lr=training.lr, weight_decay=0.01)(
        model, task(network, model, training.dense, seed), fw.Stage(seed=seed)
    )
    return model.eval()


def measured(setting: Setting) -> Row:
    """The row of one run: which test images are right, and what it took."""
    start = time.process_time()
    network, training = setting.network, TRAINING[setting.network]
    whole = dense(network, setting.seed)
    began = time.process_time()
    model = copy.deepcopy(whole)
    work = task(network, whole, training.steps, setting.seed + 1)
    if setting.method == "ptq":
        plan = fw.Quantize(setting.weights, activations="static", activation_bits=setting.activations)(
            model, work, fw.Stage()
        )
    else:
        hooks = []
        if setting.method == "qat":
            opened = [
                fw.Swap(n, to="attention") for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
            ]
            fw.Apply(opened)(model, work, fw.Stage())
            hooks = [
                fw.QAT(
                    setting.weights,
                    activation_bits=setting.activations,
                    start=setting.start,
                    fold=setting.fold,
                    learn=setting.learn,
                )
            ]
        method = fw.Train(
            steps=training.steps,
            lr=training.more_lr,
            weight_decay=0.01,
            hooks=hooks,
            distill=fw.KL() if setting.distill else None,
        )
        plan = method(model, work, fw.Stage(seed=setting.seed))
    hits = right(network, model)
    packed = torch.nn.functional.pad(hits, (0, -len(hits) % 8)).view(-1, 8)
    bytes_ = (packed * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])).sum(1).to(torch.uint8)
    return dataclasses.asdict(setting) | {
        "accuracy": round(float(hits.float().mean()), 5),
        "right": bytes_.numpy().tobytes().hex(),
        "n": len(hits),
        "steps": training.steps,
        "grids": len([edit for edit in plan.edits if isinstance(edit, fw.FakeQuant)]),
        "seconds": round(time.process_time() - began, 1),
        "dense_seconds": round(began - start, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def of(row: Row) -> Setting:
    return Setting(**{field.name: row[field.name] for field in dataclasses.fields(Setting)})


def table() -> str:
    """Accuracy of each, and the points that it lost against the dense network trained on, paired, with 95 % intervals."""
    found = {of(row): row for row in read(RESULTS)}
    rows = []
    for network in TRAINING:
        control = found.get(Setting(network, "dense"))
        if control is None:
            continue
        rows.append([network, "32 / 32", f"{100 * control['accuracy']:.2f} %", ""])
        for bits in BITS:
            cells = [_cell(control, found.get(Setting(network, method, *bits))) for method in ("ptq", "qat")]
            rows.append([network, f"{bits[0]} / {bits[1]}", *cells])
    head = ["network", "bits of weights / activations", "rounded after training", "trained on the grids"]
    return pages.table(head, rows)


def others() -> str:
    """The same network trained with one option changed."""
    found = {of(row): row for row in read(RESULTS)}
    control = found[Setting("resnet", "dense")]
    ways: dict[str, dict[str, Any]] = {
        "as it comes": {},
        "steps fixed (`learn=False`)": {"learn": False},
        "norms folded first": {"fold": "first"},
        "norms folded first, steps begin as LSQ says": {"fold": "first", "start": "lsq"},
        "beside a teacher (`KL`)": {"distill": True},
    }
    bits = ((8, 8), (4, 4), (2, 4))
    rows = []
    for name, other in ways.items():
        cells = [_cell(control, found.get(dataclasses.replace(Setting("resnet", "qat", *b), **other))) for b in bits]
        rows.append([name, *cells])
    return pages.table(["", *(f"{w} / {a}" for w, a in bits)], rows)


def _cell(control: Row, row: Row | None) -> str:
    if row is None:
        return ""
    lost = drop([control["right"]], [row["right"]])
    return f"{100 * row['accuracy']:.2f} % ({-lost['points']:+.2f} [{-lost['high']:+.2f}, {-lost['low']:+.2f}])"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.qat", description=__doc__)
    parser.add_argument("networks", nargs="*", help="which of resnet, lstm, transformer; default: all")
    parser.add_argument("--table", action="store_true", help="print the table of what has been measured, and stop")
    given = parser.parse_args()
    if given.table:
        print(table(), others(), sep="\n\n")
        return
    torch.set_num_threads(1)
    done = {of(row) for row in read(RESULTS)}
    for setting in SETTINGS:
        if setting in done or (given.networks and setting.network not in given.networks):
            continue
        row = measured(setting)
        add(RESULTS, row)
        print(json.dumps({key: value for key, value in row.items() if key != "right"}), flush=True)


if __name__ == "__main__":
    main()
