# SPDX-License-Identifier: Apache-2.0
"""Entries are what the solvers give one by one, and come back from small integers to the last bit."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from featherweight.errors import OptionError
from featherweight.grids import fit_grid
from featherweight.patterns import parse_pattern
from featherweight.reconstruct.entries import Contents, Made, default_levels, entries_of, first_level, settled
from featherweight.solvers import damp, eliminate, layer_loss, prune, prune_and_quantize, quantize, refit, units_of
from tests.solvers.elsewhere import Elsewhere, Pretending
from tests.solvers.problems import layer

FEW = Contents(patterns=(), bits=(), joint=())


def levels(*patterns: str, at: tuple[float, ...] | None = (0.3, 0.5, 0.8, 0.95), **options: object) -> Contents:
    return dataclasses.replace(FEW, patterns=patterns, levels=at, **options)


def restored(made: Made, stored: dict[str, Tensor], shape: tuple[int, int], run: int, contents: Contents) -> Tensor:
    """The mask or the values that `settled` reads back."""
    found = settled(made.kind, made.bits, made.level, shape, run, contents, stored.__getitem__)
    if found.grid is not None and found.integers is not None:
        return found.grid.values(found.integers)
    assert found.pruned is not None
    return found.pruned


@pytest.mark.parametrize("pattern", ["weight", "1x4", "2x3", "column"])
def test_all_levels_of_one_elimination_are_what_a_run_for_each_gives(pattern: str) -> None:
    W, H, _ = layer(7, 24)
    made = list(entries_of(W, H, levels(pattern), run=12))
    assert [entry.asked for entry in made] == [0.3, 0.5, 0.8, 0.95]
    for entry in made:
        alone = prune(W, H, pattern, entry.asked, solver="exact_obs", run=12)
        assert torch.equal(entry.weights == 0, alone.pruned)
        assert torch.allclose(entry.weights, alone.weights, rtol=1e-10, atol=1e-12)
        assert layer_loss(W, entry.weights, H) == pytest.approx(alone.loss)
        assert restored(entry, dict(made[0].tensors), (7, 24), 12, levels(pattern)).equal(alone.pruned)


def test_levels_go_as_the_heap_takes_them_where_units_differ_in_size() -> None:
    W, H, _ = layer(5, 21)  # a last tile of one column, a last row group of one row
    units = units_of("2x4", 5, 21)
    found = eliminate(W, damp(H).inverse, units)
    zeros = list(range(0, 106, 5))
    first = first_level(found, zeros, rows=5)
    for level, count in enumerate(zeros):
        assert torch.equal(first <= level, found.chosen(found.counts(count, 5))), count


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8"])
def test_groups_keep_n_of_m_and_are_one_entry(pattern: str) -> None:
    W, H, _ = layer(5, 32)
    [made] = entries_of(W, H, levels(pattern), run=16)
    alone = prune(W, H, pattern, solver="exact_obs", run=16)
    assert made.asked is None and torch.equal(made.weights == 0, alone.pruned)
    assert torch.allclose(made.weights, alone.weights, rtol=1e-10, atol=1e-12)
    assert restored(made, dict(made.tensors), (5, 32), 16, levels(pattern)).equal(alone.pruned)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_come_back_to_the_last_bit(bits: int, chunk: int | None) -> None:
    W, H, _ = layer(6, 20)
    W = W.float()
    contents = dataclasses.replace(FEW, bits=(bits,), chunk=chunk)
    [made] = entries_of(W, H, contents)
    alone = quantize(W, H, contents.spec(bits))
    assert torch.equal(made.weights, alone.weights)
    assert restored(made, dict(made.tensors), (6, 20), 20, contents).float().equal(alone.weights)
    assert made.tensors["integers"].nbytes == -(-6 * 20 * bits // 8)


@pytest.mark.parametrize("joint", [("2:4", None, 4), ("weight", 0.6, 3), ("1x4", 0.5, 4)])
def test_joint_entries_have_the_zeros_and_the_grid(joint: tuple[str, float | None, int]) -> None:
    W, H, _ = layer(6, 16)
    W = W.float()
    contents = dataclasses.replace(FEW, joint=(joint,))
    [made] = entries_of(W, H, contents)
    pattern, sparsity, bits = joint
    alone = prune_and_quantize(W, H, contents.spec(bits), pattern, sparsity)
    assert torch.equal(made.weights, alone.weights) and bool((made.weights[alone.pruned] == 0).all())
    assert restored(made, dict(made.tensors), (6, 16), 16, contents).float().equal(alone.weights)
    assert made.kind == {"2:4": "2:4 + 4 bit", "weight": "weight 0.6 + 3 bit", "1x4": "1x4 0.5 + 4 bit"}[pattern]


def test_44_levels_of_single_weights_take_six_bits_a_weight() -> None:
    W, H, _ = layer(16, 64)
    made = list(entries_of(W.float(), H, levels("weight", at=None)))
    assert len(made) == 44 and round(made[-1].sparsity * 16 * 64) == round((1 - 0.9**44) * 16 * 64)
    assert sum(tensor.nbytes for entry in made for tensor in entry.tensors.values()) == 16 * 64 * 6 // 8
    tiles = list(entries_of(W.float(), H, levels("1x4", at=None)))
    assert len(tiles) == 29
    assert sum(tensor.nbytes for entry in tiles for tensor in entry.tensors.values()) == 16 * 16 * 5 // 8


def test_bytes_are_those_of_the_smallest_exact_form() -> None:
    W, H, _ = layer(32, 64)
    by_asked = {entry.asked: entry.bytes for entry in entries_of(W.float(), H, levels("weight", "2:4"))}
    n = 32 * 64
    assert by_asked[0.5] == n // 8 + 4 * n // 2  # a bit each, and four bytes for what is left
    assert by_asked[None] < by_asked[0.5]  # 2:4 has fewer masks to tell apart
    assert by_asked[0.95] < n // 8 + 4 * round(0.05 * n) + 4
    [joint] = entries_of(W.float(), H, dataclasses.replace(FEW, joint=(("weight", 0.9, 4),)))
    assert joint.bytes == n // 8 + -(-round(n * (1 - joint.sparsity)) * 4 // 8) + 32 * 5


@pytest.mark.parametrize("solver", ["admm", "best", "exact_obs"])
def test_levels_that_are_solved_one_by_one_are_masks_with_exact_refit(solver: str) -> None:
    W, H, _ = layer(6, 24)
    # exact_obs is asked for without the work to pay for it: each level then takes what its share affords.
    contents = levels("weight", "1x4", solver=solver, work=0.0 if solver == "exact_obs" else 1000.0)
    for entry in entries_of(W, H, contents):
        assert entry.level is None
        pruned = restored(entry, dict(entry.tensors), (6, 24), 24, contents)
        assert torch.equal(pruned, entry.weights == 0)
        assert torch.allclose(entry.weights, refit(W, H, pruned), rtol=1e-10, atol=1e-12)
        units = 6 * 24 // (1 if entry.kind == "weight" else 4)
        assert entry.tensors["mask"].nbytes == -(-units // 8)


def test_zeros_that_are_there_stay_in_every_entry() -> None:
    W, H, _ = layer(6, 24)
    W[torch.rand(6, 24, generator=torch.Generator().manual_seed(1)) < 0.4] = 0.0
    contents = Contents(patterns=("weight", "1x4", "2:4"), levels=(0.1, 0.7), bits=(3,))
    for entry in entries_of(W, H, contents):
        assert bool((entry.weights[W == 0] == 0).all()), entry.kind


def test_weights_of_dead_inputs_go_first_and_stay_as_they_are_till_then() -> None:
    W, H, _ = layer(4, 12)
    H[[2, 5]] = 0.0
    H[:, [2, 5]] = 0.0
    few, some = entries_of(W, H, levels("weight", at=(3 / 48, 0.5)))
    assert int((few.weights[:, [2, 5]] == 0).sum()) == 3
    kept = few.weights[:, [2, 5]] != 0
    assert torch.equal(few.weights[:, [2, 5]][kept], W[:, [2, 5]][kept])
    assert bool((some.weights[:, [2, 5]] == 0).all())


def test_a_judge_chooses_among_candidates() -> None:
    W, H, _ = layer(6, 16)
    nearest = fit_grid(W, FEW.spec(3)).nearest(W)
    contents = dataclasses.replace(FEW, bits=(3,))
    [made] = entries_of(W, H, contents, judge=lambda V: float((V - nearest).abs().sum()))
    assert torch.equal(made.weights, nearest)


def test_entries_are_made_on_the_device_that_the_layer_is_on() -> None:
    W, H, _ = layer(6, 24)
    contents = Contents(patterns=("weight", "1x4", "2:4", "column"), levels=(0.5, 0.8), bits=(3,))
    with Pretending():
        there = list(entries_of(Elsewhere(W.clone()), Elsewhere(H.clone()), contents, run=12))
    for away, home in zip(there, entries_of(W, H, contents, run=12), strict=True):
        assert isinstance(away.weights, Elsewhere)
        assert torch.allclose(away.weights.inner, home.weights, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(away.tensors[name], tensor) for name, tensor in home.tensors.items())


def test_default_levels_are_the_papers() -> None:
    weight, tile = (default_levels(parse_pattern(pattern)) for pattern in ("weight", "1x4"))
    assert weight[-1] == pytest.approx(0.99, abs=1e-3) and tile[-1] == pytest.approx(0.95, abs=5e-3)
    assert all((1 - b) / (1 - a) == pytest.approx(0.9) for a, b in itertools.pairwise(weight))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patterns": ("row",)}, "whole outputs"),
        ({"patterns": ("2-4",)}, "none of"),
        ({"levels": (0.5, 0.3)}, "ascending"),
        ({"levels": (0.0, 0.3)}, "above 0"),
        ({"levels": ()}, "ascending"),
        ({"solver": "magic"}, "none of"),
        ({"bits": (1,)}, "2 to 8"),
        ({"joint": (("2:4", 0.5, 4),)}, "takes None"),
        ({"joint": (("weight", None, 4),)}, "others a number"),
        ({"patterns": ("weight", "weight")}, "twice"),
    ],
)
def test_contents_that_cannot_be_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Contents(**fields)
