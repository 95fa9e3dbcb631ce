# SPDX-License-Identifier: Apache-2.0
"""What a trace finds in each pattern, against what reading its forward says."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from featherweight.graph import Group, Trace, trace
from tests.graph.absent import without
from tests.graph.patterns import PATTERNS, build

GRAINS = [
    (name, grain)
    for name, one in PATTERNS.items()
    for grain in ("heads", "dims")
    if grain == "heads" or one.dims is not None
]
EVERY = pytest.mark.parametrize(("name", "grain"), GRAINS)


def traced(name: str, grain: str = "heads") -> Trace:
    """Once for all tests: torch.export is what takes their time."""
    return _traced(name, grain)


@functools.cache
def _traced(name: str, grain: str) -> Trace:
    model, inputs = build(name)
    return trace(model, inputs, grain=grain)


def made_by(group: Group) -> set[str]:
    """The tensors that make the axis or scale it, and the layers that these stand in."""
    tensors = {member.tensor for member in group.members if member.role != "input"}
    return tensors | {tensor.rpartition(".")[0] for tensor in tensors}


def wanted(name: str, grain: str) -> list[tuple[str, int]]:
    one = PATTERNS[name]
    groups = one.dims if grain == "dims" and one.dims is not None else one.groups
    return [(key, size) for key, sizes in groups.items() for size in ((sizes,) if isinstance(sizes, int) else sizes)]


def matched(found: Trace, name: str, grain: str) -> dict[tuple[str, int], Group | None]:
    """Each group that the pattern names, with the one that was found for it."""
    free, result = list(found.groups), {}
    for i, (key, size) in enumerate(wanted(name, grain)):
        fits = [g for g in free if set(key.split("+")) <= made_by(g) and g.size == size]
        result[key, i] = fits[0] if fits else None
        free = [g for g in free if not fits or g is not fits[0]]
    return result


def said(found: Trace) -> str:
    lines = [f"  {'+'.join(sorted(made_by(g)))}: {g.size} {g.statistics or ''}" for g in found.groups]
    lines += [
        f"  frozen {f.tensor} axis {f.axis}: {f.positions} by {f.op} ({f.reason}) at {f.source}" for f in found.frozen
    ]
    return "\n".join(["", *lines, *found.notes])


@EVERY
def test_the_groups_are_those_that_the_forward_says(name, grain):
    one, found = PATTERNS[name], traced(name, grain)
    pairs = matched(found, name, grain)
    missing = [key for (key, _), group in pairs.items() if group is None]
    surplus = {id(g) for g in found.groups} - {id(g) for g in pairs.values()}
    if not one.loose:
        assert not missing and not surplus, said(found)
    assert found.front == one.front, found.notes


@pytest.mark.parametrize("name", list(PATTERNS))
def test_norms_and_means_over_channels_are_told_and_no_others(name):
    one, found = PATTERNS[name], traced(name)
    for (key, _), group in matched(found, name, "heads").items():
        if group is not None:
            assert bool(group.statistics) == (key in one.norms), (key, group.statistics)


@pytest.mark.parametrize("name", [name for name, one in PATTERNS.items() if one.frozen])
def test_what_is_frozen_says_which_operation_did_it_and_where(name):
    found = traced(name)
    for tensor, words in PATTERNS[name].frozen.items():
        reasons = [f for f in found.frozen if f.tensor == tensor]
        assert any(re.search(words, f"{f.op} {f.reason}") for f in reasons), said(found)


@EVERY
def test_every_position_of_every_axis_is_in_one_place(name, grain):
    """In a coupling, or among the frozen: of weights nothing is forgotten, and nothing is cut by two couplings."""
    found = traced(name, grain)
    taken: dict[tuple[str, int], list[int]] = {}
    for group in found.groups:
        assert group.size > 1 and len(group.members) > 0
        for member in group.members:
            assert member.positions.shape[0] == group.size
            taken.setdefault((member.tensor, member.axis), []).extend(member.positions.reshape(-1).tolist())
    frozen = {(f.tensor, f.axis) for f in found.frozen}
    used = {name for name, _ in frozen | taken.keys()}
    for tensor, axis in [(used_name, i) for used_name in used for i in range(len(found.shapes[used_name]))]:
        positions, size = taken.get((tensor, axis), []), found.shapes[tensor][axis]
        assert len(set(positions)) == len(positions), (tensor, axis)
        assert set(positions) <= set(range(size))
        left = sum(f.positions for f in found.frozen if (f.tensor, f.axis) == (tensor, axis))
        assert len(positions) + left == size, (tensor, axis, said(found))


@pytest.mark.parametrize(
    ("name", "tensor", "roles"),
    [
        ("chain_flatten", "b.weight", ["output", "input"]),
        ("transposed", "up.weight", ["input", "output"]),
        ("depthwise", "norm.running_var", ["scale"]),
        ("matmul_of_parameters", "a", [None, "output"]),
        ("matmul_of_parameters", "b", ["input", "output"]),
        ("lstm_between_layers", "rnn.weight_hh_l0", ["output", "input"]),
        ("embeddings_summed", "words.weight", [None, "output"]),
        ("layerscale_param", "gamma", ["scale"]),
        ("attn_fused_qkv", "qkv.weight", ["output", None]),
        ("tied_embedding_projected", "back.weight", ["output", "input"]),
    ],
)
def test_an_axis_is_told_as_made_or_read_or_scaled(name, tensor, roles):
    members = [member for group in traced(name).groups for member in group.members if member.tensor == tensor]
    told = {member.axis: member.role for member in members}
    assert [told.get(axis) for axis in range(len(roles))] == roles


@pytest.mark.parametrize(
    "name", ["gather_roll", "pixel_unshuffle", "channel_shuffle", "patch_merging", "flatten_hwc", "cat_same_twice"]
)
def test_columns_that_go_are_those_that_read_absent_channels(name):
    """Where the makers are absent already, taking these columns as well changes nothing; with any other it would."""
    found = traced(name)
    for group, index in [(one, i) for one in found.groups for i in (0, one.size - 1)]:
        places = {
            reads: [
                (m.tensor, m.axis, m.positions[index].tolist()) for m in group.members if (m.role == "input") == reads
            ]
            for reads in (False, True)
        }
        once, twice = (without(*build(name), gone) for gone in (places[False], places[False] + places[True]))
        assert places[True] and all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
