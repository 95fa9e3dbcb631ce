# SPDX-License-Identifier: Apache-2.0
"""Grids hold zero, round to the nearest of their values, and are fitted to where the stated error is least."""

import numpy as np
import pytest
import torch

from featherweight.errors import NumericalError, OptionError
from featherweight.grids import Grid, GridSpec, fit_grid

SPECS = [
    GridSpec(bits=2),
    GridSpec(bits=3, symmetric=True),
    GridSpec(bits=4, chunk=5),
    GridSpec(bits=4, symmetric=True, chunk=4, search="minmax"),
    GridSpec(bits=8, search="minmax"),
]


def weights(rows: int = 6, d: int = 14) -> torch.Tensor:
    W = torch.randn(rows, d, generator=torch.Generator().manual_seed(0))
    W[1] = W[1].abs()  # one-sided rows need their whole range as much as others
    W[2] = -W[2].abs()
    W[3] = 0.0
    W[4] *= 1e-3
    return W


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rounding_is_to_the_nearest_of_the_grids_values(spec: GridSpec) -> None:
    """Oracle: the distances to all 2^b values of each entry's own scale and zero point."""
    W = weights()
    grid = fit_grid(W, spec)
    levels = np.arange(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1))
    chunk = np.arange(W.shape[1]) // grid.chunk
    scale, zero_point = grid.scale.double().numpy()[:, chunk], grid.zero_point.numpy()[:, chunk]
    values = scale[..., None] * (levels - zero_point[..., None])
    nearest = np.abs(values - W.double().numpy()[..., None]).min(-1)
    assert np.allclose(np.abs(grid.nearest(W.double()).numpy() - W.double().numpy()), nearest, atol=1e-12)
    assert grid.integers(W).min() >= levels[0] and grid.integers(W).max() <= levels[-1]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_is_on_the_grid(spec: GridSpec) -> None:
    grid = fit_grid(weights(), spec)
    assert bool((grid.nearest(torch.zeros(6, 14)) == 0).all())
    assert bool((grid.zero_point >= grid.low).all() and (grid.zero_point <= grid.high).all())
    assert not spec.symmetric or bool((grid.zero_point == 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_is_torchs_own(symmetric: bool) -> None:
    W = weights()
    grid = fit_grid(W, GridSpec(bits=4, symmetric=symmetric))
    theirs = torch.fake_quantize_per_channel_affine(W, grid.scale[:, 0], grid.zero_point[:, 0], 0, grid.low, grid.high)
    # Ties apart, which they break after a multiplication by the inverse of the scale.
    assert float(((grid.nearest(W) - theirs).abs() > 1e-6).float().mean()) == 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_minmax_covers_every_value(bits: int, symmetric: bool) -> None:
    W = weights().double()
    grid = fit_grid(W, GridSpec(bits=bits, symmetric=symmetric, search="minmax"))
    # An asymmetric range is moved by up to half a step when its zero point becomes an integer.
    allowed = grid.scale.double() * (0.5 if symmetric else 1.0)
    assert bool(((grid.nearest(W) - W).abs() <= allowed * (1 + 1e-6)).all())


def test_the_mse_search_is_the_best_of_its_eighty_ranges() -> None:
    W = weights().double()
    weigh = torch.linspace(0.1, 2, 14, dtype=torch.float64)
    grid = fit_grid(W, GridSpec(bits=3), importance=weigh)
    found = ((grid.nearest(W) - W).abs() ** 2.4 * weigh).sum(1).numpy()
    for row, error in zip(W.numpy(), found, strict=True):
        low, high = min(row.min(), 0.0), max(row.max(), 0.0)
        errors = []
        for i in range(80):
            share = 1 - i / 100
            scale = np.float64(np.float32((high - low) * share / 7)) or 1.0
            zero = np.round(-low * share / ((high - low) * share / 7 or 1.0))
            rounded = (np.clip(np.round(row / scale) + zero, 0, 7) - zero) * scale
            errors.append((np.abs(rounded - row) ** 2.4 * weigh.numpy()).sum())
        assert error == pytest.approx(min(errors), rel=1e-6, abs=1e-12)


def test_chunks_are_fitted_each_by_itself() -> None:
    W = weights()
    grid = fit_grid(W, GridSpec(bits=3, chunk=5))
    assert grid.scale.shape == (6, 3)
    for k, columns in enumerate((slice(0, 5), slice(5, 10), slice(10, 14))):
        alone = fit_grid(W[:, columns], GridSpec(bits=3))
        assert torch.equal(alone.scale[:, 0], grid.scale[:, k])
        assert torch.equal(alone.zero_point[:, 0], grid.zero_point[:, k])


def test_the_values_are_float32_products() -> None:
    W = weights()
    grid = fit_grid(W, GridSpec(bits=4))
    integers = grid.integers(W)
    assert torch.equal(grid.values(integers).float(), grid.scale * (integers - grid.zero_point).float())


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 17},
        {"bits": 4.0},
        {"bits": 4, "chunk": 0},
        {"bits": 4, "search": "max"},
        {"bits": 4, "percentile": 50},
    ],
)
def test_a_spec_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        GridSpec(**options)


