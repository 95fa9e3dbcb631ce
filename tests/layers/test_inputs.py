# SPDX-License-Identifier: Apache-2.0
"""Oracle: the layers themselves. The loss that H, T and energy stand for is computed by running the real module with other
weights and no bias, and compared with them in value, gradient and Hessian-vector product by autograd. Attention, which
hides what its output projection reads, is held against the textbook."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.layers import problems, split
from tests.layers.oracles import (
    Attend,
    Conv1D,
    answers,
    arguments,
    assert_same_loss,
    case,
    context_of,
    front_and,
    gather,
    gram,
    loss_of,
    perturbed,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


LAYERS = [
    case(nn.Linear, 4, 3),
    case(nn.Linear, 4, 3, bias=False),
    case(Conv1D, 3, 4),
    case(nn.Conv1d, 4, 6, 3),
    case(nn.Conv1d, 4, 6, 3, stride=2, padding=2, dilation=2),
    case(nn.Conv1d, 4, 6, 3, padding="same", dilation=3, bias=False),
    case(nn.Conv1d, 4, 6, 3, padding="valid"),
    case(nn.Conv1d, 4, 8, 3, groups=4, padding=1, padding_mode="circular"),
    case(nn.Conv2d, 4, 6, 1),
    case(nn.Conv2d, 4, 6, 3, padding=1),
    case(nn.Conv2d, 4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    case(nn.Conv2d, 4, 6, (4, 3), padding="same", dilation=(2, 2)),
    case(nn.Conv2d, 4, 6, (4, 2), padding="same", padding_mode="reflect"),
    case(nn.Conv2d, 4, 6, (2, 4), padding="same", padding_mode="circular"),
    case(nn.Conv2d, 4, 6, 3, padding=(2, 1), padding_mode="replicate", stride=2),
    case(nn.Conv2d, 4, 6, 3, groups=2, padding=1),
    case(nn.Conv2d, 4, 4, 3, groups=4, stride=2),
    case(nn.Conv2d, 4, 8, (1, 3), groups=4),
    case(nn.Conv3d, 4, 2, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1)),
    case(nn.Conv3d, 4, 4, 2, groups=2, padding="same", padding_mode="circular"),
    case(nn.ConvTranspose1d, 4, 6, 3),
    case(nn.ConvTranspose1d, 4, 6, 4, stride=3, padding=2, output_padding=2, dilation=2),
    case(nn.ConvTranspose2d, 4, 6, 2, stride=2),
    case(nn.ConvTranspose2d, 4, 6, (3, 2), stride=(2, 3), padding=(2, 1), output_padding=(1, 0), bias=False),
    case(nn.ConvTranspose2d, 4, 6, 3, groups=2, padding=2),
    case(nn.ConvTranspose2d, 4, 4, 3, groups=4, stride=2, output_padding=1),
    case(nn.ConvTranspose3d, 4, 2, 2, stride=2, dilation=(1, 2, 1)),
]


@pytest.mark.parametrize("make", LAYERS)
def test_statistics_are_the_loss_of_the_real_module(make: Callable[[], nn.Module]) -> None:
    model, batches = front_and(make())
    reference = perturbed(model)
    found = gather(model, batches, reference=reference)
    here, there = arguments(model, model[2], batches), arguments(reference, reference[2], batches)
    own = [problem for problem in problems(model)[0] if problem.weight.layer == "2"]
    assert len(own) == getattr(model[2], "groups", 1)
    for problem in own:
        one = found[problem.name]
        assert one.samples == 5 and one.unpaired == 0 and one.scale is None
        loss = loss_of(problem, model[2], reference[2], here, there)
        assert_same_loss(loss, one, torch.randn(problem.height, problem.d, dtype=torch.float64))
        assert one.tokens == sum(len(answers(model[2], model[2].weight, x)) for x in here)


@pytest.mark.parametrize("make", LAYERS)
def test_a_block_answers_to_what_the_other_channels_leave(make: Callable[[], nn.Module]) -> None:
    model, batches = front_and(make())
    reference = perturbed(model)
    here, there = arguments(model, model[2], batches), arguments(reference, reference[2], batches)
    own = [problem for problem in problems(model)[0] if problem.weight.layer == "2"]
    blocks = [block for problem in own for block in split(problem, max(1, problem.d * 2 // 3))]
    found = gather(model, batches, reference=reference, only=blocks)
    alone = gather(model, batches, only=blocks)
    for block in blocks:
        loss = loss_of(block, model[2], reference[2], here, there)
        assert_same_loss(loss, found[block.name], torch.randn(block.height, block.d, dtype=torch.float64))
        assert alone[block.name].T is None and alone[block.name].energy == 0
        torch.testing.assert_close(alone[block.name].H, found[block.name].H, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose1d(4, 2, 3, stride=2)])
def test_inputs_without_a_batch_axis_are_one_sample_wide(layer: nn.Module) -> None:
    layer = layer.double()
    x = torch.randn(4, *(6, 5)[: len(layer.kernel_size)], dtype=torch.float64)
    found, with_batch = gather(layer, [x])["weight"], gather(layer, [x[None]])["weight"]
    assert torch.equal(found.H, with_batch.H)
    assert found.tokens == with_batch.tokens


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}], ids=str)
def test_attention_s_projections_and_context(batch_first: bool, need_weights: bool, options: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, dropout=0.5, **options).double()
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    model = Attend(module, attn_mask=causal, need_weights=need_weights)
    q = torch.randn(3, 4, 8, dtype=torch.float64)
    k, v = torch.randn(3, 4, module.kdim, dtype=torch.float64), torch.randn(3, 4, module.vdim, dtype=torch.float64)
    padded = torch.tensor([[False] * 4, [False, False, False, True], [False, False, True, True]])
    given = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    context = context_of(module, q, k, v, causal | padded[:, None]).detach()
    expected = module.out_proj(context).detach()
    out = model.eval()(*given, padded)
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected)
    found = gather(model.train(), [(*given, padded, "target")])
    inputs = {"attention.out_proj.weight": context}
    if module.in_proj_weight is not None:
        inputs |= {f"attention.in_proj_weight[{i}]": x for i, x in enumerate((q, k, v))}
    else:
        inputs |= {f"attention.{letter}_proj_weight": x for letter, x in zip("qkv", (q, k, v), strict=True)}
    assert sorted(found) == sorted(inputs)
    for name, X in inputs.items():
        torch.testing.assert_close(found[name].H, gram(X.flatten(0, 1)))


def test_self_attention_shares_one_hessian_and_targets_go_to_their_rows() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    reference = perturbed(model)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = gather(model, [x], reference=reference)
    parts = [found[f"self_attn.in_proj_weight[{part}]"] for part in range(3)]
    assert parts[0].H is parts[1].H is parts[2].H
    X = x.flatten(0, 1)
    Y = X @ reference.self_attn.in_proj_weight.detach().T
    for part, one in enumerate(parts):
        rows = slice(part * 8, part * 8 + 8)
        torch.testing.assert_close(one.T, 2 * Y[:, rows].T @ X / len(X))
        assert one.energy == pytest.approx(2 * float(Y[:, rows].square().sum()) / len(X))
    assert {"linear1.weight", "linear2.weight"} < set(found)  # the fast path would have skipped their hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_embedding_s_loss_is_weighted_by_how_often_a_row_is_asked_for(dtype: torch.dtype) -> None:
    model = nn.Embedding(7, 3).to(dtype)
    batches = [torch.tensor([[0, 1, 1], [5, 5, 5]]), torch.tensor([[0, 6, 2]])]
    found = gather(model, batches)["weight"]
    V = torch.randn(7, 3, dtype=dtype)
    changes = torch.cat([F.embedding(batch, model.weight.detach()) - F.embedding(batch, V) for batch in batches])
    loss = changes.double().square().sum() / 9
    scaled = found.scale[:, None] * (model.weight.detach() - V).double()
    torch.testing.assert_close(((scaled @ found.H) * scaled).sum() / 2, loss)
    assert (found.scale == 0).tolist() == [False, False, False, True, True, False, False]
    assert found.T is None and (found.samples, found.tokens) == (3, 9)
