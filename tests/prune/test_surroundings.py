# SPDX-License-Identifier: Apache-2.0
"""Pruning where people train: compiled models, mixed precision, loss scalers, wrapped optimizers, several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import featherweight as fw
from tests.prune.two_processes import prune_on_rank


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)


def train(model: nn.Module, pruner: fw.Pruner, optimizer: Any, steps: int = 8, backward: Any = Tensor.backward) -> None:
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        backward(F.cross_entropy(model(x), y))
        optimizer.step()
        pruner.step()


GRADUAL = fw.GradualPruning(0.75, begin=1, end=6, every=2)


def test_a_compiled_model_is_pruned_as_the_plain_one_under_its_own_names() -> None:
    plain, inner = mlp(), mlp()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    train(plain, GRADUAL.attach(plain, optimizer), optimizer)

    compiled = torch.compile(inner, backend="aot_eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    pruner = GRADUAL.attach(compiled, optimizer, (batch(0)[0],))
    assert [line.name for line in pruner.selection] == ["0.weight", "2.weight", "4.weight"]
    train(compiled, pruner, optimizer)
    # The gradients are masked inside the compiled step too: nothing there moves before the zeros are put back.
    assert all((inner[i].weight.grad[inner[i].weight == 0] == 0).all() for i in (0, 2))
    for name, value in plain.state_dict().items():
        assert torch.equal(value == 0, inner.state_dict()[name] == 0)
        assert torch.allclose(value, inner.state_dict()[name], atol=1e-6)


def test_autocast_in_bf16_trains_and_holds() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    pruner = GRADUAL.attach(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, pruner, optimizer)
    assert [int((model[i].weight == 0).sum()) for i in (0, 2)] == [96, 192]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_hold_with_their_states(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = fw.GradualPruning(0.75, end=2, every=1, importance="gradient").attach(model, optimizer)
    for step in range(5):
        optimizer.zero_grad()
        model(batch(step)[0].to(dtype)).float().square().sum().backward()
        optimizer.step()
        pruner.step()
    gone = model[2].weight == 0
    assert int(gone.sum()) == 192
    assert (optimizer.state[model[2].weight]["momentum_buffer"][gone] == 0).all()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_loss_scaler_changes_no_score(fused: bool) -> None:
    """The scale grows in between, so that scaled gradients would weigh the later steps more. Powers of two are exact."""
    options = fw.GradualPruning(0.5, begin=0, end=4, every=4, importance="gradient", schedule="linear", dense=())

    def scores(scaler: torch.amp.GradScaler | None) -> dict[str, Tensor]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        pruner = options.attach(model, optimizer)
        for step in range(4):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            pruner.step()
        gathered: dict[str, Tensor] = pruner.state_dict()["gathered"]
        return gathered

    plain = scores(None)
    scaled = scores(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, growth_factor=4.0))
    for name, total in plain.items():
        assert total.max() > 0
        assert torch.allclose(scaled[name], total, rtol=1e-5), name


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_an_update_waits_for_the_first_step_that_the_scaler_does_not_skip(fused: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    options = fw.GradualPruning(0.5, end=0, importance="gradient", dense=())
    pruner = options.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    updated = []
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) * 8).backward()
        scaler.step(optimizer)
        scaler.update()
        updated.append(pruner.step()["updated"])
        if step == 0:
            state = pruner.state_dict()
            pruner.finalize()
            pruner = options.attach(model, optimizer)
            pruner.load_state_dict(state)  # the wait is remembered
    assert updated == [False, True, False]
    assert int((model[2].weight == 0).sum()) == 128


def test_the_optimizer_inside_accelerates_wrapper_is_found() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = mlp()
    wrapped = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    pruner = fw.GradualPruning(0.75, end=6, every=2, importance="movement").attach(model, wrapped)
    train(model, pruner, wrapped)
    gone = model[2].weight == 0
    assert int(gone.sum()) == 192
    assert (wrapped.optimizer.state[model[2].weight]["momentum_buffer"][gone] == 0).all()


def test_two_processes_hold_the_same_masks_though_their_scores_differ(tmp_path: Path) -> None:
    # A server that has imported everything forks both: half the imports, and none of this process's threads.
    mp.get_context("forkserver").set_forkserver_preload(["tests.prune.two_processes"])
    mp.start_processes(prune_on_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    gone = first["2.weight"] == 0
    assert int(gone.sum()) == 192
    gradient = first["2.weight.grad"]  # shared between the two as it was masked
    assert (gradient[gone] == 0).all() and not (gradient[~gone] == 0).all()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
