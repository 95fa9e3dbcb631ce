# SPDX-License-Identifier: Apache-2.0
"""One run: a trained network, pruned while it trains on, with or without a teacher; its row, and the artefact it leaves.

Every experiment is a list of `Setting`s, and all rows lie in `results/runs.jsonl`: what two experiments ask for is run
once. All runs of a network have the same number of steps, the same batches in the same order and the same learning rates;
a setting with keep = 1 is the dense network trained on in just this way, so that nobody takes more training for pruning.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import featherweight as fw
from benchmarks.comb.distilling import distiller
from benchmarks.comb.networks import NETWORKS
from benchmarks.comb.pages import interval
from benchmarks.comb.results import Row, add, there
from benchmarks.comb.tasks import Rows, Work, ious, packed, paired, unpacked, work
from benchmarks.comb.train import DECAY, dense, sizes
from benchmarks.reconstruct.data import cache

SELF = "itself"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What tells one run from another.

    `keep` is the share that is left `of` macs or parameters; `teacher` is "itself" (unpruned) or another network.
    """

    network: str
    keep: float = 0.5
    importance: str = "cpd"
    distill: str = "kl"
    teacher: str = SELF
    of: str = "macs"
    seed: int = 0
    steps: int = 0  # 0: as many as the network has by default

    @property
    def name(self) -> str:
        """What its artefact is called."""
        parts = [str(getattr(self, field.name)) for field in dataclasses.fields(self)]
        return "-".join(parts).replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class Training:
    """How a network trains on: steps in all, of which the second to the sixth tenth prune, and the highest learning rate."""

    steps: int
    lr: float


TRAINING = {
    "resnet": Training(600, 0.02),
    "resnet small": Training(800, 0.02),
    "resnext": Training(600, 0.02),
    "mobilenet": Training(600, 0.02),
    "vit": Training(800, 1e-3),
    "vit-long": Training(800, 1e-3),
    "unet": Training(400, 2e-3),
    "unet small": Training(300, 2e-3),
    "unet 7": Training(250, 2e-3),
    "seaformer": Training(400, 2e-3),
}


def run(settings: Iterable[Setting], folder: Path | None = None) -> list[Row]:
    """Rows of these settings in their order; those that are not there yet are measured first."""
    settings = list(settings)
    for setting in settings:
        if setting not in {_setting(row) for row in there("runs", folder)}:
            add("runs", measured(setting), folder)
    return found(settings, folder)


def found(settings: Sequence[Setting], folder: Path | None = None) -> list[Row]:
    """Rows of those settings that have been measured."""
    rows = {_setting(row): row for row in there("runs", folder)}
    return [rows[setting] for setting in settings if setting in rows]


def _setting(row: Row) -> Setting:
    return Setting(**{field.name: row[field.name] for field in dataclasses.fields(Setting)})


def measured(setting: Setting) -> Row:
    """Prunes, trains, and judges on the validation and the test split against the dense network it came from."""
    network = NETWORKS[setting.network]
    task = work(network.task)
    start = time.process_time()
    model, plan, facts = pruned(setting)
    row: Row = dataclasses.asdict(setting) | {"seconds": round(time.process_time() - start)} | facts
    training = TRAINING[setting.network]
    row["training"] = {"steps": setting.steps or training.steps, "lr": training.lr}
    row |= sizes(network, model)
    before = dense_row(setting.network)
    row |= {f"dense_{key}": before[key] for key in ("macs", "parameters", "validation", "test")}
    for split in ("validation", "test"):
        rows = task.rows(model, split)
        row |= {split: task.summary(rows), f"{split}_rows": packed(rows)}
        row[f"{split}_points"] = paired(task, dense_rows(setting.network, split), rows)
        if rows.ndim == 3:
            row[f"{split}_ious"] = ious(rows).tolist()
    folder = cache() / "comb-pruned" / setting.name
    shutil.rmtree(folder, ignore_errors=True)
    fw.save(model, plan, folder)
    return row


