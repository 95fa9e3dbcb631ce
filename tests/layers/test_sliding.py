# SPDX-License-Identifier: Apache-2.0
"""A kernel that slides: its Hessian from first taps and ends is that of all patches, and dead inputs are exactly dead."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from featherweight.layers import collect, problems, split
from featherweight.layers.inputs import Call, Input, conv
from featherweight.layers.sliding import Slides, sliding_axis


def reading(layer: nn.Module, x: Tensor) -> Input:
    return conv(Call(layer, (x,), {}, layer(x)))["weight"][0]


def all_patches(read: Input, groups: list[int], channels: slice | None) -> Tensor:
    X = torch.cat(list(read.patches(groups, channels, 10**9)), 1).double()
    return X.mT @ X


LAYERS = {
    "1d": (nn.Conv1d(8, 4, 40, padding=20), (3, 8, 50)),
    "1d of few positions": (nn.Conv1d(8, 4, 40, padding=20), (3, 8, 8)),
    "down": (nn.Conv2d(9, 4, (32, 1)), (3, 9, 60, 1)),
    "along the second axis": (nn.Conv2d(5, 4, (3, 20), padding=(1, 0), stride=(2, 1)), (3, 5, 9, 40)),
    "between taps of others": (nn.Conv3d(3, 4, (2, 16, 3), dilation=(1, 1, 2)), (2, 3, 4, 40, 8)),
    "groups": (nn.Conv1d(32, 6, 40, groups=2, padding=3), (3, 32, 60)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("some", [False, True])
def test_the_gram_matrix_is_that_of_all_patches(name: str, some: bool) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    reads = [reading(layer, torch.randn(shape) + 1) for _ in range(2)]
    channels, groups = slice(1, 3) if some else None, [layer.groups - 1] if some else list(range(layer.groups))
    axis = sliding_axis(reads[0], 10**3)
    assert axis is not None
    slides = Slides(reads[0], axis)
    for read in reads:
        slides.ends(read, groups, channels, 500)
        for X in read.patches(groups, channels, 5000):
            slides.add(X)
    found = slides.total()
    assert found is not None
    exact = torch.stack([all_patches(read, groups, channels) for read in reads]).sum(0)
    assert float((found - exact).norm() / exact.norm()) < 5e-7
    assert float((found - found.mT).abs().max()) < 1e-6 * float(exact.abs().max())


def test_taps_that_see_nothing_but_padding_stay_dead_and_blocks_of_channels_fit_the_whole() -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(12, 4, 40, padding=20)
    data = [torch.randn(5, 12, 8), torch.randn(5, 12, 9)]
    whole = problems(layer)[0][0]
    found = collect(layer, [whole], data, lambda m, x: m(x))[whole.name]
    exact = torch.cat([all_patches(reading(layer, x), [0], None) for x in data]).sum(0) * 2 / found.tokens
    assert float((found.H - exact).norm() / exact.norm()) < 5e-7
    dead = exact.diagonal() == 0
    assert dead.any()
    assert not dead.all()
    assert torch.equal(found.H.diagonal() == 0, dead)
    assert not found.H[dead].any()
    for block in split(whole, 6 * 40):
        part = collect(layer, [block], data, lambda m, x: m(x))[block.name].H
        at = (torch.arange(40)[:, None] * 12 + torch.arange(12)[block.channels]).flatten()
        torch.testing.assert_close(part, found.H[at][:, at], atol=2e-6, rtol=0)


def test_where_it_would_not_pay_or_not_hold_nothing_slides() -> None:
    read = reading(nn.Conv1d(8, 4, 40), torch.randn(1, 8, 60))
    assert sliding_axis(read, 320) == 0
    assert sliding_axis(read, 100) is None
    assert sliding_axis(dataclasses.replace(read, flipped=True), 320) is None
    assert sliding_axis(reading(nn.Conv1d(8, 4, 40), torch.randn(1, 8, 42)), 320) is None
    for layer in (nn.Conv1d(8, 4, 40, stride=2), nn.Conv1d(8, 4, 40, dilation=2), nn.Conv2d(8, 4, 3)):
        assert sliding_axis(reading(layer, torch.randn(1, 8, *[120] * (len(layer.kernel_size)))), 320) is None
