# SPDX-License-Identifier: Apache-2.0
"""How wide a layer is: the channels that it gives. What a cut of channels makes smaller."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.layers.weights import CONV, TRANSPOSED, is_conv1d

__all__ = ["width"]


def width(module: nn.Module) -> int | None:
    """The channels that a layer with a weight gives: of a recurrent one, of one direction; None for others.

    An attention is as wide as its queries: heads times the size of one.

    >>> width(nn.Conv2d(3, 8, 1)), width(nn.LSTM(4, 16)), width(nn.MultiheadAttention(12, 3)), width(nn.BatchNorm2d(8))
    (8, 16, 12, None)
    """
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return int(module.hidden_size)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(module, TRANSPOSED):
        return int(weight.shape[1] * module.groups)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or is_conv1d(module):
        return int(weight.shape[1])
    return int(weight.shape[0]) if isinstance(module, (nn.Linear, nn.Bilinear, *CONV)) else None
