# SPDX-License-Identifier: Apache-2.0
"""Oracle: a list for each class, of which the last `size` items are kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.distill.queues import Queues

PUSHES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5), pushes=PUSHES)
def test_a_queue_is_the_end_of_a_list(size: int, pushes: list[tuple[int, int]]) -> None:
    queues, lists, value = Queues(3, size, 2), [[], [], []], 0.0
    for label, n in pushes:
        rows = [[value + i, -value - i] for i in range(n)]
        value += n
        lists[label] += rows
        queues.push(label, torch.tensor(rows).reshape(n, 2))
        for each, kept in enumerate(lists):
            assert queues.of(each).tolist() == kept[-size:]


@settings(max_examples=60, deadline=None)
@given(counts=st.tuples(*[st.integers(0, 12)] * 3), total=st.integers(1, 20))
def test_a_sample_is_of_what_is_there_with_as_many_of_each_class(counts: tuple[int, ...], total: int) -> None:
    queues = Queues(3, 8, 1)
    for label, n in enumerate(counts):
        queues.push(label, torch.arange(n).float()[:, None] + 100 * label)
    drawn = queues.sample(total).flatten().tolist()
    there = {value for label in range(3) for value in queues.of(label).flatten().tolist()}
    assert len(set(drawn)) == len(drawn), "drawn without replacement"
    assert set(drawn) <= there
    known = [min(n, 8) for n in counts if n]
    each = -(-total // max(1, len(known)))
    assert sorted(Counter(int(value) // 100 for value in drawn).values()) == sorted(min(n, each) for n in known)


def test_a_sample_is_drawn_anew_and_by_the_generator_that_checkpoints_hold() -> None:
    queues = Queues(1, 50, 1)
    queues.push(0, torch.arange(50.0)[:, None])
    state = torch.get_rng_state()
    first, second = queues.sample(10), queues.sample(10)
    torch.set_rng_state(state)
    assert torch.equal(queues.sample(10), first)
    assert not torch.equal(first, second)


def test_a_restored_queue_goes_on_where_it_was() -> None:
    first, again = Queues(2, 3, 1), Queues(2, 3, 1)
    for value in range(5):
        first.push(1, torch.tensor([[float(value)]]))
    again.load_state_dict(first.state_dict())
    for queues in (first, again):
        queues.push(1, torch.tensor([[9.0]]))
    assert again.of(1).flatten().tolist() == first.of(1).flatten().tolist() == [3.0, 4.0, 9.0]


def test_what_is_remembered_has_no_gradient_and_does_not_follow_its_source() -> None:
    queues = Queues(1, 2, 1)
    source = torch.ones(1, 1, requires_grad=True)
    queues.push(0, source)
    with torch.no_grad():
        source.fill_(5.0)
    assert queues.of(0).item() == 1.0
    assert not queues.of(0).requires_grad
    assert list(queues.parameters()) == []


@pytest.mark.parametrize("total", [1, 7])
def test_an_empty_memory_gives_nothing(total: int) -> None:
    assert Queues(2, 3, 4).sample(total).shape == (0, 4)
