# SPDX-License-Identifier: Apache-2.0
"""A grid is read from values exactly when there is one, it is the coarsest, and rounding to it changes nothing."""

import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import OptionError
from featherweight.grids import Grid, GridSpec, fit_grid, read_grid


def made(
    seed: int, bits: int, rows: int, d: int, chunk: int, symmetric: bool, dtype: torch.dtype, sparsity: float = 0.0
) -> torch.Tensor:
    """Random integers times random scales: what any quantizer may leave."""
    generator = torch.Generator().manual_seed(seed)
    chunks = -(-d // chunk)
    scale = torch.exp(3 * torch.randn(rows, chunks, generator=generator) - 3).float()
    low = -(1 << (bits - 1))
    zero_point = torch.zeros(rows, chunks, dtype=torch.int32)
    if not symmetric and bits > 1:
        zero_point = torch.randint(low, -low, (rows, chunks), generator=generator).to(torch.int32)
    integers = torch.randint(low, max(1, -low), (rows, d), generator=generator)
    values = Grid(scale, zero_point, bits, chunk).values(integers)
    if bits > 1:
        values[torch.rand(rows, d, generator=generator) < sparsity] = 0
    return (values + 0.0).to(dtype)


@settings(max_examples=120)
@given(
    st.integers(0, 10_000),
    st.integers(1, 16),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([7, 32, 70]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_what_lies_on_a_grid_is_found_to_the_last_bit_in_no_more_bits(
    seed: int, bits: int, rows: int, d: int, chunk: int, symmetric: bool, dtype: torch.dtype, sparsity: float
) -> None:
    W = made(seed, bits, rows, d, min(chunk, d), symmetric, dtype, sparsity)
    grid = read_grid(W, most_bits=max(2, bits), chunk=chunk)
    assert grid is not None
    assert torch.equal(grid.nearest(W), W)
    assert grid.bits <= max(2, bits)
    assert grid.scale.dtype == torch.float32 and grid.zero_point.dtype == torch.int32
    assert grid.scale.shape == grid.zero_point.shape == (rows, -(-d // min(chunk, d)))
    assert bool((grid.zero_point >= grid.low).all() and (grid.zero_point <= grid.high).all())


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 10), st.booleans())
def test_float16_is_read_to_ten_bits(seed: int, bits: int, symmetric: bool) -> None:
    W = fit_grid(torch.randn(4, 90, generator=torch.Generator().manual_seed(seed)), GridSpec(bits, symmetric))
    values = W.nearest(torch.randn(4, 90, generator=torch.Generator().manual_seed(seed)).half())
    grid = read_grid(values, most_bits=bits)
    assert grid is not None and torch.equal(grid.nearest(values), values)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_bfloat16_is_read_to_six_bits(seed: int, bits: int, symmetric: bool) -> None:
    W = torch.randn(4, 90, generator=torch.Generator().manual_seed(seed))
    values = fit_grid(W, GridSpec(bits, symmetric)).nearest(W.bfloat16())
    grid = read_grid(values, most_bits=bits)
    assert grid is not None and torch.equal(grid.nearest(values), values)


def coarsest(row: list[float], most: int) -> int | None:
    """The integer of the largest magnitude on the coarsest grid, by trying all: exact rationals, all near float32 scales."""
    magnitudes = [Fraction(abs(v)) for v in row if v]
    top = max(magnitudes)
    span = max(*row, 0.0) - min(*row, 0.0)
    for k in range(1, most + 1):
        middle = np.float32(float(top / k))
        near = {middle}
        for _ in range(3):
            near |= {np.nextafter(s, np.float32(side)) for s in near for side in (0, np.inf)}
        for scale in sorted(near):
            exact = Fraction(float(scale))
            levels = [round(v / exact) for v in magnitudes]
            if all(Fraction(float(np.float32(float(exact * n)))) == v for n, v in zip(levels, magnitudes, strict=True)):
                return k if round(Fraction(span) / exact) <= most else None
    return None


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 5),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["grid", "floats", "factor"]),
)
def test_the_grid_is_the_coarsest_there_is(seed: int, bits: int, d: int, symmetric: bool, kind: str) -> None:
    W = made(seed, bits, 1, d, d, symmetric, torch.float32)
    if kind == "floats":
        W = torch.randn(1, d, generator=torch.Generator().manual_seed(seed))
    if kind == "factor":
        W = W * 4  # multiples of four times the scale
    grid = read_grid(W, most_bits=bits)
    if not bool(W.any()):
        assert grid is not None and grid.scale.item() == 1
        return
    expected = coarsest(W[0].tolist(), (1 << bits) - 1)
    assert (grid is None) == (expected is None)
    if grid is not None:
        assert round(float(W.abs().max()) / grid.scale.item()) == expected


