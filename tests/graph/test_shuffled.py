# SPDX-License-Identifier: Apache-2.0
"""Channels that vary over positions as well: after a pixel shuffle it is channels that are cut, never offsets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featherweight.edits import cut
from featherweight.graph import trace
from tests.graph.absent import without


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_pixel_shuffle_before_a_convolution_couples_the_channels_that_become_one(kernel):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(3, 8, kernel), nn.ReLU(), nn.Conv2d(8, 4, 1)
        ).double()

    model, x = make(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    found = trace(model, (x,))
    assert [(group.name, group.size) for group in found.groups] == [("0", 3), ("2", 8)]
    assert found["0"].members[0].positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    (wanted,) = without(make(), (x,), [("0.weight", 0, [4, 5, 6, 7]), ("0.bias", 0, [4, 5, 6, 7])])
    cut(model, found["0"][1:2], trace=found, inputs=(x,))
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
