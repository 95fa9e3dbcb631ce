# SPDX-License-Identifier: Apache-2.0
"""`factor`: one linear layer becomes two of rank r. Saves parameters and MACs where r < out * in / (out + in)."""

from __future__ import annotations

import torch
from torch import nn

from featherweight.edits.find import find_replaceable, replace_module
from featherweight.errors import EditError
from featherweight.plan import Factor

__all__ = ["apply_factor"]


def apply_factor(model: nn.Module, edit: Factor) -> None:
    """Puts `Sequential(down, up)` in the layer's place, their weights zero; `up` takes over the bias itself."""
    old = find_replaceable(model, edit.layer)
    if type(old) is not nn.Linear or "weight" not in old._parameters:
        raise EditError(f"{edit.layer} is a {type(old).__name__}; factor splits a plain torch.nn.Linear only.")
    out_features, in_features = old.weight.shape
    if not 1 <= edit.rank <= min(out_features, in_features):
        raise EditError(f"{edit.layer}: rank {edit.rank} is outside 1..{min(out_features, in_features)}.")
    # Built on `meta`, which draws no random numbers: a run with an edit in it and one without stay in step.
    down = nn.Linear(in_features, edit.rank, bias=False, device="meta")
    up = nn.Linear(edit.rank, out_features, bias=False, device="meta")
    for part in (down, up):
        zeros = torch.zeros(part.weight.shape, dtype=old.weight.dtype, device=old.weight.device)
        part.weight = nn.Parameter(zeros, old.weight.requires_grad)
    up.bias = old.bias
    replace_module(model, old, nn.Sequential(down, up))
