# SPDX-License-Identifier: Apache-2.0
"""Oracles: NumPy's percentiles, and rounding of the values themselves, with no histogram in between."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from featherweight.edits import FakeQuantize
from featherweight.quantize.observers import Histogram, Range, grid_of, range_of


def seen(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        assert histogram.add(batch)
    return histogram


def error(x: Tensor, within: Range, bits: int, symmetric: bool) -> float:
    scale, zero_point = grid_of(within, bits, symmetric)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wide = x.double().numpy()
    nearest = (np.clip(np.rint(wide / scale) + zero_point, low, high) - zero_point) * scale
    return float(((nearest - wide) ** 2).sum())


def test_smallest_and_largest_are_exact_and_the_order_of_batches_does_not_count() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(50) * 10.0**k for k in (-3, 2, 0, -1)]
    one, other = seen(*batches), seen(*reversed(batches))
    everything = torch.cat(batches)
    assert (one.low, one.high) == (float(everything.min()), float(everything.max()))
    assert all(torch.equal(a, b) for a, b in zip(one.bins(), other.bins(), strict=True))
    assert one.seen == 200 and float(one.bins()[1].sum()) == 200


def test_memory_does_not_grow_with_what_is_seen() -> None:
    histogram = seen(*(torch.randn(1000) * 10.0**k for k in range(-20, 30)))
    assert sum(value.numel() for value in vars(histogram).values() if isinstance(value, Tensor)) == 8192


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9])
def test_a_percentile_is_numpys(share: float) -> None:
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.3, 1.0).sample((100_000,))
    within = seen(*x.split(999)).percentile(share)
    # At 99.9 % values lie 0.01 apart, and NumPy interpolates.
    near = 2 * seen(x).reach / 8192 + 0.02
    assert within.high == pytest.approx(np.percentile(x, share), abs=near)
    assert within.low == pytest.approx(np.percentile(x, 100 - share), abs=near)


def test_zeros_count_in_a_percentile() -> None:
    """After a ReLU that lets one value in a hundred through, nothing above 0 is within 98 % of the values."""
    x = torch.zeros(10_000)
    x[:100] = torch.rand(100)
    assert seen(x).percentile(98.0) == Range(0.0, 0.0)
    assert seen(x).percentile(99.5).high == pytest.approx(float(x[:100].median()), abs=0.05)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["laplace", "relu", "outlier", "shifted"])
def test_mse_errs_no_more_than_any_shrunken_range(kind: str, bits: int, symmetric: bool) -> None:
    """Against every joint shrinking of the range, tried on the values themselves; a hundredth is what bins may cost."""
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((4000,))
    x = {"laplace": x, "relu": x.relu(), "outlier": torch.cat([x, torch.tensor([60.0])]), "shifted": x - 3}[kind]
    histogram = seen(*x.split(500))
    found = error(x, range_of(histogram, "mse", bits, symmetric), bits, symmetric)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    best = min(error(x, Range(low * s, high * s), bits, symmetric) for s in np.linspace(1, 0.05, 60))
    assert found <= 1.02 * best


def test_mse_leaves_a_lone_outlier_out_and_minmax_does_not() -> None:
    """Cut off at 4 it errs by 56² once; kept, a step of 4 rounds a hundred thousand values to zero."""
    torch.manual_seed(0)
    histogram = seen(torch.cat([torch.randn(100_000), torch.tensor([60.0])]))
    assert range_of(histogram, "minmax", 4, False).high == 60.0
    assert range_of(histogram, "mse", 4, False).high < 10.0
    assert range_of(histogram, "mse", 16, False).high == 60.0


@given(
    low=st.floats(-1e4, 0, width=32),
    high=st.floats(0, 1e4, width=32),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
)
def test_a_range_errs_by_half_a_step_at_most_and_its_ends_are_not_outside(
    low: float, high: float, bits: int, symmetric: bool
) -> None:
    if high - low < 1e-30:
        return
    scale, zero_point = grid_of(Range(low, high), bits, symmetric)
    assert -(2 ** (bits - 1)) <= zero_point < 2 ** (bits - 1)
    assert not symmetric or zero_point == 0
    grid = FakeQuantize(bits, symmetric)
    grid.scale.fill_(scale), grid.zero_point.fill_(zero_point)
    x = torch.linspace(low, high, 101)
    assert float((grid(x) - x).abs().max()) <= scale * (0.5 + 2e-3)
    assert int(grid.outside(x)) == 0


def test_a_relus_range_starts_at_the_lowest_integer() -> None:
    assert grid_of(Range(0.0, 6.0), 8, symmetric=False)[1] == -128


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("constant", [0.0, 3.7, -2.0])
def test_a_constant_has_a_grid_that_holds_it(observer: str, constant: float) -> None:
    histogram = seen(torch.full((64,), constant))
    scale, zero_point = grid_of(range_of(histogram, observer, 8, False), 8, False)
    assert math.isfinite(scale) and scale > 0
    grid = FakeQuantize(8, False)
    grid.scale.fill_(scale), grid.zero_point.fill_(zero_point)
    assert float(grid(torch.tensor([constant]))) == pytest.approx(constant, rel=5e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(bad: float) -> None:
    histogram = seen(torch.tensor([1.0]))
    assert not histogram.add(torch.tensor([5.0, bad]))
    assert (histogram.seen, histogram.high) == (1, 1.0)
    assert histogram.add(torch.empty(0)) and histogram.seen == 1
