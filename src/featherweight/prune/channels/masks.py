# SPDX-License-Identifier: Apache-2.0
"""Couplings that are gone but not yet cut: their positions are zero in every tensor that has them.

That is what a cut removes, so that the masked model answers as the cut one will (but for norms over channels, whose
statistics still count the zeros).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.graph import Coupling, Group

__all__ = ["couplings_gone", "masks_of", "zero_buffers"]


def masks_of(
    parameters: Mapping[str, nn.Parameter], groups: Iterable[Group], gone: Mapping[str, np.ndarray]
) -> dict[nn.Parameter, Tensor]:
    """For each parameter that loses positions a bool mask of its shape, True where it is to be zero."""
    masks: dict[nn.Parameter, Tensor] = {}
    for group in groups:
        if not gone[group.name].any():
            continue
        for member in group.members:
            parameter = parameters.get(member.tensor)
            if parameter is None:
                continue
            if parameter not in masks:
                masks[parameter] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            masks[parameter].index_fill_(member.axis, _positions(member.positions, gone[group.name], parameter), True)
    return masks


@torch.no_grad()
def zero_buffers(model: nn.Module, groups: Iterable[Group], gone: Mapping[str, np.ndarray]) -> None:
    """Zeroes floating-point buffers that lose positions, but for norms' statistics, which follow by themselves."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for group in groups:
        if not gone[group.name].any():
            continue
        for member in group.members:
            buffer = buffers.get(member.tensor)
            if (
                buffer is None
                or not buffer.is_floating_point()
                or member.tensor.endswith(("running_mean", "running_var"))
            ):
                continue
            buffer.index_fill_(member.axis, _positions(member.positions, gone[group.name], buffer), 0.0)


def couplings_gone(groups: Iterable[Group], gone: Mapping[str, np.ndarray]) -> list[Coupling]:
    """What `edits.cut` is told."""
    return [group[int(index)] for group in groups for index in np.flatnonzero(gone[group.name])]


def _positions(positions: np.ndarray, gone: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(positions[gone].reshape(-1)).to(tensor.device)
