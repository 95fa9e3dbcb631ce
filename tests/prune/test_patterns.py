# SPDX-License-Identifier: Apache-2.0
"""Masks of whole layers against sorting in NumPy, for each pattern on each kind of layer that it fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.errors import NothingToCompress
from tests.prune.oracle import lowest_of_n_of_m, lowest_units, units

# Name, layer, its weight tensor, how the oracle reads it, conv groups.
LAYERS: dict[str, tuple[Any, str, str, int]] = {
    "linear": (lambda: nn.Linear(16, 12), "weight", "linear", 1),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), "weight", "conv", 1),
    "conv2d": (lambda: nn.Conv2d(8, 4, (3, 2)), "weight", "conv", 1),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), "weight", "conv", 1),
    "grouped": (lambda: nn.Conv2d(16, 8, 3, groups=4), "weight", "conv", 4),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), "weight", "conv", 6),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(8, 6, 3), "weight", "transposed conv", 1),
    "transposed 2-d grouped": (lambda: nn.ConvTranspose2d(16, 4, 3, groups=2), "weight", "transposed conv", 2),
    "transposed 3-d": (lambda: nn.ConvTranspose3d(4, 4, 2), "weight", "transposed conv", 1),
    "embedding": (lambda: nn.Embedding(10, 8), "weight", "linear", 1),
    "lstm": (lambda: nn.LSTM(8, 4), "weight_hh_l0", "linear", 1),
    "gru": (lambda: nn.GRU(8, 4), "weight_ih_l0", "linear", 1),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", "linear", 1),
}
FITS = [
    (name, pattern) for name in LAYERS for pattern in ("weight", "2:4", "1:4", "3:4", "1x4", "2x4", "row", "column")
]
FITS = [(n, p) for n, p in FITS if n != "depthwise" or p in ("weight", "row", "column")]


def prune(model: nn.Module, **options: Any) -> None:
    fw.Prune(dense=(), **options)(model, fw.Task(model, ()), fw.Stage())


@pytest.mark.parametrize(("name", "pattern"), FITS, ids=lambda value: value.replace(" ", "-"))
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_masks_are_what_sorting_gives(name: str, pattern: str, sparsity: float) -> None:
    make, leaf, kind, groups = LAYERS[name]
    layer = make()
    before = getattr(layer, leaf).detach().double().numpy().copy()
    members = units(pattern, kind, before.shape, groups)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        expected = lowest_of_n_of_m(abs(before), members, n, before.size // m * (m - n))
        prune(layer, pattern=pattern, layers=[leaf])
    else:
        expected = lowest_units(abs(before), members, round(sparsity * len(members)))
        prune(layer, pattern=pattern, layers=[leaf], sparsity=sparsity)
    after = getattr(layer, leaf).detach().double().numpy()
    assert np.array_equal(after == 0, expected)
    assert np.array_equal(after[~expected], before[~expected])


@pytest.mark.parametrize("pattern", ["1x4", "row", "column"])
def test_group_l2_ranks_by_the_root_of_summed_squares(pattern: str) -> None:
    layer = nn.Conv2d(16, 16, 3)
    layer.weight.data **= 3  # a few large weights in each unit, which squares favour
    before = layer.weight.detach().double().numpy().copy()
    members = units(pattern, "conv", before.shape)
    by_l2, by_l1 = (lowest_units(values, members, len(members) // 2) for values in (before**2, abs(before)))
    assert not np.array_equal(by_l2, by_l1), "the two rankings must differ for this test to see anything"
    prune(layer, pattern=pattern, sparsity=0.5, importance="group_l2")
    assert np.array_equal(layer.weight.detach().numpy() == 0, by_l2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["weight", "2:4", "1x4"])
def test_counts_are_exact_in_every_dtype_though_half_precision_is_full_of_ties(
    dtype: torch.dtype, pattern: str
) -> None:
    layer = nn.Linear(64, 64).to(dtype)
    before = layer.weight.detach().clone()
    prune(layer, pattern=pattern, sparsity=0.5)
    gone = layer.weight == 0
    assert int(gone.sum()) == 64 * 64 // 2
    assert torch.equal(layer.weight[~gone], before[~gone])
    if pattern == "weight":
        assert before[gone].abs().max() <= before[~gone].abs().min()


def test_equal_scores_go_in_order_of_position() -> None:
    layer = nn.Linear(4, 2)
    nn.init.ones_(layer.weight)
    prune(layer, sparsity=0.5)
    assert layer.weight.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("pattern", ["weight", "row", "column"])
def test_one_unit_always_stays(pattern: str) -> None:
    layer = nn.Linear(4, 5)
    prune(layer, pattern=pattern, sparsity=0.99)
    gone = layer.weight == 0
    assert not gone.all()
    assert int(gone.sum()) == {"weight": 19, "row": 16, "column": 15}[pattern]


@pytest.mark.parametrize(
    ("layer", "pattern", "reason"),
    [
        (nn.Linear(6, 8), "2:4", "6 input channels at one position, which do not divide into 2:4 groups of 4"),
        (nn.Conv2d(3, 8, 4), "2:4", "3 input channels"),  # 3 x 4 x 4 = 48 divides, but groups would straddle taps
        (nn.Conv2d(8, 8, 3, groups=8), "2:4", "1 input channel at one position"),
        (nn.Linear(8, 6), "4x1", "6 rows do not divide into 4x1 tiles"),
        (nn.Conv2d(8, 8, 3, groups=4), "4x1", "2 rows in each conv group do not divide"),
        (nn.Linear(8, 1), "row", "it is a single row, and one always stays"),
    ],
)
def test_what_does_not_divide_is_kept_with_the_reason(layer: nn.Module, pattern: str, reason: str) -> None:
    before = layer.weight.detach().clone()
    with pytest.raises(NothingToCompress, match=f"weight: .*{reason}"):
        prune(layer, pattern=pattern, sparsity=0.5)
    assert torch.equal(layer.weight, before)


def test_groups_that_had_more_zeros_keep_them_and_count_as_done() -> None:
    layer = nn.Linear(8, 1)
    layer.weight.data = torch.tensor([[0.0, 0.0, 0.0, 4.0, 1.0, 2.0, 3.0, 4.0]])
    prune(layer, pattern="2:4")
    assert layer.weight.tolist() == [[0, 0, 0, 4, 0, 0, 3, 4]]


def test_scattered_zeros_stay_and_tiles_come_on_top() -> None:
    layer = nn.Linear(8, 2, bias=False)
    layer.weight.data = torch.arange(1.0, 17.0).view(2, 8)
    layer.weight.data[1, 7] = 0
    prune(layer, pattern="1x4", sparsity=0.5)
    assert layer.weight.tolist() == [[0] * 8, [9, 10, 11, 12, 13, 14, 15, 0]]


@pytest.mark.parametrize(
    ("layer", "hint"),
    [
        (nn.Linear(8, 4), "nm:2:4:1"),
        (nn.Conv2d(8, 4, 3), "nm:2:4:1"),
        (nn.Conv2d(16, 4, 3, groups=2), "nm:2:4:1"),
        (nn.ConvTranspose2d(8, 4, 3), "nm:2:4:0"),
        (nn.ConvTranspose2d(8, 4, 3, groups=2), "nm:2:4:0"),
        (nn.Embedding(4, 8), "nm:2:4:1"),
    ],
)
def test_hints_name_the_axis_along_which_every_four_hold_two(layer: nn.Module, hint: str) -> None:
    plan = fw.Prune(pattern="2:4", dense=())(layer, fw.Task(layer, ()), fw.Stage())
    assert plan == fw.Plan(formats={"weight": hint})
    along = layer.weight.detach().movedim(int(hint[-1]), -1)
    assert ((along.reshape(-1, 4) != 0).sum(1) == 2).all()
