# SPDX-License-Identifier: Apache-2.0
"""Heads switched off one at a time, against gates in the forward; heads cut physically out of attentions of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import NothingToCompress
from featherweight.graph import trace
from featherweight.prune.channels import head_tables
from featherweight.prune.channels.heads import only_best, without_each
from tests.prune.channels.models import Attention, Mlp, batch_of, built, loss_of


def evaluate(model: Any) -> float:
    batch = batch_of(Attention)
    return -float(loss_of(model(batch[0]), batch))


def with_gate(model: Attention, gate: list[float]) -> float:
    """The metric with a factor on each head's output, in the forward."""
    batch = batch_of(Attention)
    model.gates = {"heads": torch.tensor(gate, dtype=torch.float64)}
    with torch.no_grad():
        found = -float(loss_of(model(batch[0]), batch))
    model.gates = {}
    return found


def test_the_two_tables_of_the_paper() -> None:
    model = built(Attention)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    tables = head_tables(model, trace(model, (batch_of(Attention)[0][:2],)), evaluate)
    assert model.training
    assert tables.metric == pytest.approx(with_gate(model, [1, 1, 1, 1]))
    for head, metric in enumerate(tables.without["q"]):
        assert metric == pytest.approx(with_gate(model, [float(h != head) for h in range(4)]))
    alone = [with_gate(model, [float(h == head) for h in range(4)]) for head in range(4)]
    best = max(range(4), key=lambda h: alone[h])
    assert tables.best == {"q": (best, pytest.approx(alone[best]))}
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert tables.to_dict()["without"]["q"] == tables.without["q"]


def test_the_best_head_by_scores_or_for_a_metric_that_is_to_fall() -> None:
    model = built(Attention)
    found = trace(model, (batch_of(Attention)[0][:2],))
    scored = only_best(model, found, evaluate, {"q": [0.0, 3.0, 1.0, 2.0]})
    assert scored == {"q": (1, pytest.approx(with_gate(model, [0, 1, 0, 0])))}
    alone = [-with_gate(model, [float(h == head) for h in range(4)]) for head in range(4)]
    lowest = only_best(model, found, lambda model: -evaluate(model), higher_is_better=False)
    assert lowest["q"][0] == min(range(4), key=lambda h: alone[h])


def test_weights_are_put_back_where_evaluation_fails() -> None:
    model = built(Attention)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fails(model: Any) -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        without_each(model, trace(model, (batch_of(Attention)[0][:2],)), fails)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_heads_is_told_so() -> None:
    with pytest.raises(NothingToCompress, match="No attention heads"):
        without_each(built(Mlp), trace(built(Mlp), (batch_of(Mlp)[0][:2],)), evaluate)


class Fused(nn.Module):
    """Attention with one projection for query, key and value, as timm has it, and its sizes as plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.embed, self.qkv, self.proj = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head((x + self.proj(y)).mean(1))


class Grouped(nn.Module):
    """Grouped-query attention: eight query heads on two key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.proj = nn.Linear(6, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(b, n, -1)
        return self.head((x + self.proj(y)).mean(1))


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize(("kind", "weight"), [(Fused, "proj"), (Grouped, "proj"), (Torchs, "attention.out")])
def test_whole_heads_go_by_michels_score(kind: type[nn.Module], weight: str) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    x, y = torch.randn(8, 5, 6), torch.randn(8, 3)
    found = trace(model, (x,))
    heads = [group for group in found.groups if group.kind == "heads"]
    assert [group.size for group in heads] == [2 if kind is Grouped else 4]
    columns = model.attention.out_proj.weight.shape[1] if kind is Torchs else model.proj.in_features
    task = fw.Task(model, (x,), train=[(x, y)], loss=lambda out, batch: (out - batch[1]).square().mean())
    working = kind()
    working.load_state_dict(model.state_dict())
    others = [group.name for group in found.groups if group.kind != "heads"]
    freeze = ["embed"] if others else []
    assert others
    method = fw.PruneChannels({"parameters": "1 %"}, importance="heads", keep=freeze, least=1)
    method(working, task, fw.Stage())
    assert working.get_submodule(weight).in_features == columns // heads[0].size
    assert torch.isfinite(working(x)).all()
    # The one that is left is the one that Michel's score ranks highest: the best of all gates' mean absolute gradients.
    name = "attention.out_proj.weight" if kind is Torchs else "proj.weight"
    parameter = model.get_parameter(name)
    torch.backends.mha.set_fastpath_enabled(False)
    totals = torch.zeros(heads[0].size)
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(task.loss(model(x[i : i + 1]), (x[i : i + 1], y[i : i + 1])), parameter)
        totals += (parameter * gradient).sum(0).view(heads[0].size, -1).sum(1).abs().detach()
    torch.backends.mha.set_fastpath_enabled(True)
    best = int(totals.argmax())
    span = columns // heads[0].size
    left = working.get_submodule(weight).weight
    assert torch.equal(left, parameter[:, best * span : (best + 1) * span])
