# SPDX-License-Identifier: Apache-2.0
"""Profiles meet their budget on the whole model at the least loss, by brute force over hand-made databases."""

import itertools
from pathlib import Path

import pytest

from featherweight.errors import NothingToCompress, OptionError
from featherweight.reconstruct.database import Database, Entry, Layer
from featherweight.reconstruct.entries import Contents
from featherweight.reconstruct.profiles import Profile, global_loss, uniform, within, within_each

LEVELS = (0.25, 0.5, 0.75, 1.0)
CONTENTS = Contents(patterns=("weight", "2:4"), levels=LEVELS, bits=(4,), joint=())
# Name: rows, columns, MACs, and how the loss grows.
SHAPES = {"a.weight": (4, 8, 3200.0, 1.0), "b.weight": (8, 8, 640.0, 0.3), "c.weight": (2, 16, 3200.0, 4.0)}


def entries(name: str, rows: int, d: int, macs: float, scale: float) -> tuple[Entry, ...]:
    def entry(kind: str, asked: float | None, sparsity: float, bits: int | None, loss: float) -> Entry:
        size = round(rows * d * (bits or 32) * (1 - sparsity) / 8)
        held = 2.0 * loss if name != "c.weight" else 0.1 * loss
        return Entry(name, kind, asked, sparsity, bits, 7 * loss, loss, macs * (1 - sparsity), size, held_out=held)

    levels = [entry("weight", s, s, None, scale * s**2) for s in LEVELS]
    others = [entry("2:4", None, 0.5, None, scale * 0.4), entry("4 bit", None, 0.0, 4, scale * 0.01)]
    return (entry("dense", None, 0.0, None, 0.0), *levels, *others)


def database(macs: float = 8000.0, size: int = 1024) -> Database:
    """Three layers of 7040 MACs and 512 bytes, in a model of 8000 MACs and 1024 bytes."""
    layers = {
        name: Layer(name, name, rows, d, d, macs, 1.0, 10, 100, (), entries(name, rows, d, macs, scale))
        for name, (rows, d, macs, scale) in SHAPES.items()
    }
    return Database(Path("nowhere"), CONTENTS, layers, {}, macs, size, {"d.weight": "bare"}, {}, complete=True)


def best(cost: str, budget: float, kinds: tuple[str, ...], loss: str = "relative") -> float:
    """The least loss of all combinations whose own cost is within the budget."""
    allowed = [[e for e in entries(n, *s) if e.kind in ("dense", *kinds)] for n, s in SHAPES.items()]
    return min(
        sum(getattr(entry, loss) for entry in choice)
        for choice in itertools.product(*allowed)
        if sum(getattr(entry, cost) for entry in choice) <= budget + 1e-9
    )


@pytest.mark.parametrize("share", [0.9, 1 / 2, 1 / 3, 1 / 4, 0.12])
@pytest.mark.parametrize("kinds", [("weight",), ("weight", "2:4"), ("2:4", "4 bit")])
def test_a_share_of_macs_counts_layers_that_nobody_prunes(share: float, kinds: tuple[str, ...]) -> None:
    found = within(database(), share, kinds=kinds)
    rest = 8000.0 - 7040.0
    cost = sum(entry.macs for entry in found.choice.values()) + rest
    assert found.cost == pytest.approx(cost) and found.share == pytest.approx(cost / 8000)
    least = 0.5 * 7040 if "weight" not in kinds else 0.0
    assert found.feasible == (share * 8000 - rest >= least - 1e-9)
    if found.feasible:
        assert found.share <= share * (1 + 1e-9)
        assert found.loss == pytest.approx(best("macs", share * 8000 - rest, kinds)) and found.bound == found.loss
    else:
        assert found.share == pytest.approx((rest + least) / 8000) and "infeasible" in str(found)


def test_several_targets_list_those_that_cannot_be_met_with_the_least_that_can() -> None:
    # 960 of 8000 MACs are not in the database: 0.12 is the least share, with every layer gone.
    found = within_each(database(), (1 / 2, 0.12, 0.1, 0.0), kinds=("weight",))
    assert [profile.feasible for profile in found] == [True, True, False, False]
    assert [profile.asked for profile in found] == [1 / 2, 0.12, 0.1, 0.0]
    assert found[2].share == pytest.approx(0.12) and all(e.sparsity == 1.0 for e in found[2].choice.values())


@pytest.mark.parametrize(("cost", "total", "own"), [("bytes", 1024, 512), (lambda entry: entry.bytes + 1.0, 515, 515)])
def test_other_costs_have_their_own_total(cost: object, total: float, own: float) -> None:
    found = within(database(), 0.6, cost, kinds=("4 bit", "weight"))
    read = cost if callable(cost) else lambda entry: float(entry.bytes)
    spent = sum(read(entry) for entry in found.choice.values()) + total - own
    assert found.feasible and found.cost == pytest.approx(spent) and spent <= 0.6 * total
    assert any(entry.kind == "4 bit" for entry in found.choice.values())
    with_rest = within(database(), 0.6, cost, rest=100.0)
    assert with_rest.cost == pytest.approx(sum(read(e) for e in with_rest.choice.values()) + 100.0)


