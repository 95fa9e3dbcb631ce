# SPDX-License-Identifier: Apache-2.0
"""Costs as arrays against the trace's own sums and against models built in the smaller size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.errors import OptionError
from featherweight.graph import trace
from featherweight.measure import count
from featherweight.prune.channels.costs import COSTS, cost_of
from featherweight.prune.channels.targets import Goal, check_until, goals_of, words
from tests.prune.channels.models import INPUTS, Attention, Cnn, Gated, Mlp, built


def narrow(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, a, 3), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3), nn.Flatten(), nn.Linear(4 * b, 2)
    )


@pytest.mark.parametrize("kept", [(8, 10), (5, 10), (8, 3), (2, 7)])
def test_costs_are_those_of_a_model_built_so_narrow(kept: tuple[int, int]) -> None:
    model, x = narrow(8, 10), torch.zeros(1, 3, 6, 6)
    found = trace(model, (x,))
    assert list(found.sizes) == ["0", "3"]
    small = narrow(*kept)
    counts = count(small, (x,))
    expected = {
        "macs": counts.macs,
        "parameters": counts.parameters,
        "bytes": sum(t.numel() * t.element_size() for t in small.state_dict().values()),
        "memory": 16 * kept[0] + 4 * kept[1] + 2,
    }
    for kind in COSTS:
        assert cost_of(found, kind, model).total(np.array(kept, dtype=float)) == expected[kind], kind


@pytest.mark.parametrize("kind", [Mlp, Cnn, Attention])
@pytest.mark.parametrize("cost", ["macs", "parameters", "memory"])
def test_what_a_cut_frees_is_the_difference_of_the_traces_sums(kind: type[Gated], cost: str) -> None:
    model = built(kind)
    found = trace(model, (torch.zeros(2, *INPUTS[kind], dtype=torch.float64),))
    arrays = cost_of(found, cost, model)
    sizes = found.sizes
    chance = np.random.default_rng(0)
    total = getattr(found, cost)
    for _ in range(10):
        kept = {name: int(chance.integers(1, size + 1)) for name, size in sizes.items()}
        going = np.array([int(chance.integers(1, count + 1)) for count in kept.values()])
        now = np.array(list(kept.values()), dtype=float)
        assert arrays.total(now) == total(kept)
        expected = [
            total(kept) - total(kept | {name: kept[name] - int(n)}) for name, n in zip(sizes, going, strict=True)
        ]
        np.testing.assert_allclose(arrays.freed(now, going), expected)


def test_what_a_groups_layers_still_take() -> None:
    """Per channel batch x height x width, times the channels that are left (Comb, Prune, Distill)."""
    model = narrow(8, 10)
    found = trace(model, (torch.zeros(2, 3, 6, 6),))
    assert cost_of(found, "memory", model).left(np.array([6.0, 10.0])).tolist() == [2 * 16 * 6, 2 * 4 * 10]


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ({"macs": "25 %"}, Goal("macs", 250.0, 1000.0)),
        ({"macs": 300}, Goal("macs", 300.0, 1000.0)),
        ({"macs": "0.3k"}, Goal("macs", 300.0, 1000.0)),
        ({"parameters": "1.5 M"}, Goal("parameters", 1.5e6, 1000.0)),
        ({"bytes": "2 kB"}, Goal("bytes", 2000.0, 1000.0)),
        ({"bytes": 12}, Goal("bytes", 12.0, 1000.0)),
        ({"memory": "50%"}, Goal("memory", 500.0, 1000.0)),
        ({"latency": "8 ms"}, Goal("latency", 8.0, 1000.0)),
        ({"latency": "0.5 s"}, Goal("latency", 500.0, 1000.0)),
        ({"latency": 8}, Goal("latency", 8.0, 1000.0)),
    ],
)
def test_targets_are_amounts_or_shares_kept(until: dict[str, str | float], expected: Goal) -> None:
    kind = next(iter(until))
    assert goals_of("here", until, {kind: 1000.0}) == (expected,)


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ({}, "until says what to come down to"),
        ("50 %", "until says what to come down to"),
        ({"flops": "50 %"}, "'flops', which is none of .* Nearest: "),
        ({"macs": "half"}, "until macs='half' is neither"),
        ({"macs": "0 %"}, "until macs='0 %' is neither"),
        ({"macs": "101 %"}, "until macs='101 %' is neither"),
        ({"macs": -3}, "until macs=-3 is neither"),
        ({"macs": True}, "until macs=True is neither"),
        ({"latency": "8"}, "until latency='8' is neither"),
        ({"latency": "8 GB"}, "until latency='8 GB' is neither"),
        ({"bytes": "8 ms"}, "until bytes '8 ms' is not a number of bytes"),
        ({"bytes": 1.5}, "bytes"),
    ],
)
def test_what_is_no_target_is_refused(until: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_until("here", until)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [("macs", 2.5e9, "2.5G MACs"), ("memory", 12, "12 elements of memory"), ("bytes", 1500, "1.5k bytes")],
)
def test_amounts_in_words(kind: str, value: float, expected: str) -> None:
    assert words(kind, value) == expected


def test_part_way() -> None:
    assert Goal("macs", 40.0, 100.0).part_way(0.5).limit == 70.0
