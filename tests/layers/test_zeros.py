# SPDX-License-Identifier: Apache-2.0
"""Held entries stay +0.0 to the last bit under every kind of optimizer, and the rest trains as if alone."""

import copy

import pytest
import torch
from torch import nn

from featherweight.layers import Zeros, existing_zeros, unwrap

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def is_positive_zero(values: torch.Tensor) -> bool:
    return bool((values.view(torch.int32) == 0).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_hold_and_the_rest_trains_as_if_alone(name: str) -> None:
    """Oracle: the same optimizer run on the free entries alone, as a vector of their own."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    target = torch.randn(5, 6)
    optimizer = OPTIMIZERS[name](layer.parameters())
    pruned = torch.rand(5, 6) < 0.5
    start = layer.weight.detach().clone()

    def run(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, goal: torch.Tensor, zeros: Zeros | None) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            ((parameter - goal) ** 3).abs().sum().backward()
            if zeros is not None:
                assert is_positive_zero(parameter.grad[pruned])
            optimizer.step()
            if zeros is not None:
                zeros.enforce()

    run(layer.weight, optimizer, target, None)  # momentum is there before anything is pruned
    zeros = Zeros(optimizer)
    zeros.hold(layer.weight, pruned)
    run(layer.weight, optimizer, target, zeros)
    assert is_positive_zero(layer.weight[pruned])
    for key, value in optimizer.state[layer.weight].items():
        if value.shape == pruned.shape and key not in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
            assert is_positive_zero(value[pruned])

    alone = nn.Parameter(start[~pruned].clone())
    optimizer = OPTIMIZERS[name]([alone])
    run(alone, optimizer, target[~pruned], None)
    run(alone, optimizer, target[~pruned], None)
    assert torch.allclose(layer.weight[~pruned], alone, rtol=1e-6, atol=1e-7)


def test_sparse_gradients_are_masked_too() -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    zeros = Zeros(optimizer)
    pruned = torch.zeros(6, 3, dtype=torch.bool)
    pruned[2, 1] = pruned[5] = True
    zeros.hold(embedding.weight, pruned)
    before = embedding.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.tensor([2, 2, 5])).sum().backward()
        optimizer.step()
        zeros.enforce()
    assert is_positive_zero(embedding.weight[pruned])
    assert embedding.weight[2, 0] != before[2, 0]
    assert torch.equal(embedding.weight[0], before[0])


def test_release_frees_and_copies_carry_no_hook() -> None:
    layer = nn.Linear(3, 3, bias=False)
    zeros = Zeros()
    zeros.hold(layer.weight, torch.ones(3, 3, dtype=torch.bool))
    twin = copy.deepcopy(layer)
    twin(torch.ones(1, 3)).sum().backward()
    assert twin.weight.grad.abs().min() > 0
    zeros.release()
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad.abs().min() > 0


def test_only_zeros_that_pruning_made_are_read_as_such() -> None:
    model = nn.ModuleDict(
        {
            "pruned": nn.Linear(4, 4),
            "adapter": nn.Linear(4, 4),
            "words": nn.Embedding(5, 3, padding_idx=0),
            "free": nn.Linear(4, 4),
        }
    )
    model["pruned"].weight.data[0] = 0
    model["adapter"].weight.data.zero_()
    assert [weight.name for weight, _ in existing_zeros(model)] == ["pruned.weight"]
    model["words"].weight.data[1, 2] = 0
    assert [weight.name for weight, _ in existing_zeros(model)] == ["pruned.weight", "words.weight"]


def test_unwrap_sees_through_compile() -> None:
    layer = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(torch.compile(layer))) is layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_zeros_are_exact_in_every_dtype_and_layout_whatever_stood_there(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """-1.5, NaN and infinity become +0.0; every other entry keeps its bits. Oracle: torch.where."""
    values = torch.randn(4, 6, 3, 3).to(dtype)
    values.view(-1)[:4] = torch.tensor([-1.5, torch.nan, torch.inf, -torch.inf]).to(dtype)
    pruned = torch.rand(4, 6, 3, 3) < 0.5
    pruned.view(-1)[:4] = True
    parameter = nn.Parameter(values.clone().to(memory_format=layout))
    zeros = Zeros()
    zeros.hold(parameter, pruned)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    expected = torch.where(pruned, torch.zeros((), dtype=dtype), values).view(bits)
    assert torch.equal(parameter.detach().contiguous().view(bits), expected)
    assert torch.equal(zeros.pruned(parameter), pruned)
    assert [(p is parameter, torch.equal(mask, pruned)) for p, mask in zeros] == [(True, True)]
    (parameter * torch.inf).sum().backward()  # gradients of infinity and, at the zeros, of NaN behind it
    assert (parameter.grad[pruned] == 0).all() and parameter.grad[~pruned].isinf().all()


def test_states_wider_than_their_parameter_are_held_too_and_second_moments_are_one() -> None:
    """Optimizers of their own keep float32 states of half-precision parameters. On a CPU the root of one is cheap."""
    parameter = nn.Parameter(torch.randn(6, 6).bfloat16())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    pruned = torch.rand(6, 6) < 0.5
    for dtype in (torch.float32, torch.bfloat16):
        optimizer.state[parameter] = {
            "exp_avg": torch.rand(6, 6).to(dtype) + 2,
            "exp_avg_sq": torch.rand(6, 6).to(dtype) + 2,
            "step": torch.tensor(3.0),
            "count": torch.full((6, 6), 7),
        }
        before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
        Zeros(optimizer).hold(parameter, pruned)
        state = optimizer.state[parameter]
        for name, value in (("exp_avg", 0.0), ("exp_avg_sq", 1.0)):
            assert (state[name][pruned] == value).all()
            assert torch.equal(state[name][~pruned], before[name][~pruned])
        assert state["step"] == 3 and (state["count"] == 7).all()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_that_carries_a_graph_keeps_it() -> None:
    """Oracle: d/dw of (2w · kept)² is 8w where kept."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    pruned = torch.tensor([False, True, False])
    zeros = Zeros()
    zeros.hold(parameter, pruned)
    parameter.square().sum().backward(create_graph=True)
    gradient, parameter.grad = parameter.grad, None
    assert gradient.tolist() == [2, 0, 6]
    assert torch.autograd.grad(gradient.square().sum(), parameter)[0].tolist() == [8, 0, 24]


def test_a_gradient_that_two_parameters_share_is_masked_for_one_alone() -> None:
    """The sum hands one and the same tensor to both."""
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    zeros = Zeros()
    zeros.hold(first, torch.tensor([True, False, False]))
    (first + second).sum().backward()
    (first + second).square().sum().backward()
    assert first.grad.tolist() == [0, 5, 5]
    assert second.grad.tolist() == [3, 5, 5]
