# SPDX-License-Identifier: Apache-2.0
"""`fold`: a BatchNorm goes into the layer whose output it reads. Saves the norm's parameters and time.

In evaluation y = γ (W x + b - μ) / √(σ² + ε) + β is one affine map: W' = γ / √(σ² + ε) · W by output channel, and
b' = β + γ (b - μ) / √(σ² + ε) (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2). Computed in float64 and rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.edits.effective import reshape_in_place
from featherweight.edits.find import find_module, find_replaceable, replace_module
from featherweight.errors import EditError
from featherweight.layers.readers import Readers, read_by
from featherweight.layers.weights import CONV, TRANSPOSED
from featherweight.plan import Fold

__all__ = ["apply_fold", "fold_factors", "foldable"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def apply_fold(model: nn.Module, edit: Fold) -> None:
    """Scales the layer's weight, sets its bias, and puts an Identity in the norm's place.

    Exact but for one rounding of each number. Raises `EditError` where the two do not fit, or where either is shared,
    so that a second user of it would change.
    """
    layer, norm = find_module(model, edit.layer), find_replaceable(model, edit.norm)
    if reason := _misfit(model, layer, norm):
        raise EditError(f"{edit.norm} cannot be folded into {edit.layer}: {reason}.")
    factor, offset = fold_factors(layer, norm)
    with torch.no_grad():
        weight = layer.get_parameter("weight")
        # Adding zero makes a pruned weight 0.0 where a negative factor made it -0.0.
        reshape_in_place(weight, (weight.double() * _over_outputs(layer, factor) + 0.0).to(weight.dtype))
        offset = offset.to(weight.dtype)
        if layer._parameters.get("bias") is None:
            layer.register_parameter("bias", nn.Parameter(offset, weight.requires_grad))
        else:
            reshape_in_place(layer.get_parameter("bias"), offset)
    replace_module(model, norm, nn.Identity())


def fold_factors(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """By output channel of the layer, in float64: what its weight is multiplied by, and the bias that it ends with.

    >>> layer, norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, eps=0.0)
    >>> _ = norm.running_mean.fill_(3.0), norm.running_var.fill_(4.0)
    >>> fold_factors(layer, norm)
    (tensor([0.5000], dtype=torch.float64), tensor([-1.5000], dtype=torch.float64))
    """
    eps: Any = norm.eps
    mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    gain, shift = (norm._parameters.get(name) for name in ("weight", "bias"))
    factor = (variance + eps).rsqrt()
    if gain is not None:
        factor = factor * gain.detach().double()
    bias = layer._parameters.get("bias")
    start = torch.zeros_like(mean) if bias is None else bias.detach().double()
    offset = (start - mean) * factor
    return factor, offset if shift is None else offset + shift.detach().double()


def _over_outputs(layer: nn.Module, factor: Tensor) -> Tensor:
    """The factors along the output axis of the layer's weight; a transposed conv's is (in, out / groups, ...)."""
    weight = layer.get_parameter("weight")
    if not isinstance(layer, TRANSPOSED):
        return factor.view(-1, *[1] * (weight.ndim - 1))
    by_group = factor.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1)
    return by_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def _misfit(model: nn.Module, layer: nn.Module, norm: nn.Module) -> str:
    """Why the norm cannot go into the layer, as far as the two tell by themselves; empty if it can."""
    if type(norm) not in _NORMS:
        return f"it is a {type(norm).__name__}, not a BatchNorm with statistics"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics, so that it depends on the batch"
    if not isinstance(layer, (*CONV, *TRANSPOSED, nn.Linear)) or "weight" not in layer._parameters:
        return f"that is a {type(layer).__name__}, not a conv, transposed conv or linear layer with a plain weight"
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if outputs != norm.num_features:
        return f"that has {outputs} outputs, the norm {norm.num_features}"
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "that has hooks, which would see other values; remove them first"
    for module, what in ((layer, "that"), (norm, "it")):
        if sum(child is module for parent in model.modules() for child in parent._modules.values()) > 1:
            return f"{what} stands in the model more than once"
    for tensor in (t for t in layer._parameters.values() if t is not None):
        if sum(t is tensor for module in model.modules() for t in module._parameters.values()) > 1:
            return "that shares its weight or bias with another layer"
    return ""


def foldable(model: nn.Module, forward: Callable[[], Any]) -> tuple[tuple[Fold, ...], dict[str, str]]:
    """The folds that leave the model's answers as they are, and for each other BatchNorm why there is none.

    `forward` runs your model once; what it is seen to read decides: a norm folds into the layer whose output it alone
    reads, in each call of either. Changes nothing.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    >>> foldable(model, lambda: model(torch.zeros(4, 2)))
    ((Fold(layer='0', norm='1'),), {'3': 'it reads what is not the output of one layer with weights'})
    """
    modules = dict(model.named_modules())
    norms = [name for name, module in modules.items() if isinstance(module, _NORMS)]
    if not norms:
        return (), {}
    seen = read_by(model, forward)
    gave = {call.gave: name for name, calls in seen.calls.items() for call in calls if _is_layer(modules[name])}
    found: list[Fold] = []
    left: dict[str, str] = {}
    for name in norms:
        before = {gave.get(call.took) for call in seen.calls.get(name, ())}
        layer = next(iter(before), None)
        if not before:
            left[name] = "it was never called"
        elif len(before) > 1 or layer is None:
            left[name] = "it reads what is not the output of one layer with weights"
        elif reason := _other_readers(seen, layer, name, modules[layer]) or _misfit(
            model, modules[layer], modules[name]
        ):
            left[name] = f"not into {layer}: {reason}"
        else:
            try:
                find_replaceable(model, name)
                found.append(Fold(layer, name))
            except EditError as error:
                left[name] = str(error)
    return tuple(found), left


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (*CONV, *TRANSPOSED, nn.Linear))


def _other_readers(seen: Readers, layer: str, norm: str, module: nn.Module) -> str:
    """Why what the layer gives is not the norm's alone, its channels where the norm has them; empty if it is."""
    axes = 2 if isinstance(module, nn.Linear) else len(module.kernel_size) + 2  # type: ignore[arg-type]
    for call in seen.calls[layer]:
        if call.gave is None or call.gave in seen.answer:
            return "the model answers with that layer's output too"
        others = [op for op in seen.of.get(call.gave, ()) if norm not in op.modules and layer not in op.modules]
        if others:
            where = others[0].modules[-1] if others[0].modules else ""
            return f"{where or 'the model'} reads that layer's output too ({others[0].name})"
        if not any(norm in op.modules for op in seen.of.get(call.gave, ())):
            return "in one of its calls the norm does not follow"
        if len(call.shape) != axes:
            return "the norm's channels are on another axis than that layer's"
    return ""
