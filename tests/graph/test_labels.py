# SPDX-License-Identifier: Apache-2.0
"""Classes of labels against a plain union-find over sets, and planes against what their definition says."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherweight.errors import GraphError
from featherweight.graph import trace
from featherweight.graph.labels import Labels, free_along, keep_axis, shrink, tidy, varies
from featherweight.graph.limit import limited

COUNT = 12
ids = st.integers(0, COUNT)
unions = st.lists(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), max_size=6)


def plain(steps: list[list[tuple[int, int]]]) -> tuple[list[set[int]], set[int]]:
    """The classes, and the labels that are frozen: those whose class ever met label 0."""
    classes = [{i} for i in range(1, COUNT + 1)]
    frozen: set[int] = set()
    for step in steps:
        for a, b in step:
            if a and b:
                one = next(c for c in classes if a in c)
                other = next(c for c in classes if b in c)
                if one is not other:
                    one |= other
                    classes.remove(other)
            elif a or b:
                frozen.add(a or b)
    return classes, {label for c in classes if c & frozen for label in c}


@settings(deadline=None, max_examples=300)
@given(unions)
def test_unions_give_the_classes_that_sets_give_and_freeze_whole_classes(steps):
    labels = Labels()
    labels.fresh(COUNT)
    for step in steps:
        pairs = torch.tensor(step)
        labels.unite(pairs[:, 0], pairs[:, 1])
    classes, frozen = plain(steps)
    every = torch.arange(1, COUNT + 1)
    roots = labels.roots(every).tolist()
    for c in classes:
        assert len({roots[i - 1] for i in c}) == 1
    assert len(set(roots)) == len(classes)
    assert {i for i, cls in zip(every.tolist(), labels.classes(every).tolist(), strict=True) if cls == 0} == frozen


def test_the_first_cause_of_a_freeze_is_the_one_that_is_told():
    labels = Labels()
    a, b = labels.fresh(2).split(1)
    labels.now = "early"
    labels.freeze(b, "because")
    labels.now = "late"
    labels.freeze(a, "otherwise")
    labels.unite(a, b)
    assert labels.cause(int(labels.roots(a)[0])) == ("early", "because")


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000))
def test_a_plane_brought_down_to_one_axis_varies_only_there_and_keeps_as_many_channels_as_was_said(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = Labels()
    labels.fresh(9)
    plane = torch.randint(0, 10, (3, 4), generator=generator)
    for axis in (0, 1):
        copy = Labels()
        copy.fresh(9)
        promised = free_along(copy, plane, axis)
        kept = keep_axis(copy, plane, axis)
        assert set(varies(copy, kept)) <= {axis}
        left = {int(c) for c in copy.classes(kept).reshape(-1)} - {0}
        assert len(left) == promised


def test_planes_are_stored_without_axes_on_which_they_do_not_vary():
    plane = torch.arange(1, 4).reshape(1, 3, 1).expand(5, 3, 2)
    assert shrink(plane).shape == (1, 3, 1)
    assert shrink(plane.contiguous()).shape == (1, 3, 1)
    labels = Labels()
    both = labels.fresh(6).reshape(2, 3)
    labels.unite(both[0], both[1])
    assert tidy(labels, both).shape == (1, 3)


def test_work_that_does_not_end_is_stopped_with_an_answer():
    def stubborn():
        with limited(0.05, "sleeping"):
            while True:
                try:
                    time.sleep(0.01)
                except Exception:  # what swallows exceptions must not swallow this one
                    continue

    start = time.monotonic()
    with pytest.raises(GraphError, match=r"sleeping took longer than the 0\.05 seconds"):
        stubborn()
    assert time.monotonic() - start < 5


def test_an_import_is_not_cut_in_half(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.3)\ndone = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def work():
        with limited(0.05, "importing"):
            import slow_to_import  # type: ignore[import-not-found]

            assert slow_to_import.done
            while True:
                time.sleep(0.01)

    with pytest.raises(GraphError):
        work()
    assert sys.modules.pop("slow_to_import").done


def test_a_trace_keeps_to_its_time():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            time.sleep(30)
            return self.layer(x)

    with pytest.raises(GraphError, match="tracing the model took longer"):
        trace(Slow(), (torch.zeros(1, 3),), seconds=0.5)


@pytest.mark.parametrize("depth", [4, 16])
def test_labels_stay_as_few_as_positions_of_weights(depth):
    """Cost grows with the weights' axes, not with what flows through."""
    from featherweight.graph.capture import capture
    from featherweight.graph.rules import RULES
    from featherweight.graph.walk import Walk

    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth)])
    walk = Walk(capture(model, (torch.zeros(2, 8, 32, 32),)), "heads", time.monotonic() + 60)
    walk.run(RULES)
    assert walk.labels.count == 1 + depth * (8 + 8 + 3 + 3 + 8)
    assert np.array_equal(np.unique(walk.labels.roots(torch.arange(1))), [0])


def test_rows_of_a_table_that_nothing_picks_are_no_group():
    """BEiT's position table keeps rows that its index may skip: no layer has them, so that cutting them means nothing."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("at", torch.tensor([0, 2, 1]))

        def forward(self, x):
            rows = torch.cat([self.table[:3], self.table[3:]])
            return self.head(self.layer(x) + rows[self.at])

    found = trace(Table(), (torch.randn(5, 3, 3),))
    assert [(group.name, group.size) for group in found.groups] == [("layer", 4)]
    assert {member.tensor for member in found["layer"].members} == {
        "layer.weight",
        "layer.bias",
        "table",
        "head.weight",
    }
    assert sum(f.positions for f in found.frozen if (f.tensor, f.axis) == ("table", 0)) == 6