CASES = {
    "all zero": ([[0.0, 0.0]], 2, [1.0]),
    "a row of zeros": ([[0.0, 0.0], [0.5, -1.0]], 2, [1.0, 0.5]),
    "constant": ([[0.3, 0.3]], 1, [0.3]),
    "one magnitude": ([[0.3, -0.3]], 1, [0.3]),
    "one magnitude and zero": ([[0.3, -0.3, 0.0]], 2, [0.3]),
    "one value": ([[-0.7]], 1, [0.7]),
    "a common factor": ([[4.0, -8.0, 12.0]], 3, [4.0]),
    "negative zero": ([[1.0, -0.0]], 2, [1.0]),
    "all of one sign": ([[1.0, 2.0, 3.0]], 2, [1.0]),
    "subnormal": ([[2.942727e-44, 5.885454e-44, -8.82818e-44]], 3, [2.942726775082116e-44]),
    "the least number": ([[1.4e-45, -2.8e-45]], 2, [1.401298464324817e-45]),
    "large": ([[1e38, -3e38]], 3, [1e38]),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_few_values_have_a_defined_grid(case: str) -> None:
    rows, bits, scales = CASES[case]
    W = torch.tensor(rows)
    grid = read_grid(W)
    assert grid is not None and grid.bits == bits
    assert grid.scale[:, 0].tolist() == torch.tensor(scales).tolist()
    assert torch.equal(grid.nearest(W), W)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers_lie_on_no_grid(value: float) -> None:
    assert read_grid(torch.tensor([[1.0, value, 2.0]])) is None


@pytest.mark.parametrize("W", [torch.empty(0, 3), torch.empty(3, 0), torch.ones(2, 2, dtype=torch.int32)], ids=str)
def test_nothing_and_integers_have_no_grid(W: torch.Tensor) -> None:
    assert read_grid(W) is None


@pytest.mark.parametrize("options", [{"most_bits": 0}, {"most_bits": 17}, {"chunk": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        read_grid(torch.ones(2, 2), **options)


def test_a_value_that_leaves_the_grid_is_noticed_wherever_it_is() -> None:
    W = made(0, 8, 50, 300, 300, True, torch.float32)
    for place in ((0, 0), (49, 299), (23, 150)):
        spoilt = W.clone()
        spoilt[place] = torch.nextafter(torch.tensor(0.123456 * float(W[place[0]].abs().max())), torch.tensor(1.0))
        assert read_grid(spoilt) is None


def test_one_scale_for_a_long_tensor_is_read_from_its_distinct_values() -> None:
    values = made(1, 8, 1, 700_000, 700_000, True, torch.float32)
    grid = read_grid(values)
    assert grid is not None and grid.bits == 8 and torch.equal(grid.nearest(values), values)
    spoilt = values.clone()
    spoilt[0, 654_321] *= 1.2345
    assert read_grid(spoilt) is None


def test_ordinary_floats_are_turned_down_at_a_glance() -> None:
    W = torch.randn(2000, 3000, generator=torch.Generator().manual_seed(0))
    for view in (W, W.view(1, -1)):
        start = time.process_time()
        assert read_grid(view, most_bits=16) is None
        assert time.process_time() - start < 0.1


def test_the_bits_come_from_the_row_that_needs_most_and_zero_points_only_where_needed() -> None:
    W = torch.tensor([[1.0, -2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    grid = read_grid(W)
    assert grid is not None
    assert (grid.bits, grid.zero_point.tolist()) == (2, [[0], [-2]])
    assert grid.integers(W).tolist() == [[1, -2, 1, 0], [-2, -1, 0, 1]]
