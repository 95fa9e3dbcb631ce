# SPDX-License-Identifier: Apache-2.0
"""`slice`: keeps some positions along one axis of one tensor, and sets the size attributes that follow from it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from featherweight.edits.find import find_tensor
from featherweight.errors import EditError
from featherweight.plan import Slice

__all__ = ["apply_slice"]


def apply_slice(model: nn.Module, edit: Slice) -> None:
    _, _, tensor = find_tensor(model, edit.tensor)
    axis, keep = edit.axis, edit.keep
    if not 0 <= axis < tensor.ndim:
        raise EditError(f"{edit.tensor} has shape {tuple(tensor.shape)}, which has no axis {axis}.")
    if not keep or any(a >= b for a, b in itertools.pairwise(keep)) or keep[0] < 0 or keep[-1] >= tensor.shape[axis]:
        raise EditError(
            f"{edit.tensor}: keep must be ascending positions below {tensor.shape[axis]}, at least one; got {_short(keep)}."
        )
    holders = [m for m in model.modules() if any(t is tensor for t in (*m._parameters.values(), *m._buffers.values()))]
    shape = list(tensor.shape)
    shape[axis] = len(keep)
    attributes = [(module, _sizes(module, _leaf(module, tensor), shape, axis, edit.tensor)) for module in holders]

    index = torch.tensor(keep, device=tensor.device)
    with torch.no_grad():
        # The parameter object stays: ties, optimizers and hooks hold on to it by identity.
        tensor.data = tensor.data.index_select(axis, index).contiguous()
    tensor.grad = None
    for module, sizes in attributes:
        for name, value in sizes.items():
            setattr(module, name, value)


def _leaf(module: nn.Module, tensor: Tensor) -> str:
    return next(name for held in (module._parameters, module._buffers) for name, t in held.items() if t is tensor)


def _sizes(module: nn.Module, leaf: str, shape: list[int], axis: int, name: str) -> dict[str, Any]:
    """The module's size attributes that follow from its tensor `leaf` having `shape` after a cut along `axis`."""
    if isinstance(module, nn.Linear) and leaf == "weight":
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, _ConvNd) and leaf == "weight":
        groups = module.groups
        rows, columns = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
        if groups > 1 and axis == 0:
            # A cut along the stored outer axis removes whole conv groups where each holds `per` positions of it.
            per = module.weight.shape[0] // groups
            if shape[0] % per:
                raise EditError(
                    f"{name}: {shape[0]} positions do not divide into conv groups of {per}; keep whole groups or the same number in each."
                )
            if module.weight.shape[1] == 1 or module.groups == module.in_channels:
                groups = shape[0] // per
            elif shape[0] % groups:
                raise EditError(f"{name}: {shape[0]} channels do not divide into {groups} conv groups.")
        sizes = {"out_channels": shape[rows], "in_channels": shape[columns], "groups": groups}
        sizes["in_channels" if columns == 1 else "out_channels"] *= groups
        return sizes
    if isinstance(module, _NormBase):
        return {"num_features": shape[0]}
    if isinstance(module, nn.GroupNorm):
        if shape[0] % module.num_groups:
            raise EditError(f"{name}: {shape[0]} channels do not divide into {module.num_groups} GroupNorm groups.")
        return {"num_channels": shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention | nn.Bilinear):
        raise EditError(
            f"{name}: a {type(module).__name__} cannot be sliced yet; its sizes are tied to each other in its forward."
        )
    return {}


def _short(keep: tuple[int, ...]) -> str:
    return repr(keep) if len(keep) <= 8 else f"({', '.join(map(str, keep[:4]))}, ... {keep[-1]}), {len(keep)} positions"
