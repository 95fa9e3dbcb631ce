# SPDX-License-Identifier: Apache-2.0
"""The curvature of the loss along gates: row norms of their Hessian, by probes.

Σ_j H[c, j]² = E_v (H v)_c² for Gaussian v. A product H v is a central difference of gate gradients at m = 1 + h v and
m = 1 - h v: two more ordinary backward passes a probe, which any model has, where a second derivative (fused attention,
cuDNN's recurrent layers) would often be missing. Its error is O(h²), and rounding / h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from featherweight.errors import NumericalError
from featherweight.graph import Group
from featherweight.prune.channels.gates import gate_gradient, gate_members, positions_of

__all__ = ["curvature", "hessian_product"]

Gradients = Callable[[], Mapping[str, Tensor | None]]  # of the loss, by the parameters' names


def hessian_product(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[Group],
    gradients: Gradients,
    direction: Mapping[str, Tensor],
    where: str = "inputs",
) -> dict[str, Tensor]:
    """H v over the gates of all groups together, for v by group. The parameters hold the same bits again afterwards.

    `gradients()` runs the model forward and back. Raises `NumericalError` where a gate has no gradient.
    """
    # For a smooth loss the errors h² and rounding / h balance at the cube root of the rounding.
    dtype = next(iter(parameters.values())).dtype
    step = torch.finfo(torch.promote_types(dtype, torch.float32)).eps ** (1 / 3)
    saved = {m.tensor: parameters[m.tensor].detach().clone() for g in groups for m in gate_members(g, where)}
    sides = []
    try:
        for sign in (step, -step):
            _multiply(parameters, saved, groups, direction, sign, where)
            # dL/dm = Σ w dL/d(m w): the weights as they were, the gradients as they are with the gates.
            found = gradients()
            sides.append({group.name: gate_gradient(group, saved, found, where) for group in groups})
    finally:
        with torch.no_grad():
            for name, values in saved.items():
                parameters[name].copy_(values)
    products = {}
    for group in groups:
        above, below = sides[0][group.name], sides[1][group.name]
        if above is None or below is None:
            raise NumericalError(f"The loss does not depend on group {group.name}, so that its curvature is not known.")
        products[group.name] = (above - below) / (2 * step)
    return products


def curvature(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[Group],
    gradients: Gradients,
    probes: int = 8,
    where: str = "inputs",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The mean of (H v)² over Gaussian probes, by group: an estimate of Σ_j H[c, j]² with a relative error near
    sqrt(2 / probes). Two backward passes a probe."""
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    for _ in range(probes):
        direction = {group.name: torch.randn(group.size, generator=generator) for group in groups}
        for name, product in hessian_product(parameters, groups, gradients, direction, where).items():
            totals[name] = totals.get(name, torch.zeros(())) + product.square().cpu() / probes
    return totals


@torch.no_grad()
def _multiply(
    parameters: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
    groups: Sequence[Group],
    direction: Mapping[str, Tensor],
    step: float,
    where: str,
) -> None:
    """Sets each gated tensor to w (1 + step v), gates of different groups on different axes multiplied."""
    for name, values in saved.items():
        parameters[name].copy_(values)
    for group in groups:
        for member in gate_members(group, where):
            parameter = parameters[member.tensor]
            factor = parameter.new_ones(parameter.shape[member.axis])
            v = direction[group.name].to(factor)
            factor[positions_of(member, factor.device)] += step * v[:, None]
            shape = [1] * parameter.ndim
            shape[member.axis] = -1
            parameter.mul_(factor.view(shape))
