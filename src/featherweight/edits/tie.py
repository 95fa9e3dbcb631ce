# SPDX-License-Identifier: Apache-2.0
"""`tie`: several names become one parameter. Saves the bytes of all but one; compute stays."""

from __future__ import annotations

from torch import nn

from featherweight.edits.find import find_tensor
from featherweight.errors import EditError
from featherweight.plan import Tie

__all__ = ["apply_tie"]


def apply_tie(model: nn.Module, edit: Tie) -> None:
    """Makes every name, and every other name of the same parameters, the first one's parameter."""
    if len(set(edit.names)) < 2 or len(set(edit.names)) != len(edit.names):
        raise EditError(f"tie needs two or more different names; got {', '.join(edit.names) or 'none'}.")
    found = [find_tensor(model, name)[2] for name in edit.names]
    first = found[0]
    for name, tensor in zip(edit.names, found, strict=True):
        if not isinstance(tensor, nn.Parameter):
            raise EditError(f"{name} is a buffer; tie takes parameters.")
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise EditError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, but {edit.names[0]} is "
                f"{tuple(first.shape)} {first.dtype} on {first.device}."
            )
    # Whoever else holds one of the tied tensors follows, so that a tie that was there stays.
    tied = {id(tensor) for tensor in found}
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not first and id(parameter) in tied:
                setattr(module, leaf, first)
