# SPDX-License-Identifier: Apache-2.0
"""What no correction may move: the zeros that pruning made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.layers import to_matrix, unwrap, weights

__all__ = ["put", "standing_zeros"]


def standing_zeros(model: nn.Module, reference: nn.Module) -> dict[int, Tensor]:
    """By identity of the parameter, where it is a zero that has to stand (bool, its shape); absent where it has none.

    Every zero of a weight stands. In a bias or a norm, where training starts from zeros, a zero stands if the reference
    has another value there, or if it is the bias of a row that is zero throughout (a neuron that pruning took).
    """
    model, reference = unwrap(model), unwrap(reference)
    dense = dict(reference.named_parameters())
    held: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        zero = parameter.detach() == 0
        other = dense.get(name)
        if parameter.ndim < 2:
            known = other is not None and other.shape == parameter.shape
            zero &= (other.detach().to(zero.device) != 0) if other is not None and known else False
        if bool(zero.any()):
            held[id(parameter)] = zero
    for weight in weights(model)[0]:
        bias = getattr(weight.module, "bias", None)
        if weight.kind in ("linear", "conv", "transposed conv") and isinstance(bias, nn.Parameter):
            gone = (to_matrix(weight, weight.parameter.detach()) == 0).all(1) & (bias.detach() == 0)
            if bool(gone.any()):
                held[id(bias)] = gone | held.get(id(bias), gone)
    return held


@torch.no_grad()
def put(parameter: Tensor, values: Tensor, held: dict[int, Tensor]) -> None:
    """Sets your parameter in place but for the zeros that are `held`."""
    zeros = held.get(id(parameter))
    parameter.copy_(values if zeros is None else values.masked_fill(zeros, 0.0))
