# SPDX-License-Identifier: Apache-2.0
"""A layer in blocks: what stays zero, and that the whole is never worse than the simple method though blocks were."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from featherweight.layers import Problem, Statistics, collect, problems
from featherweight.reconstruct import wide
from featherweight.reconstruct.answer import Answer, Want
from featherweight.reconstruct.wide import solve_wide


def setting() -> tuple[nn.Module, nn.Module, Problem, list[Tensor]]:
    torch.manual_seed(0)
    mixing = torch.randn(48, 48)
    data = [torch.randn(64, 48) @ mixing for _ in range(3)]
    reference, model = (nn.Sequential(nn.Linear(48, 6)) for _ in range(2))
    model.load_state_dict(reference.state_dict())
    return model, reference, problems(model)[0][0], data


def run(want: Want, zeros: Tensor | None = None) -> tuple[Answer, Problem, Tensor]:
    model, reference, whole, data = setting()

    def look(blocks: Sequence[Problem]) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
        fit, held_out = (
            collect(model, blocks, part, lambda m, x: m(x), reference=reference) for part in (data[:2], data[2:])
        )
        return fit, held_out

    dense = whole.matrix()
    answer = solve_wide(whole, dense, 16, look, want, torch.zeros_like(dense).bool() if zeros is None else zeros)
    assert answer is not None
    assert torch.equal(whole.matrix(), dense), "the weights are as they were"
    return answer, whole, torch.cat(data[2:])


def test_the_loss_is_that_of_the_whole_layer_and_zeros_that_stand_stay() -> None:
    zeros = torch.zeros(6, 48, dtype=torch.bool)
    zeros[:, ::7] = True
    answer, whole, x = run(Want(sparsity=0.5), zeros)
    assert "3 blocks" in answer.solver
    assert not answer.weights[zeros].any()
    y = whole.matrix() @ x.T
    loss = float((y - answer.weights @ x.T).square().sum()) / len(x)
    assert answer.held_out == pytest.approx((loss, float(y.square().sum()) / len(x)), rel=1e-4)
    assert loss < 0.5 * answer.simple


def test_where_blocks_are_worse_together_the_simple_method_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(blocks: Sequence[Problem], *rest: object) -> list[Answer]:
        answers = sweep(blocks, *rest)  # type: ignore[arg-type]
        for block in blocks:
            block.write(-block.matrix())
        return answers

    sweep = wide._sweep
    monkeypatch.setattr(wide, "_sweep", spoilt)
    monkeypatch.setattr(wide, "_refit", lambda *rest: None)
    answer, whole, _ = run(Want(sparsity=0.5))
    assert answer.solver == "simple"
    assert answer.held_out is not None
    assert answer.held_out[0] == answer.simple
    kept = answer.weights != 0
    assert torch.equal(answer.weights[kept], whole.matrix()[kept])
