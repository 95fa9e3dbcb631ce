# SPDX-License-Identifier: Apache-2.0
"""Properties of cuts, on networks and choices drawn at random: exact, in any order, in two steps or one, replayed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from featherweight.edits import cut, replay
from featherweight.graph import Coupling, Trace, trace
from tests.graph.absent import run, without
from tests.graph.random_graphs import Word, image_words, inputs, network, token_words
from tests.graph.test_cuts_of_patterns import gone, renumbered

QUICK = settings(
    max_examples=6, phases=[Phase.explicit, Phase.generate], deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
KINDS = pytest.mark.parametrize("images", [True, False], ids=["images", "tokens"])


def combed(words: list[Word], images: bool) -> Trace:
    found = trace(network(words, images), inputs(images))
    assume(found.groups)
    return found


def drawn(data: st.DataObject, found: Trace, least: int = 1, free: frozenset[Coupling] = frozenset()) -> list[Coupling]:
    """Some couplings, so that one of each group stays; not those of `free`, which are cut already."""
    chosen = []
    for group in found.groups:
        taken = sum(coupling in free for coupling in group)
        rest = [coupling for coupling in group if coupling not in free]
        chosen += data.draw(st.lists(st.sampled_from(rest), max_size=group.size - taken - 1, unique=True))
    assume(len(chosen) >= least)
    return chosen


def words_of(images: bool) -> st.SearchStrategy[list[Word]]:
    return image_words() if images else token_words()


def cut_out(words: list[Word], images: bool, found: Trace, couplings: list[Coupling]) -> tuple[nn.Module, tuple]:
    model = network(words, images)
    done = cut(model, couplings, trace=found, inputs=inputs(images), verify=False)
    return model, done.plan.edits


def same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@KINDS
@QUICK
@given(data=st.data())
def test_a_cut_answers_as_if_absent_and_is_replayed_and_counted(images, data):
    words = data.draw(words_of(images))
    found = combed(words, images)
    couplings = drawn(data, found)
    model, edits = cut_out(words, images, found, couplings)
    expected = without(network(words, images), inputs(images), gone(found, couplings))
    for a, b in zip(run(model, inputs(images)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
    again = network(words, images)
    replay(again, edits)
    same(again, model)
    kept = {group.name: group.size - sum(c.group == group.name for c in couplings) for group in found.groups}
    assert found.parameters(kept) == sum(parameter.numel() for parameter in model.parameters())


@KINDS
@QUICK
@given(data=st.data())
def test_the_order_is_nothing_and_two_cuts_are_one_of_both(images, data):
    words = data.draw(words_of(images))
    found = combed(words, images)
    first = drawn(data, found)
    second = drawn(data, found, free=frozenset(first))
    whole, _ = cut_out(words, images, found, data.draw(st.permutations([*first, *second])))
    model, _ = cut_out(words, images, found, first)
    later = trace(model, inputs(images))
    again = [renumbered(coupling, found, later, first) for coupling in second]
    cut(model, again, trace=later, inputs=inputs(images), verify=False)
    same(model, whole)
    left = {group.name: group.size - sum(c.group == group.name for c in first) for group in found.groups}
    assert found.macs(left) == later.macs()
