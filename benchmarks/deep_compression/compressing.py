# SPDX-License-Identifier: Apache-2.0
"""Prune, cluster, tune: one setting from the dense network to its artefact, with the dense network as teacher throughout."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import featherweight as fw
from benchmarks.deep_compression import data
from benchmarks.deep_compression.settings import Setting
from benchmarks.deep_compression.sizes import nncodec, sizes
from benchmarks.deep_compression.training import as_text, dense, right, task_of
from benchmarks.reconstruct.data import cache

TEACHER = fw.KL(temperature=2.0)


def compress(setting: Setting, seed: int, split: int, python: Path | None = None) -> dict[str, Any]:
    """One row of the results: every stage's accuracy, which test images are right before and after, and all sizes."""
    began = time.perf_counter()
    splits = data.load(split)
    teacher = dense(setting.network, seed, split)
    task = task_of(teacher, split)
    model = pruned(setting, seed, split, task)
    stages = {"dense": task.evaluate(teacher), "pruned": task.evaluate(model)}
    zeros = nn.utils.parameters_to_vector(model.parameters()) == 0
    before = copy.deepcopy(model)
    cluster = fw.Cluster(
        setting.clusters,
        start="exact",
        importance="hessian",
        rate=setting.rate,
        biases=setting.biases,
        coder="adaptive",
        samples=2000,
    )
    plan = cluster(model, task, fw.Stage(seed=seed))
    stages["clustered"] = task.evaluate(model)
    tune = fw.Train(steps=setting.tune_steps, lr=2e-4, distill=TEACHER, hooks=[fw.TuneCentroids()])
    plan += tune(model, task, fw.Stage(seed=seed))
    model.eval()
    stages["tuned"] = task.evaluate(model)
    row = dataclasses.asdict(setting) | {
        "split": split,
        "seed": seed,
        "accuracy": stages,
        "test": _tests(splits.test, teacher, model),
    }
    row["zeros"] = float((nn.utils.parameters_to_vector(model.parameters()) == 0).float().mean())
    row["pruned_zeros"] = float(zeros.float().mean())
    row["sizes"] = sizes(model, plan)
    row["pruned_sizes"] = sizes(before, fw.Plan())
    if python is not None:
        judge = _judge(model, task)
        row["nncodec"] = nncodec(python, model, judge, stages["tuned"])
        row["nncodec_of_pruned"] = nncodec(python, before, judge, stages["tuned"])
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def pruned(setting: Setting, seed: int, split: int, task: fw.Task) -> nn.Module:
    """The dense network after gradual pruning; kept in the folder of the data, since settings share it."""
    model = copy.deepcopy(task.model)
    shares = "-".join(f"{share:g}" for share in setting.sparsity.values())
    path = cache() / f"deep-compression-{split}-{setting.network}-{seed}-{shares}-{setting.prune_steps}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    steps = setting.prune_steps
    prune = fw.GradualPruning(setting.sparsity, end=6 * steps // 10, every=max(1, steps // 100), dense=())
    train = fw.Train(steps=steps, lr=2e-3, distill=TEACHER, hooks=[prune])
    train(model, task, fw.Stage(seed=seed))
    save_file(model.state_dict(), path)
    return model.eval()


def _tests(split: data.Split, teacher: nn.Module, model: nn.Module) -> dict[str, Any]:
    before, after = right(teacher, split), right(model, split)
    share = {"dense": before.float().mean().item(), "compressed": after.float().mean().item()}
    return share | {"right_dense": as_text(before), "right": as_text(after)}


def _judge(model: nn.Module, task: fw.Task) -> Callable[[dict[str, Tensor]], float]:
    twin = copy.deepcopy(model)

    def judge(tensors: dict[str, Tensor]) -> float:
        twin.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
        return task.evaluate(twin) if task.evaluate is not None else 0.0

    return judge