def between(row: Row, other: Row) -> str:
    """The points that a run has more than another of the same network, with their paired interval."""
    task, n = work(NETWORKS[row["network"]].task), row["test_points"]["n"]
    return interval(paired(task, unpacked(other["test_rows"], n), unpacked(row["test_rows"], n)))


def beside(row: Row, **changes: Any) -> list[Row]:
    """The run that differs from this one in nothing but `changes`, where it has been measured."""
    return found([dataclasses.replace(_setting(row), **changes)])


def dense_row(name: str) -> Row:
    """The row of `benchmarks.comb.train`, which is measured if it is not there."""
    from benchmarks.comb.train import measured as measured_dense

    rows = {row["network"]: row for row in there("dense")}
    if name not in rows:
        rows[name] = measured_dense(NETWORKS[name])
        add("dense", rows[name])
    return rows[name]


def dense_rows(name: str, split: str) -> Rows:
    row = dense_row(name)
    return unpacked(row[f"{split}_rows"], row[f"{split}_n"])


def pruned(setting: Setting) -> tuple[nn.Module, fw.Plan, Row]:
    """The pruned network, what was cut, and facts about the pruning."""
    network, training = NETWORKS[setting.network], TRAINING[setting.network]
    steps = setting.steps or training.steps
    task = work(network.task)
    model = copy.deepcopy(dense(setting.network))
    teacher = dense(setting.network if setting.teacher == SELF else setting.teacher)
    hooks = [] if setting.keep == 1 else [pruning(setting, steps)]
    method = fw.Train(
        steps=steps, hooks=hooks, optimizer=_optimizer(setting), lr=training.lr, warmup=steps // 20, schedule="cosine",
        distill=distiller(setting.distill, setting.network, len(task.classes), teacher),
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    stage = fw.Stage(seed=setting.seed, report=events.append)
    plan = method(model, _task(task, model, steps, setting.seed), stage)
    rows = {name: len(p) for name, p in model.named_parameters() if p.ndim > 1}
    before = {name: len(p) for name, p in dense(setting.network).named_parameters() if p.ndim > 1}
    texts = [event["text"] for event in events if event["kind"] in ("message", "unmet")]
    return model.eval(), plan, {"kept": {name: [before[name], rows[name]] for name in rows}, "texts": texts}


def pruning(setting: Setting, steps: int) -> fw.GradualChannelPruning:
    """From the second to the sixth tenth of the steps, while the learning rate is still above a third of its peak."""
    task = work(NETWORKS[setting.network].task)
    batch = task.batch(0, setting.seed + 2)
    return fw.GradualChannelPruning(
        {setting.of: f"{100 * setting.keep:g} %"},
        importance=setting.importance,
        begin=steps // 10,
        end=6 * steps // 10,
        closure=lambda model: task.loss(model(batch[0]), batch),  # for curvature alone
    )


def _task(task: Work, model: nn.Module, steps: int, seed: int) -> fw.Task:
    batches = task.batches(steps, seed + 1)  # other batches than those of dense training
    return fw.Task(model, (task.example,), train=batches, loss=task.loss, metric=task.metric)


def _optimizer(setting: Setting) -> Any:
    kind = NETWORKS[setting.network].optimizer
    lr, decay = TRAINING[setting.network].lr, DECAY[kind]
    if kind == "sgd":
        return lambda p: torch.optim.SGD(p, lr, 0.9, weight_decay=decay, nesterov=True)
    return lambda p: torch.optim.AdamW(p, lr, weight_decay=decay)


def command(experiment: str, settings: Sequence[Setting], doc: str | None) -> None:
    """The command line of an experiment that is a list of settings."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.comb.{experiment}", description=doc)
    parser.add_argument(
        "families", nargs="*", help="what names of networks begin with; default: all of the experiment's"
    )
    families = tuple(parser.parse_args().families) or ("",)
    torch.set_num_threads(1)
    run([setting for setting in settings if setting.network.startswith(families)])
