# SPDX-License-Identifier: Apache-2.0
"""Every method on every kind of model. The registry drives it: a method without an example here is a failure.

Each pair must: run forward, leave the task's model untouched, keep zeros that were there, save and load to the last
bit, and export to ONNX with the same answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.deploy import export_onnx, parity
from featherweight.errors import FeatherweightError, OptionError
from featherweight.recipe import methods
from featherweight.run import _check_kept, _invariants
from tests.models import MODELS

GRADUAL = fw.GradualPruning(sparsity=0.5, begin=0, end=3, every=1, dense=())
CHANNELS = fw.GradualChannelPruning({"parameters": "70 %"}, end=3, every=1)
EXAMPLES: dict[str, Callable[[nn.Module], Any]] = {
    "apply": lambda model: fw.Apply([fw.FakeQuant("head", bits=8, symmetric=True)]),
    "cluster": lambda model: fw.Cluster(8, importance="hessian", rate=0.01, samples=12),
    "factorize": lambda model: fw.Factorize(rank=2, layers=["mix" if hasattr(model, "words") else "head"]),
    "gradual_pruning": lambda model: fw.Train(steps=5, hooks=[GRADUAL]),
    "iterative": lambda model: fw.Iterative([fw.Prune(0.3, of="remaining", dense=())], {"sparsity": 0.2}, rounds=3),
    "mixed_quantize": lambda model: fw.MixedQuantize(4, bits=(8, 4, 2)),
    "qat": lambda model: fw.Train(steps=4, lr=0.01, hooks=[fw.QAT(4)]),
    "quantize": lambda model: fw.Quantize(8, activations="static", samples=12),
    "reconstruct": lambda model: fw.Reconstruct(0.5, samples=12),
    "prune": lambda model: fw.Prune(0.5, importance="gradient", dense=()),
    "train": lambda model: fw.Train(steps=3, optimizer="sgd", lr=0.01),
    "tune_centroids": lambda model: tuned(model),
    "prune_channels": lambda model: fw.PruneChannels({"parameters": "70 %"}, importance="taylor", batch_norm=False),
    "gradual_channel_pruning": lambda model: fw.Train(steps=5, hooks=[CHANNELS]),
    "drop_blocks": lambda model: (
        fw.DropBlocks(1, layers=["block"]) if hasattr(model, "block") else pytest.skip("it has no block")
    ),
}


def tuned(model: nn.Module) -> fw.Train:
    """Clusters the model first, as the recipe of a user would: centroids are read from values."""
    fw.Cluster(4)(model, fw.Task(model, ()), fw.Stage())
    return fw.Train(steps=4, lr=0.01, hooks=[fw.TuneCentroids()])


SPARSE = ("gradual_pruning", "iterative", "prune", "reconstruct")


def task_of(kind: str) -> fw.Task:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    model = make()
    data = [(*inputs(4), torch.randn(4, 12 if kind == "tied" else 6)) for _ in range(3)]
    return fw.Task(model, inputs(2), train=data, loss=lambda out, batch: (out - batch[-1]).square().mean())


def with_zeros(model: nn.Module) -> None:
    """A few zeros as an earlier stage would leave them, outside of `head`, which factorize may then split."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith(("head", "words", "mix")):
            parameter.data.view(-1)[::5] = 0.0


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_every_method_has_an_example() -> None:
    assert set(EXAMPLES) == set(methods()), "a new method needs a line in EXAMPLES"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", EXAMPLES)
def test_method(method: str, kind: str, tmp_path: Path) -> None:
    task = task_of(kind)
    with_zeros(task.model)
    reference = copy.deepcopy(task.model.state_dict())
    model = copy.deepcopy(task.model)
    kept = _invariants(model)
    plan = EXAMPLES[method](model)(model, task, fw.Stage())

    assert same(reference, task.model.state_dict()), "the task's model was changed"
    _check_kept(model, kept, method)
    model.eval()
    out = model(*task.example_inputs)
    assert torch.isfinite(out).all()
    if method in SPARSE:
        weights = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith("kernel")]
        share = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
        assert share >= 0.2
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "a hook was left behind"

    fw.save(model, plan, tmp_path / "run")
    again = fw.load(MODELS[kind][0](), tmp_path / "run").eval()
    assert same(model.state_dict(), again.state_dict())
    assert torch.equal(again(*task.example_inputs), out)

    export_onnx(model, task.example_inputs, tmp_path / "model.onnx")
    answer = parity(model, tmp_path / "model.onnx", [task.example_inputs, MODELS[kind][1](3)])
    assert answer.passed, answer.words


PAIRS = [
    ("prune", "train"),
    ("prune", "reconstruct"),
    ("reconstruct", "train"),
    ("reconstruct", "gradual_pruning"),
    ("factorize", "reconstruct"),
    ("apply", "reconstruct"),
    ("prune", "gradual_pruning"),
    ("gradual_pruning", "prune"),
    ("gradual_pruning", "iterative"),
    ("factorize", "gradual_pruning"),
    ("factorize", "prune"),
    ("apply", "gradual_pruning"),
    ("gradual_pruning", "apply"),
    ("iterative", "train"),
    ("prune", "prune_channels"),
    ("prune_channels", "gradual_pruning"),
    ("prune_channels", "reconstruct"),
    ("gradual_channel_pruning", "train"),
    ("gradual_pruning", "gradual_channel_pruning"),
    ("prune", "quantize"),
    ("reconstruct", "quantize"),
    ("prune_channels", "quantize"),
    ("factorize", "quantize"),
    ("quantize", "prune"),
    ("prune", "qat"),
    ("qat", "qat"),
    ("quantize", "qat"),
    ("qat", "quantize"),
    ("reconstruct", "qat"),
    ("prune", "cluster"),
    ("cluster", "tune_centroids"),
    ("iterative", "cluster"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("kind", ["mlp", "tied"])
def test_a_later_stage_keeps_what_an_earlier_one_made(first: str, second: str, kind: str) -> None:
    task = task_of(kind)
    recipe = [EXAMPLES[first](task.model), EXAMPLES[second](task.model)]
    result = fw.compress(task, recipe, progress=False)  # raises StageError where the second stage breaks the first
    names = list(result.scorecards)
    assert len(names) == 4
    if first in SPARSE:
        assert result.scorecards[names[2]].nonzeros <= result.scorecards[names[1]].nonzeros


@pytest.mark.parametrize("kind", ["mlp", "tied"])
def test_factorizing_what_is_sparse_is_refused(kind: str) -> None:
    task = task_of(kind)
    with pytest.raises(OptionError, match="sparse"):
        fw.compress(task, [fw.Prune(0.5, dense=()), EXAMPLES["factorize"](task.model)], progress=False)


@pytest.mark.parametrize(
    ("second", "message"),
    [("reconstruct", "lies on a grid of 8 bits"), ("factorize", "lies on a grid of 8 bits"), ("train", r"QAT\(")],
)
def test_what_would_leave_a_grid_is_refused(second: str, message: str) -> None:
    task = task_of("mlp")
    with pytest.raises(FeatherweightError, match=message):
        fw.compress(task, [fw.Quantize(8), EXAMPLES[second](task.model)], progress=False)


def test_factorizing_what_is_tied_is_refused() -> None:
    task = task_of("tied")
    with pytest.raises(OptionError, match=r"head\.weight is one tensor with words\.weight"):
        fw.Factorize(rank=2, layers=["head"])(copy.deepcopy(task.model), task, fw.Stage())
