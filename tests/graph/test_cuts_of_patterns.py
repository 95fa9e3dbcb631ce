# SPDX-License-Identifier: Apache-2.0
"""Every group of every pattern is cut, and the answers are those of the uncut model with what is cut absent.

A cut that cannot be carried out (a size stands in the forward as a number) is refused, and the model is as it was;
`IN_CODE` says of which patterns that may happen. A wrong answer is never one of the ways to end.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from featherweight.edits import cut, replay
from featherweight.errors import EditError
from featherweight.graph import Coupling, Group, Trace
from tests.graph.absent import run, without
from tests.graph.patterns import PATTERNS, build
from tests.graph.test_trace_of_patterns import EVERY, traced

# Of these some group (or all) cannot be cut in place: its size is a number in the forward, or two share an attribute.
IN_CODE = {
    "attn_fused_per_head": "view(..., 3, 12)",
    "attn_fused_per_head dims": "view(..., 3, 12)",
    "attn_heads_fixed": "view(..., 3, -1)",
    "attn_scaled_by_size dims": "queries and values share head_dim",
    "attn_static_attrs dims": "queries and values share head_dim",
    "attn_width_of_the_input": "c // num_heads, of the input's width",
    "gather_roll": "indices in a buffer, and a roll by a number",
    "gru_cell": "new_zeros(..., 7)",
    "linear_attention": "view(..., 3, -1)",
    "linear_attention dims": "elu(0) + 1 is not 0, and no weight reads these channels",
    "lstm_projected": "torch's LSTM takes one projection's size for all",
    "parametrized_one_way": "nothing can be put behind a parametrization without right_inverse",
    "rotary dims": "view(..., 4)",
    "rotary_interleaved dims": "view(..., 4)",
    "spectral_norm": "vectors of the power iteration",
    "split_slice": "y[:, :4]",
    "view_static": "view(-1, 240)",
    "weight_slices": "w[:4]",
}


def gone(found: Trace, couplings: list[Coupling]) -> list[tuple[str, int, list[int]]]:
    """Where the couplings are made. Of a group whose statistics change also where it is read: they may be a weight's."""
    chosen: dict[str, list[int]] = {}
    for coupling in couplings:
        chosen.setdefault(coupling.group, []).append(coupling.index)
    return [
        (member.tensor, member.axis, member.positions[indices].reshape(-1).tolist())
        for name, indices in chosen.items()
        for member in found[name].members
        if member.role != "input" or found[name].statistics
    ]


def some(group: Group, share: float, seed: int = 0) -> list[Coupling]:
    """Drawn at random, at least one, never all."""
    count = min(max(1, round(share * group.size)), group.size - 1)
    return [group[int(i)] for i in np.random.default_rng(seed).permutation(group.size)[:count]]


def answers_as_if_absent(name: str, found: Trace, couplings: list[Coupling], model: torch.nn.Module) -> None:
    inputs = build(name)[1]
    expected = without(*build(name), gone(found, couplings))
    got = run(model, inputs)
    assert [a.shape for a in got] == [b.shape for b in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def cut_or_refused(name: str, grain: str, couplings: list[Coupling]) -> None:
    found = traced(name, grain)
    model, inputs = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        cut(model, couplings, trace=found, inputs=inputs)
    except EditError:
        assert f"{name} {grain}".removesuffix(" heads") in IN_CODE
        now = model.state_dict()
        assert list(now) == list(before) and all(torch.equal(now[key], before[key]) for key in before)
        for a, b in zip(run(model, inputs), run(*build(name)), strict=True):
            assert torch.equal(a, b)
    else:
        answers_as_if_absent(name, found, couplings, model)


@EVERY
@pytest.mark.parametrize("share", [0.0, 0.34], ids=["one coupling", "a third"])
def test_each_group_is_cut(name, grain, share):
    """Without looking for sizes in the code where the tensors say enough; and proved where they do not."""
    found = traced(name, grain)
    for group in found.groups:
        couplings = some(group, share, seed=1)
        if share and len(couplings) == 1:
            continue
        model = build(name)[0]
        try:
            cut(model, couplings, trace=found, verify=False)
            answers_as_if_absent(name, found, couplings, model)
        except (EditError, AssertionError, RuntimeError, IndexError):
            cut_or_refused(name, grain, couplings)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name not in IN_CODE])
def test_half_of_everything_is_cut_and_proved_and_a_plan_does_it_again(name):
    """Replayed on a fresh model, the plan gives the same tensors to the last bit."""
    found = traced(name)
    couplings = [coupling for group in found.groups for coupling in some(group, 0.5, seed=2)]
    if not couplings:
        pytest.skip("nothing can be cut")
    model, inputs = build(name)
    done = cut(model, couplings, trace=found, inputs=inputs)
    answers_as_if_absent(name, found, couplings, model)
    again = build(name)[0]
    replay(again, done.plan.edits)
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for a, b in zip(run(model, inputs), run(again, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["residual", "densecat", "chunk_c2f", "transformer_block", "lstm_residual", "gqa_expand"]
)
def test_a_second_cut_after_the_first_is_one_cut_of_both(name):
    found = traced(name)
    first = [coupling for group in found.groups for coupling in some(group, 0.0, seed=3)]
    taken = set(first)
    second = [next(c for c in group if c not in taken) for group in found.groups if group.size > 2]
    model, inputs = build(name)
    cut(model, first, trace=found, inputs=inputs, verify=False)
    after = cut_later(model, inputs, found, first, second)
    whole = build(name)[0]
    cut(whole, [*second, *first], trace=found, inputs=inputs, verify=False)
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), whole.state_dict().values(), strict=True))


def cut_later(model, inputs, found, first, second):
    """Cuts `second`, numbered as before the first cut, out of what it left."""
    from featherweight.graph import trace

    again, model = trace(model, inputs), copy.deepcopy(model)
    cut(model, [renumbered(c, found, again, first) for c in second], trace=again, inputs=inputs, verify=False)
    return model


def renumbered(coupling: Coupling, found: Trace, again: Trace, first: list[Coupling]) -> Coupling:
    """By the position on the group's first axis, less what was cut before it there."""
    member = found[coupling.group].members[0]
    position = member.positions[coupling.index][0]
    cut_before = [p for t, a, places in gone(found, first) if (t, a) == (member.tensor, member.axis) for p in places]
    place = position - sum(p < position for p in cut_before)
    for group in again.groups:
        for own in group.members:
            if (own.tensor, own.axis) == (member.tensor, member.axis) and (own.positions == place).any():
                return group[int(np.flatnonzero((own.positions == place).any(1))[0])]
    raise AssertionError(f"{coupling} is gone")
