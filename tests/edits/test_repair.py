# SPDX-License-Identifier: Apache-2.0
"""Which numbers are tried, and in which order. The judge is a function of the attributes; no model needs to run.

Traces are written by hand: what a layer's operations show before and after.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from featherweight.edits.repair import Finding, candidates, choose
from featherweight.graph import Op, Size, Trace
from featherweight.plan import Attribute, Slice


class Layer(nn.Module):
    def __init__(self, heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.heads, self.width, self.sizes = heads, width, (width, 3)
        self.flag, self.rate, self.name = True, 4.0, "4"
        self.fc = nn.Linear(width, width)


class Stack(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.heads = 4
        self.layers = nn.ModuleList(Layer() for _ in range(n))


def model(n: int = 2) -> nn.Module:
    return Stack(n)


def traced(
    *ops: tuple[str, tuple[Size, ...]], sizes: dict[str, int], shapes: dict[str, tuple[int, ...]] | None = None
) -> Trace:
    made = tuple(Op(layer, "view", "", None, output) for layer, output in ops)
    trace = Trace((), (), made, 1.0, "export", (), shapes or {}, {})
    vars(trace)["sizes"] = sizes  # of groups that need no members here
    return trace


def view(layer: int, fixed: int = 2) -> tuple[str, tuple[Size, ...]]:
    group = f"g{layer}"
    return f"layers.{layer}", (Size(fixed), Size(0, {group: 1}), Size(0, {group: 4}))


SIZES = {"g0": 4, "g1": 4}


def judge(needed: set[Attribute], asked: list[tuple[Attribute, ...]]) -> Callable[[Sequence[Attribute]], Finding]:
    """Right when all that is needed is set, and nothing that harms."""

    def look(attributes: Sequence[Attribute]) -> Finding:
        asked.append(tuple(attributes))
        done = [edit for edit in sorted(needed, key=repr) if edit in attributes]
        missing = next((edit for edit in sorted(needed, key=repr) if edit not in attributes), None)
        return Finding(missing is None, len(done), missing.layer if missing else None)

    return look


def test_layers_of_a_class_are_decided_together_each_with_its_own_size() -> None:
    net = model()
    trace = traced(view(0), view(1), sizes=SIZES)
    offered = candidates(net, trace, {"g0": 3, "g1": 2}, ())
    near = {(one.kind, one.name, one.entry): dict(one.options) for one in offered if one.near}
    assert near == {
        ("Layer", "heads", None): {"layers.0": (3,), "layers.1": (2,)},
        ("Layer", "width", None): {"layers.0": (12,), "layers.1": (8,)},
        ("Layer", "sizes", 0): {"layers.0": (12,), "layers.1": (8,)},
    }
    needed = {Attribute("layers.0", "heads", 3), Attribute("layers.1", "heads", 2)}
    asked: list[tuple[Attribute, ...]] = []
    found = choose(net, offered, judge(needed, asked))
    assert set(found) == needed
    assert asked[0] == ()


def test_a_layer_that_loses_nothing_is_left_alone() -> None:
    offered = candidates(model(), traced(view(0), view(1), sizes=SIZES), {"g0": 3}, ())
    assert all(set(one.options) <= {"layers.0", ""} for one in offered)


def test_an_entry_is_set_and_the_others_stay() -> None:
    net = model(1)
    offered = candidates(net, traced(view(0), sizes=SIZES), {"g0": 2}, ())
    assert choose(net, offered, judge({Attribute("layers.0", "sizes", (8, 3))}, [])) == (
        Attribute("layers.0", "sizes", (8, 3)),
    )


def test_what_also_stays_is_changed_only_where_it_must_be() -> None:
    """A size of 4 stays in the same layer (a batch of four, say), so that `heads` may well be that one."""
    net = model(1)
    trace = traced(view(0, fixed=4), sizes=SIZES)
    offered = candidates(net, trace, {"g0": 2}, ())
    assert [one.stays for one in offered if one.name == "heads" and one.near] == [True]
    asked: list[tuple[Attribute, ...]] = []
    assert choose(net, offered, judge({Attribute("layers.0", "width", 8)}, asked)) == (
        Attribute("layers.0", "width", 8),
    )
    assert all(edit.name != "heads" for edit in asked[1])
    assert choose(net, offered, judge({Attribute("layers.0", "heads", 2)}, [])) == (Attribute("layers.0", "heads", 2),)


def test_a_number_around_the_layer_comes_after_its_own() -> None:
    net = model(1)
    offered = candidates(net, traced(view(0), sizes=SIZES), {"g0": 3}, ())
    assert [one.near for one in offered] == sorted([one.near for one in offered], reverse=True)
    needed = {Attribute("", "heads", 3), Attribute("layers.0", "heads", 3)}
    assert set(choose(net, offered, judge(needed, []))) == needed


def test_sizes_of_sliced_tensors_count_too() -> None:
    """Of a split, a trace tells only the first part's size."""
    net = model(1)
    trace = traced(sizes={}, shapes={"layers.0.fc.weight": (16, 16)})
    offered = candidates(net, trace, {}, (Slice("layers.0.fc.weight", 1, tuple(range(11))),))
    assert {(one.name, tuple(one.options.items())) for one in offered} == {
        ("width", (("layers.0", (11,)),)),
        ("sizes", (("layers.0", (11,)),)),
    }


def test_what_slices_set_and_what_is_no_size_is_never_tried() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.GroupNorm(4, 4), nn.LayerNorm(4), nn.Dropout(0.5))
    everywhere = [(str(i), (Size(0, {"g0": 1}),)) for i in range(5)]
    assert candidates(net, traced(*everywhere, sizes=SIZES), {"g0": 3}, ()) == []
    bare = nn.Sequential(
        nn.GroupNorm(4, 4, affine=False), nn.LayerNorm(4, elementwise_affine=False), nn.Unflatten(1, (4, 2))
    )
    names = {one.name for one in candidates(bare, traced(*everywhere[:3], sizes=SIZES), {"g0": 3}, ())}
    assert names == {"num_channels", "num_groups", "normalized_shape", "unflattened_size"}


def test_where_no_set_is_right_the_first_failure_is_told() -> None:
    net = model(2)
    offered = candidates(net, traced(view(0), view(1), sizes=SIZES), {"g0": 3, "g1": 3}, ())
    asked: list[tuple[Attribute, ...]] = []

    def never(attributes: Sequence[Attribute]) -> Finding:
        asked.append(tuple(attributes))
        return Finding(False, 7 if attributes else 5, "layers.0")

    assert choose(net, offered, never, trials=50) == Finding(False, 5, "layers.0")
    assert len(asked) <= 50


def test_numbers_of_subclasses_of_torchs_layers_are_told_from_sizes_that_slices_set() -> None:
    class Standardised(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)
            self.fan = 4

    net = nn.Sequential(Standardised())
    offered = candidates(net, traced(("0", (Size(0, {"g0": 1}),)), sizes=SIZES), {"g0": 3}, ())
    assert [one.name for one in offered] == ["fan"]
    assert torch.is_tensor(net[0].weight)
