# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model are weights, and each as a matrix: rows are outputs, columns are inputs.

A column order with input channels fastest puts N:M groups and 1 x c tiles along the input channels at one kernel
position, which is what sparse kernels want. The view is a permutation: `from_matrix(w, to_matrix(w, t))` is `t`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Weight", "from_matrix", "to_matrix", "weights"]

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One weight tensor by its canonical name (the first of its names in the model), once however often it is tied.

    `kind` is linear, transposed linear (stored in x out), conv, transposed conv, embedding, recurrent, attention or
    bare (a parameter that a module of an unknown type holds itself). `groups` is the number of conv groups. `aliases`
    are its other names.
    """

    name: str
    layer: str
    module: nn.Module
    kind: str
    groups: int = 1
    aliases: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.module, self.name.rpartition(".")[2]))

    @property
    def depthwise(self) -> bool:
        """Whether each output channel of a conv sees one input channel alone."""
        return self.groups > 1 and self.columns_per_tap == 1

    @property
    def columns_per_tap(self) -> int:
        """Input channels that one row sees at one kernel position: the length along which N:M and tiles run."""
        shape = self.parameter.shape
        if self.kind in ("transposed conv", "transposed linear"):
            return shape[0] // self.groups
        return shape[1] if len(shape) > 1 else 1


def weights(model: nn.Module) -> tuple[list[Weight], dict[str, str]]:
    """The model's weights in definition order, and what looks like a weight but is left alone, each with the reason.

    Biases, norms and other tensors of one axis are not weights. Bare parameters are listed with kind `bare`: whether
    one is a weight or, say, a position embedding, only its owner knows.

    >>> found, left = weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> [(w.name, w.kind) for w in found], left
    ([('0.weight', 'conv')], {})
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[int, Weight] = {}
    left: dict[str, str] = {}
    parametrized = tuple(name for name, module in model.named_modules() if parametrize.is_parametrized(module))
    for layer, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{layer}.{leaf}" if layer else leaf
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                left[name] = "a lazy module that has not run yet; call the model once first"
                continue
            if parameter.ndim < 2 or id(parameter) in found:
                continue
            if any(
                layer.startswith(f"{owner}.parametrizations" if owner else "parametrizations") for owner in parametrized
            ):
                left[name] = (
                    "the weight is computed by a parametrization; torch.nn.utils.parametrize.remove_parametrizations first"
                )
            elif (
                leaf.endswith(("_g", "_v"))
                and leaf[:-2] not in module._parameters
                and isinstance(getattr(module, leaf[:-2], None), Tensor)
            ):
                left[name] = "the weight is computed by weight_norm; torch.nn.utils.remove_weight_norm first"
            elif not parameter.is_floating_point():
                left[name] = f"its values are {str(parameter.dtype).removeprefix('torch.')}, not real numbers"
            else:
                kind = _kind(module, leaf)
                groups = module.groups if isinstance(module, (*CONV, *TRANSPOSED)) else 1
                aliases = tuple(other for other in names[id(parameter)] if other != name)
                found[id(parameter)] = Weight(name, layer, module, kind, groups, aliases)
    return list(found.values()), left


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, known by its looks: x @ weight + bias, the weight being (in, out)."""
    weight, out = getattr(module, "weight", None), getattr(module, "nf", None)
    return (
        type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == out
    )


def _kind(module: nn.Module, leaf: str) -> str:
    if isinstance(module, CONV) and leaf == "weight":
        return "conv"
    if isinstance(module, TRANSPOSED) and leaf == "weight":
        return "transposed conv"
    if isinstance(module, nn.Linear) and leaf == "weight":
        return "linear"
    if is_conv1d(module) and leaf == "weight":
        return "transposed linear"
    if isinstance(module, _EMBEDDING) and leaf == "weight":
        return "embedding"
    if isinstance(module, _RECURRENT) and leaf.startswith("weight_"):
        return "recurrent"
    if isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
        return "attention"
    return "bare"


def _reshape(weight: Weight) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    shape, groups = weight.parameter.shape, weight.groups
    if weight.kind == "conv":
        channels = (0, *range(2, len(shape)), 1)
        moved = [shape[i] for i in channels]
        back = (0, len(shape) - 1, *range(1, len(shape) - 1))
        return (
            lambda t: t.permute(channels).reshape(shape[0], -1),
            lambda m: m.reshape(moved).permute(back).contiguous(),
        )
    if weight.kind == "transposed conv":
        # Stored (in, out / groups, *kernel), where group g owns its own run of input channels.
        taps = shape[2:]
        split = (groups, shape[0] // groups, shape[1], *taps)
        axes = (0, 2, *range(3, len(split)), 1)
        moved = [split[i] for i in axes]
        back = (0, len(split) - 1, 1, *range(2, len(split) - 1))
        return (
            lambda t: t.reshape(split).permute(axes).reshape(groups * shape[1], -1),
            lambda m: m.reshape(moved).permute(back).reshape(shape).contiguous(),
        )
    if weight.kind == "transposed linear":
        return lambda t: t.T, lambda m: m.T.contiguous()
    return lambda t: t.reshape(shape[0], -1), lambda m: m.reshape(shape)


def to_matrix(weight: Weight, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape (its values, scores, a mask) as rows x columns.

    Conv: (out, in/groups, *k) -> (out, k... x in/groups). Transposed conv and transposed linear
    likewise, their rows being outputs too.
    Linear, recurrent and attention as stored; an embedding's rows are its entries. May share memory with `tensor`.
    """
    return _reshape(weight)[0](tensor)


def from_matrix(weight: Weight, matrix: Tensor) -> Tensor:
    """The inverse of `to_matrix`, to the last bit.

    >>> import torch
    >>> [w], _ = weights(nn.ConvTranspose2d(4, 6, 3, groups=2))
    >>> torch.equal(from_matrix(w, to_matrix(w, w.parameter)), w.parameter)
    True
    """
    return _reshape(weight)[1](matrix)
