# SPDX-License-Identifier: Apache-2.0
"""A problem's matrix is rows and columns of the weight; writing it back touches those entries and no others, bit by bit."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from featherweight.errors import OptionError
from featherweight.layers import Problem, problems, split, to_matrix
from tests.layers.oracles import Conv1D
from tests.models import MODELS


def by_name(model: nn.Module) -> dict[str, Problem]:
    return {problem.name: problem for problem in problems(model)[0]}


def several(model: nn.Module) -> list[Problem]:
    """Every problem, and its blocks where it has any."""
    whole = problems(model)[0]
    return whole + [block for problem in whole if problem.run > 1 for block in split(problem, max(1, problem.d // 2))]


KINDS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(6, 5),
    lambda: Conv1D(5, 6),
    lambda: nn.Conv1d(6, 4, 3),
    lambda: nn.Conv2d(6, 4, (3, 2), groups=2),
    lambda: nn.Conv2d(4, 8, 3, groups=4),
    lambda: nn.Conv3d(3, 4, 2),
    lambda: nn.ConvTranspose1d(6, 4, 3, groups=2),
    lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
    lambda: nn.Embedding(7, 3),
    lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
    lambda: nn.GRUCell(3, 4),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    lambda: nn.Linear(6, 5).to(torch.bfloat16),
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: str(make()).partition("(")[0])
def test_writing_back_changes_its_own_entries_alone_and_to_the_last_bit(make: Callable[[], nn.Module]) -> None:
    model = make()
    for problem in several(model):
        parameter = problem.weight.parameter
        parameter.data.view(-1)[0] = float("nan")  # other entries are moved, never computed with
        before = parameter.detach().clone()
        matrix = problem.matrix()
        assert matrix.shape == (problem.height, problem.d)
        problem.write(matrix)
        assert torch.equal(parameter.detach().nan_to_num(9), before.nan_to_num(9))
        other = torch.randn(matrix.shape, dtype=torch.float64)
        problem.write(other)
        assert torch.equal(problem.matrix(), other.to(parameter.dtype))
        rest = problem.matrix(torch.arange(parameter.numel()).view(parameter.shape)).flatten()
        others = torch.ones(parameter.numel(), dtype=torch.bool)
        others[rest] = False
        kept, was = parameter.detach().flatten()[others], before.flatten()[others]
        assert torch.equal(kept.nan_to_num(9), was.nan_to_num(9))
        assert parameter is problem.weight.parameter and parameter.dtype == before.dtype
        parameter.data.nan_to_num_(1.0)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: str(make()).partition("(")[0])
def test_problems_cover_each_weight_once_and_blocks_each_problem_once(make: Callable[[], nn.Module]) -> None:
    model = make()
    found = problems(model)[0]
    entries: dict[str, list[int]] = {}
    for problem in found:
        number = torch.arange(problem.weight.parameter.numel()).view(problem.weight.parameter.shape)
        own = problem.matrix(number)
        entries.setdefault(problem.weight.name, []).extend(own.flatten().tolist())
        blocks = split(problem, max(1, problem.d // 3))
        assert all(block.d == problem.taps * block.run for block in blocks)
        assert sorted(torch.cat([b.matrix(number).flatten() for b in blocks]).tolist()) == sorted(
            own.flatten().tolist()
        )
    for problem in found:
        assert sorted(entries[problem.weight.name]) == list(range(problem.weight.parameter.numel()))


def test_a_matrix_is_a_copy_without_gradient() -> None:
    layer = nn.Linear(3, 2)
    [problem], _ = problems(layer)
    matrix = problem.matrix()
    assert not matrix.requires_grad
    matrix.zero_()
    assert bool((layer.weight != 0).all())
    assert layer.weight.requires_grad


def test_a_matrix_of_another_shape_is_refused() -> None:
    [problem], _ = problems(nn.Linear(3, 2))
    with pytest.raises(OptionError, match=r"weight is 2 x 3; got \(3, 2\)"):
        problem.write(torch.zeros(3, 2))


def test_names_parts_and_runs() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(8, 4, 3, groups=2),
            "attention": nn.MultiheadAttention(4, 2),
            "gpt": Conv1D(6, 4),
            "up": nn.ConvTranspose1d(6, 4, 3, groups=2),
        }
    )
    found = by_name(model)
    assert list(found) == [
        "conv.weight[0]",
        "conv.weight[1]",
        "attention.in_proj_weight[0]",
        "attention.in_proj_weight[1]",
        "attention.in_proj_weight[2]",
        "attention.out_proj.weight",
        "gpt.weight",
        "up.weight[0]",
        "up.weight[1]",
    ]
    assert [(p.height, p.d, p.run, p.part) for p in found.values()] == [
        *[(2, 36, 4, 0), (2, 36, 4, 1)],
        *[(4, 4, 4, part) for part in range(3)],
        (4, 4, 4, 0),
        (6, 4, 4, 0),
        *[(2, 9, 3, 0), (2, 9, 3, 1)],
    ]
    assert torch.equal(found["gpt.weight"].matrix(), model["gpt"].weight.T)


@pytest.mark.parametrize(
    ("channels", "most", "widths"),
    [
        (6, 36, [4, 2]),
        (6, 54, [6]),
        (6, 8, [1] * 6),
        (64, 9 * 40, [32, 32]),
        (40, 9 * 17, [16, 16, 8]),
        (40, 9 * 15, [15, 15, 10]),
    ],
)
def test_blocks_are_whole_channels_in_multiples_of_sixteen_where_they_can(
    channels: int, most: int, widths: list[int]
) -> None:
    [problem], _ = problems(nn.Conv2d(channels, 2, 3))
    blocks = split(problem, most)
    assert [block.run for block in blocks] == widths
    assert len({block.name for block in blocks}) == len(blocks)
    whole = problem.matrix().view(2, 9, channels)
    if len(blocks) > 1:
        for block in blocks:
            assert torch.equal(block.matrix(), whole[:, :, block.channels].reshape(2, -1))
    else:
        assert blocks == [problem]


def test_a_block_is_not_split_again_and_a_limit_is_positive() -> None:
    [problem], _ = problems(nn.Linear(8, 2))
    block = split(problem, 4)[0]
    assert split(block, 4) == [block]
    with pytest.raises(OptionError, match="a block already"):
        split(block, 2)
    with pytest.raises(OptionError, match="at least 1"):
        split(problem, 0)


def test_an_embedding_that_is_the_output_layer_too_is_solved_as_that() -> None:
    model = MODELS["tied"][0]()
    problem = by_name(model)["words.weight"]
    assert (problem.weight.kind, problem.weight.layer, problem.weight.module) == ("linear", "head", model.head)
    assert problem.weight.aliases == ("head.weight",)
    assert problem.weight.parameter is model.words.weight


class Casting(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class SamePadded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Asking(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return super().forward(x) * scale


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 3))


def hollow() -> nn.Module:
    layer = nn.Linear(3, 1)
    layer.weight = nn.Parameter(torch.empty(0, 3))
    return layer


class Upside(nn.Module):
    """A tied autoencoder: one tensor read along its rows on the way in and along its columns on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv1d(3, 5, 2)
        self.outside = nn.ConvTranspose1d(5, 3, 2)
        self.outside.weight = self.inside.weight


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (Bare(), "kernel", "bare parameter of Bare.*nn.Linear"),
        (nn.Sequential(nn.LazyLinear(3)), "0.weight", "call the model once"),
        (parametrizations.weight_norm(nn.Linear(3, 4)), "parametrizations.weight.original1", "remove_parametrizations"),
        (nn.EmbeddingBag(5, 3), "weight", "summed in bags"),
        (nn.Embedding(5, 3, max_norm=1.0), "weight", "max_norm rescales"),
        (Upside(), "inside.weight", "tied between a Conv1d and a ConvTranspose1d"),
        (Standardized(2, 3, 3), "weight", "Standardized has a forward of its own"),
        (SamePadded(2, 3, 3), "weight", "SamePadded has a forward of its own"),
        (Asking(2, 3), "weight", "Asking has a forward of its own"),
        (nn.Bilinear(2, 3, 4), "weight", "bare parameter of Bilinear"),
        (hollow(), "weight", "empty"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_left_alone_has_a_reason(model: nn.Module, name: str, reason: str) -> None:
    found, left = problems(model)
    assert found == []
    assert re.search(reason, left[name])


def test_a_subclass_that_answers_as_torch_does_is_solved() -> None:
    assert list(by_name(Casting(3, 2).to(torch.bfloat16))) == ["weight"]


def test_the_probe_of_a_subclass_leaves_no_trace() -> None:
    model, state = Standardized(2, 3, 3), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    problems(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_every_model_are_rows_of_its_weights(name: str) -> None:
    for problem in problems(MODELS[name][0]())[0]:
        whole = to_matrix(problem.weight, problem.weight.parameter.detach())
        assert torch.equal(problem.matrix(), whole[problem.rows])
