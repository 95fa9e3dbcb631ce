# SPDX-License-Identifier: Apache-2.0
"""Tensors that a module computes from others: `torch.nn.utils.parametrizations`, and the older `nn.utils.weight_norm`.

An edit names what the module uses ("conv.weight"). Its new value goes back through the parametrization's own
`right_inverse` into the parameters behind it, which keep their identity; whether the module then really computes that
value is checked, since a parametrization may be a projection (orthogonal, spectral norm) that a part does not survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from featherweight.edits.find import find_module, find_tensor
from featherweight.errors import EditError

__all__ = ["behind", "computed_in", "find_effective", "is_computed", "put", "reshape_in_place", "value_of"]


def find_effective(model: nn.Module, name: str) -> tuple[nn.Module, str, Tensor]:
    """As `find_tensor`, and the value of a tensor that its module computes."""
    layer, _, leaf = name.rpartition(".")
    if is_computed(dict(model.named_modules(remove_duplicate=False)).get(layer), leaf):
        module = find_module(model, layer)
        return module, leaf, value_of(module, leaf)
    return find_tensor(model, name)


def is_computed(module: nn.Module | None, leaf: str) -> bool:
    return module is not None and (parametrize.is_parametrized(module, leaf) or _weight_norm(module, leaf) is not None)


def computed_in(module: nn.Module) -> list[str]:
    """The names of all tensors that this module computes."""
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    return [*lists, *(hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm))]


def behind(module: nn.Module, leaf: str) -> list[Tensor]:
    """The parameters that a computed tensor is made from; of any other, itself."""
    if parametrize.is_parametrized(module, leaf):
        return [t for t in _list(module, leaf)._parameters.values() if t is not None]
    if _weight_norm(module, leaf) is not None:
        return [module._parameters[f"{leaf}_g"], module._parameters[f"{leaf}_v"]]  # type: ignore[list-item]
    return [getattr(module, leaf)]


@torch.no_grad()
def value_of(module: nn.Module, leaf: str) -> Tensor:
    """What the module computes there, without moving the parametrization's own state (a power iteration, say)."""
    norm = _weight_norm(module, leaf)
    if norm is not None:
        weight: Tensor = norm.compute_weight(module)
        return weight.detach()
    steps = _list(module, leaf)
    modes = [(step, step.training) for step in steps.modules()]
    steps.eval()
    try:
        value: Tensor = steps()
        return value.detach().clone()
    finally:
        for step, training in modes:
            step.training = training


@torch.no_grad()
def put(module: nn.Module, leaf: str, value: Tensor, name: str, axis: int = 0, keep: Tensor | None = None) -> None:
    """Gives the parameters behind a computed tensor the values that make it `value`; their gradients are dropped.

    Through `right_inverse`; if that fails and `value` is what is kept of an axis, by cutting that axis off the
    parameters themselves, which serves elementwise ones. Raises `EditError`, with everything as it was, where neither
    makes the module compute that value.
    """
    targets = behind(module, leaf)
    state = [*targets, *(_list(module, leaf).buffers() if parametrize.is_parametrized(module, leaf) else ())]
    saved = [(tensor, tensor.data.clone()) for tensor in state]
    whole = value_of(module, leaf).shape
    failure: Exception | None = None
    for index in (None,) if keep is None else (None, keep):
        try:
            parts: Sequence[Tensor] = (
                _inverse(module, leaf, value)
                if index is None
                else [t.data.index_select(axis, index) if t.shape == whole else t.data for t in targets]
            )
            for target, part in zip(targets, parts, strict=True):
                reshape_in_place(target, part.to(target.dtype))
            _check_computed(module, leaf, value)
            break
        except Exception as error:
            failure = failure or error
            for tensor, old in saved:
                reshape_in_place(tensor, old)
    else:
        raise EditError(
            f"{name} is computed by a parametrization that cannot be cut ({type(failure).__name__}: {failure}). Remove it "
            "first: torch.nn.utils.parametrize.remove_parametrizations, or its like; then put it on again."
        ) from failure
    for target in targets:
        target.grad = None
    norm = _weight_norm(module, leaf)
    if norm is not None:
        with torch.enable_grad():
            setattr(module, leaf, norm.compute_weight(module))


def _check_computed(module: nn.Module, leaf: str, value: Tensor) -> None:
    now = value_of(module, leaf)
    slack = 64 * torch.finfo(value.dtype).eps * float(value.abs().amax())
    if now.shape != value.shape or not bool((now - value).abs().le(slack).all()):
        raise ValueError("it computes something else from what its right_inverse makes of the part")


def reshape_in_place(tensor: Tensor, values: Tensor) -> None:
    """Other values, of another shape, in the same tensor object: ties, optimizers and hooks hold on to its identity.

    Autograd remembers a parameter's shape for as long as some earlier graph (a loss that is still in scope) is alive,
    and would refuse the next backward; it forgets when the type changes.
    """
    if tensor.shape != values.shape:
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = values


def _inverse(module: nn.Module, leaf: str, value: Tensor) -> Sequence[Tensor]:
    norm = _weight_norm(module, leaf)
    if norm is not None:
        return torch.norm_except_dim(value, 2, norm.dim), value
    steps = _list(module, leaf)
    parts: Tensor | Sequence[Tensor] = value
    for step in reversed(steps):
        inverse: Any = getattr(step, "right_inverse", None)
        if inverse is None:
            raise ValueError(f"{type(step).__name__} has no right_inverse")
        parts = inverse(parts)
    return (parts,) if isinstance(parts, Tensor) else parts


def _list(module: nn.Module, leaf: str) -> parametrize.ParametrizationList:
    lists: Any = module.parametrizations
    steps: parametrize.ParametrizationList = lists[leaf]
    return steps


def _weight_norm(module: nn.Module, leaf: str) -> WeightNorm | None:
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm) and hook.name == leaf)
    return next(hooks, None)