def test_losses_may_be_chosen_and_weighed() -> None:
    plain, outside = (
        within(database(), 0.6, kinds=("weight",)),
        within(database(), 0.6, kinds=("weight",), loss="held_out"),
    )
    assert outside.loss == pytest.approx(best("macs", 0.6 * 8000 - 960, ("weight",), "held_out"))
    assert outside.choice["c.weight"].sparsity > plain.choice["c.weight"].sparsity
    weighed = within(database(), 0.6, kinds=("weight",), sensitivity={"a.weight": 100.0})
    assert weighed.choice["a.weight"].sparsity < plain.choice["a.weight"].sparsity
    own = within(database(), 0.6, kinds=("weight",), loss=lambda entry: 7 * entry.relative)
    assert own.choice == within(database(), 0.6, kinds=("weight",), loss="loss").choice == plain.choice


def test_layers_that_are_not_named_stay_dense() -> None:
    found = within(database(), 0.7, kinds=("weight",), layers=("a", "b"))
    assert found.choice["c.weight"].kind == "dense" and found.share <= 0.7
    assert uniform(database(), "2:4", layers=("c",)).choice["a.weight"].kind == "dense"


@pytest.mark.parametrize("sparsity", [0.25, 0.4, 0.5, 0.75])
def test_global_loss_is_the_least_at_a_share_of_all_weights(sparsity: float) -> None:
    found = global_loss(database(), sparsity)
    sizes = {name: rows * d for name, (rows, d, _, _) in SHAPES.items()}
    zeros = sum(entry.sparsity * sizes[name] for name, entry in found.choice.items())
    assert zeros >= sparsity * 128 - 1e-9 and found.share == pytest.approx(1 - zeros / 128)
    least = min(
        sum(entry.relative for entry in choice)
        for choice in itertools.product(
            *([e for e in entries(n, *s) if e.kind in ("dense", "weight")] for n, s in SHAPES.items())
        )
        if sum(entry.sparsity * sizes[entry.problem] for entry in choice) >= sparsity * 128 - 1e-9
    )
    assert found.loss == pytest.approx(least)


@pytest.mark.parametrize(("asked", "got"), [(0.25, 0.25), (0.3, 0.5), (0.5, 0.5), (0.9, 1.0)])
def test_uniform_takes_the_lowest_level_that_reaches_the_sparsity(asked: float, got: float) -> None:
    found = uniform(database(), "weight", asked)
    assert {entry.sparsity for entry in found.choice.values()} == {got} and found.feasible
    assert found.asked == 1 - asked and found.share == pytest.approx(1 - got)
    assert found.loss == pytest.approx(5.3 * got**2)


def test_uniform_says_when_no_level_reaches_the_sparsity() -> None:
    data = database()
    layers = {n: Layer(**{**vars(layer), "entries": layer.entries[:3]}) for n, layer in data.layers.items()}
    found = uniform(Database(**{**vars(data), "layers": layers}), "weight", 0.9)
    assert not found.feasible and {entry.sparsity for entry in found.choice.values()} == {0.5}


def test_uniform_kinds_without_levels() -> None:
    assert {entry.kind for entry in uniform(database(), "2:4").choice.values()} == {"2:4"}
    assert {entry.bits for entry in uniform(database(), "4 bit").choice.values()} == {4}
    assert uniform(database(), "2:4").share == pytest.approx(0.5)


def test_everything_may_stay_dense() -> None:
    found = within(database(), 1.0)
    assert found.loss == 0.0 and {entry.kind for entry in found.choice.values()} == {"dense"} and found.feasible


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: within(d, 2.0), OptionError, "1/2"),
        (lambda d: within(d, 0.5, "flops"), OptionError, "macs"),
        (lambda d: within(d, 0.5, "cost"), OptionError, "build it with cost="),
        (lambda d: within(d, 0.5, loss="measured"), OptionError, "build it with evaluate="),
        (lambda d: within(d, 0.5, kinds=("1x4",)), OptionError, "weight, 2:4, 4 bit"),
        (lambda d: within(d, 0.5, layers=("z",)), NothingToCompress, "Nearest"),
        (lambda d: within(d, 0.5, sensitivity={"a.wight": 1.0}), OptionError, "a.weight"),
        (lambda d: uniform(d, "weight"), OptionError, "give the sparsity"),
        (lambda d: uniform(d, "2:4", 0.5), OptionError, "give none"),
        (lambda d: uniform(d, "wight", 0.5), OptionError, "weight"),
        (lambda d: within(Database(**{**vars(d), "layers": {}}), 0.5), NothingToCompress, "no layer"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_way_out(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(database())


def test_a_profile_says_what_it_is() -> None:
    found = within(database(), 0.5, kinds=("weight",))
    assert isinstance(found, Profile) and str(found).startswith("macs x 0.5: 0.") and "loss" in str(found)
