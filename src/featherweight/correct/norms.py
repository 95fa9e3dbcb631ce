# SPDX-License-Identifier: Apache-2.0
"""Mean and variance correction: what BatchNorm's re-estimation is to convolutional networks, for all with other norms.

After "Optimal Brain Compression" (Frantar and Alistarh, 2022), which corrects the outputs of norms by hooks. Here the
correction y -> (y - mean) · std_ref / std + mean_ref of each channel is folded into the norm's own weight and bias:
nothing is added to the model, and what is saved is what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from featherweight.correct.keep import Moved
from featherweight.correct.outputs import Forward
from featherweight.correct.surroundings import canonical, shared_parameters
from featherweight.correct.walk import Measured, Moments, Site, tokens, walk
from featherweight.correct.zeros import put, standing_zeros
from featherweight.layers import unwrap
from featherweight.layers.inputs import Call

__all__ = ["affine_norms", "match_moments", "norm_site"]

_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, _BatchNorm)


def match_moments(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    *,
    frozen: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda step, total: None,
) -> Moved:
    """Gives every norm of your model outputs of the reference's mean and standard deviation, channel by channel.

    In one pass, each norm with all earlier ones corrected, see `walk`. LayerNorm, RMSNorm, GroupNorm, InstanceNorm,
    BatchNorm, and modules of other libraries whose class is called a norm; one without a bias gets the reference's mean
    square. Folded into weight and bias; `frozen` parameters, tied ones and zeros that pruning made stay. Saves nothing.

    Raises `OptionError`, `DataError` or `NumericalError`; the model is then as it was.

    >>> reference, model = nn.LayerNorm(3), nn.LayerNorm(3)
    >>> model.weight.data *= 0.5
    >>> match_moments(model, reference, [torch.randn(64, 3)], lambda model, batch: model(batch)).names
    ('weight', 'bias')
    >>> model.weight.detach().round(decimals=3)
    tensor([1., 1., 1.])
    """
    fixed = canonical(model, frozen)
    norms, left = affine_norms(model, fixed)
    held = standing_zeros(model, reference)
    if not norms:
        return Moved((), left)
    sites = [norm_site(name, norm, held) for name, norm in norms.items()]
    done, unreached = walk(model, reference, sites, batches, forward, progress)
    return Moved(tuple(done), left | unreached)


def affine_norms(model: nn.Module, fixed: Collection[int] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The norms whose weight can be corrected, by name, and those that are left alone, with the reason.

    `fixed` are identities of parameters that may not move.
    """
    norms: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    shared = shared_parameters(model)
    for name, module in unwrap(model).named_modules():
        if not isinstance(module, _TORCH_NORMS) and not type(module).__name__.endswith(("Norm", "Norm2d")):
            continue
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if weight is None or is_lazy(weight):
            if not any(True for _ in module.children()):  # else a block that is called a norm, not one itself
                left[name] = "has no weight to fold into"
        elif any(id(parameter) in fixed for parameter in own.values()):
            left[name] = "is frozen"
        elif any(id(parameter) in shared for parameter in own.values()):
            left[name] = "shares its parameters with another layer"
        else:
            norms[name] = module
    return norms, left


def norm_site(name: str, norm: nn.Module, held: dict[int, Tensor]) -> Site:
    """Gives a norm outputs of the reference's moments; the two must be called alike."""
    affine: dict[str, _Affine | None] = {}

    def read(call: Call) -> dict[str, Tensor] | str:
        if name not in affine:
            affine[name] = _try(call)  # the same for both models
        found, weight = affine[name], call.module._parameters["weight"]
        if found is None or weight is None:
            return "its output is not weight · normalized input + bias"
        output: Tensor = call.output
        last = output.flatten(-weight.ndim) if weight.ndim > 1 else output.movedim(found.axis, -1)
        return {"output": tokens(last, call.mask if found.axis == -1 else None)}

    def fold(module: nn.Module, dense: nn.Module, mine: Measured, target: Measured) -> Sequence[str] | str:
        found = affine[name]
        return "" if found is None else _fold(name, module, mine["output"], target["output"], found.added, held)

    return Site(name, name, list(norm.parameters(recurse=False)), read, fold)


@dataclasses.dataclass(frozen=True)
class _Affine:
    """output = (weight + added) · normalized input + bias, the channels of a one-dimensional weight on `axis`."""

    axis: int
    added: float


def _try(call: Call) -> _Affine | None:
    """How the norm's output depends on its weight, found by trying; None where it does so in no way that is known here.

    Every library has norms of its own: some add 1 to their weight, some have their channels second. Where the weight is
    set to what cancels it, only the bias may be left. The layer is left as it was.
    """
    module, weight, bias = call.module, call.module._parameters["weight"], call.module._parameters.get("bias")
    if weight is None or not isinstance(call.output, Tensor):
        return None
    old = weight.detach().clone()
    rest = torch.zeros_like(old) if bias is None else bias.detach()
    every_other = (torch.arange(weight.numel(), device=weight.device) % 2 == 0).view(weight.shape)
    try:
        for added in (0.0, 1.0):
            weight.masked_fill_(every_other, -added)
            given = module.forward(*call.args, **call.kwargs)
            for axis in (-1, 1) if weight.ndim == 1 and given.ndim > 1 else (-1,):
                last = given.movedim(axis, -1)
                fits = last.shape[-weight.ndim :] == weight.shape
                if fits and bool((last[..., every_other] == rest.to(last.dtype)[every_other]).all()):
                    return _Affine(axis, added)
    finally:
        weight.copy_(old)
    return None


def _fold(
    name: str, module: nn.Module, mine: Moments, target: Moments, added: float, held: dict[int, Tensor]
) -> Sequence[str]:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is None:
        return []
    goal, goal_mean = target.power if bias is None else target.variance, target.mean.to(mine.mean.device)
    own = mine.power if bias is None else mine.variance
    # A channel that does not vary but for rounding cannot be scaled; its mean can still be moved.
    steady = own <= torch.finfo(weight.dtype).eps ** 2 * mine.power
    scale = torch.where(steady, 1.0, goal.to(own.device) / own).sqrt()
    wide = weight.detach().to(torch.float64)
    put(weight, (wide + added) * scale.view(weight.shape) - added, held)
    if bias is None:
        return [f"{name}.weight".lstrip(".")]
    shift = goal_mean - scale * mine.mean
    put(bias, scale.view(bias.shape) * bias.detach().to(torch.float64) + shift.view(bias.shape), held)
    return [f"{name}.{part}".lstrip(".") for part in ("weight", "bias")]