def test_weights_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        fit_grid(torch.tensor([[1.0, torch.nan]]), GridSpec(bits=4))


def test_a_hand_made_grid_rounds_and_clips() -> None:
    grid = Grid(torch.tensor([[0.5]]), torch.tensor([[1]], dtype=torch.int32), bits=2, chunk=4)
    assert grid.nearest(torch.tensor([[-9.0, -0.6, 0.1, 9.0]])).tolist() == [[-1.5, -0.5, 0.0, 0.0]]


def test_one_bit_is_the_mean_magnitude_and_the_sign() -> None:
    """XNOR-Net, eq. 6: α = |W|_1 / n; it is the α of least squared error for W ≈ α sign(W)."""
    W = torch.randn(5, 14, generator=torch.Generator().manual_seed(3))
    grid = fit_grid(W, GridSpec(bits=1, chunk=5))
    for k, columns in enumerate((slice(0, 5), slice(5, 10), slice(10, 14))):
        part = W[:, columns]
        assert torch.allclose(grid.scale[:, k], part.abs().mean(1))
        assert torch.equal(grid.nearest(W)[:, columns], grid.scale[:, k : k + 1] * part.sign())
        for factor in (0.99, 1.01):
            other = factor * grid.scale[:, k : k + 1] * part.sign()
            assert bool(((other - part) ** 2).sum(1).gt(((grid.nearest(W)[:, columns] - part) ** 2).sum(1)).all())
    assert set(grid.integers(W).unique().tolist()) == {-1, 0}


def test_one_bit_weighs_columns_as_told_and_comes_close_to_zero_where_all_is_zero() -> None:
    W = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    grid = fit_grid(W, GridSpec(bits=1), importance=torch.tensor([3.0, 1.0]))
    assert grid.scale[0].item() == 1.5
    assert 0 < grid.nearest(W)[1].abs().max() < 1e-37


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("chunk", [None, 40, 64])
def test_percentiles_are_numpys(symmetric: bool, chunk: int | None) -> None:
    W = torch.randn(3, 150, generator=torch.Generator().manual_seed(0)).double()
    spec = GridSpec(bits=6, symmetric=symmetric, chunk=chunk, search="percentile", percentile=97.3)
    grid = fit_grid(W, spec)
    for k, start in enumerate(range(0, 150, chunk or 150)):
        part = W[:, start : start + (chunk or 150)].numpy()
        if symmetric:
            expected = np.percentile(np.abs(part), 97.3, axis=1) / 31
        else:
            ends = np.percentile(part, [100 - 97.3, 97.3], axis=1)
            expected = (np.maximum(ends[1], 0) - np.minimum(ends[0], 0)) / 63
        assert np.allclose(grid.scale[:, k].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 9, 12, 16])
def test_more_bits_and_one_round_to_values_of_the_grid(bits: int) -> None:
    W = weights()
    grid = fit_grid(W, GridSpec(bits=bits, search="minmax"))
    integers = grid.integers(W)
    assert grid.low <= int(integers.min()) and int(integers.max()) <= grid.high
    if bits > 1:
        assert bool(((grid.nearest(W) - W).abs() <= grid.scale * 1.001).all())
