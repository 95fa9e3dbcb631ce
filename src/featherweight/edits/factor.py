# SPDX-License-Identifier: Apache-2.0
"""`factor`: one linear layer becomes two of rank r. Saves parameters and MACs where r < out * in / (out + in)."""

from __future__ import annotations

from torch import nn

from featherweight.edits.find import find_module, replace_module
from featherweight.errors import EditError
from featherweight.plan import Factor

__all__ = ["apply_factor"]


def apply_factor(model: nn.Module, edit: Factor) -> None:
    old = find_module(model, edit.layer)
    if type(old) is not nn.Linear:
        raise EditError(f"{edit.layer} is a {type(old).__name__}; factor splits torch.nn.Linear only.")
    out_features, in_features = old.weight.shape
    if not 1 <= edit.rank <= min(out_features, in_features):
        raise EditError(f"{edit.layer}: rank {edit.rank} is outside 1..{min(out_features, in_features)}.")
    where = {"device": old.weight.device, "dtype": old.weight.dtype}
    down = nn.Linear(in_features, edit.rank, bias=False, **where)
    up = nn.Linear(edit.rank, out_features, bias=old.bias is not None, **where)
    nn.init.zeros_(down.weight)
    nn.init.zeros_(up.weight)
    if old.bias is not None:
        up.bias = old.bias
    replace_module(model, old, nn.Sequential(down, up))
