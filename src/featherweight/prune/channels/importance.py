# SPDX-License-Identifier: Apache-2.0
"""What is cut first: a score for each coupling of a group, one small function each. The lowest go first.

From the weights alone:
- magnitude: the root of the summed squares of all that the coupling takes along in layers, rows and columns (the
  survey's sqrt(row² + column²) for a neuron); magnitude_l1 sums |w|.
- batch_norm: Σ |γ| of its BatchNorms (Liu et al. 2017, arXiv 1708.06519).
- geometric_median: the sum of distances to all other couplings' rows, low where others say the same (He et al. 2019,
  arXiv 1811.00250).
- random, seeded by the group's name.

From gates (`gates.py`), m = 1 on each coupling, summed over the interval or the calibration batches:
- taylor: |dL/dm| of a batch (Molchanov et al. 2017, arXiv 1611.06440).
- cpd: (dL/dm)² of a batch (Comb, Prune, Distill, arXiv 2408.03046).
- fisher: ½ Σ_n (dL_n/dm)², its members summed inside the square, squared per sample (Liu et al. 2021, arXiv
  2108.00708).
- heads: E_n |dL_n/dm|, then L2-normalised in each group (Michel et al. 2019, arXiv 1905.10650); `michel` is the same.
- curvature: E_v (H v)_c² = Σ_j H[c, j]², H the gates' Hessian, by Gaussian probes (`curvature.py`).

From what consumers read:
- activation: Σ over consumers of ||x_c|| Σ |w_c|, as Wanda has it for single weights (arXiv 2306.11695).
- structured_obs: what cutting it adds to the loss of its consumers once they are refitted (`obs.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featherweight.errors import NumericalError, OptionError
from featherweight.graph import Group, Member
from featherweight.prune.channels.gates import per_position, positions_of
from featherweight.task import describe

__all__ = [
    "IMPORTANCES",
    "OF_GATES",
    "OF_LOSS",
    "OF_WEIGHTS",
    "PER_SAMPLE",
    "Importance",
    "normalized",
    "of_weights",
    "users",
]

# A function of the user's: the group and the model's tensors by name to a score for each coupling (size,).
Importance = Callable[[Group, Mapping[str, Tensor]], Tensor]


def magnitude(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """sqrt(Σ w²) over the coupling's positions in weights and biases of layers."""
    return _summed(group, tensors, torch.square).sqrt()


def magnitude_l1(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Σ |w| over the coupling's positions in weights and biases of layers."""
    return _summed(group, tensors, torch.abs)


def geometric_median(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Σ_j ||w_c - w_j||, w_c being all that the layers hold that make coupling c."""
    rows = [_rows(member, tensors) for member in group.members if member.role == "output"]
    together = torch.cat(rows, dim=1)
    return torch.cdist(together, together, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


OF_WEIGHTS: dict[str, Importance] = {
    "magnitude": magnitude,
    "magnitude_l1": magnitude_l1,
    "geometric_median": geometric_median,
}


def batch_norm(group: Group, tensors: Mapping[str, Tensor], scales: frozenset[str]) -> Tensor | None:
    """Σ |γ| over the group's members among `scales`, the weights of BatchNorms; None where it has none."""
    found = [member for member in group.members if member.tensor in scales]
    if not found:
        return None
    return torch.stack([_rows(member, tensors).abs().sum(1) for member in found]).sum(0)


def random_scores(group: Group, seed: int, step: int = 0) -> Tensor:
    """Uniform, the same for the same seed, step and name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}/{group.name}".encode()))
    return torch.rand(group.size, generator=generator)


def taylor(gradients: Tensor) -> Tensor:
    """|dL/dm| of one batch, from (1, size)."""
    return gradients.sum(0).abs()


def cpd(gradients: Tensor) -> Tensor:
    """(dL/dm)² of one batch, from (1, size)."""
    return gradients.sum(0).square()


def fisher(gradients: Tensor) -> Tensor:
    """½ Σ_n (dL_n/dm)² from each sample's gradients (samples, size)."""
    return gradients.square().sum(0) / 2


def heads(gradients: Tensor) -> Tensor:
    """Σ_n |dL_n/dm| from each sample's gradients (samples, size)."""
    return gradients.abs().sum(0)


OF_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "taylor": taylor,
    "cpd": cpd,
    "fisher": fisher,
    "heads": heads,
    "michel": heads,
}
PER_SAMPLE = ("fisher", "heads", "michel")
# Scores that say what the loss would lose, and compare between layers.
OF_LOSS = (*OF_GATES, "curvature")
IMPORTANCES = (*OF_WEIGHTS, "batch_norm", "random", *OF_GATES, "curvature", "activation", "structured_obs")


def of_weights(
    group: Group, tensors: Mapping[str, Tensor], importance: str, seed: int, step: int, scales: frozenset[str]
) -> Tensor | str:
    """The score of each coupling by an importance that needs no data, or the reason why the group has none."""
    if importance == "random":
        return random_scores(group, seed, step)
    if importance == "batch_norm":
        found = batch_norm(group, tensors, scales)
        return "no BatchNorm scales its channels; another importance can rank it" if found is None else found
    return OF_WEIGHTS[importance](group, tensors)


def users(group: Group, tensors: Mapping[str, Tensor], importance: Importance) -> Tensor:
    """Scores of a function of the user's, checked. Raises `OptionError` for a wrong shape, `NumericalError` for NaN."""
    with torch.no_grad():
        scores = importance(group, tensors)
    if not isinstance(scores, Tensor) or scores.shape != (group.size,):
        raise OptionError(
            f"importance gave {describe(scores)} for group {group.name}; it must give a score for each coupling, "
            f"Tensor[{group.size}]. Couplings with the lowest scores are cut first."
        )
    return scores.detach().to("cpu", torch.float64)


def normalized(scores: Tensor, how: str) -> Tensor:
    """Scores of one group, divided by their mean or their L2 norm (`none`: as they are), in float64 on the CPU.

    >>> normalized(torch.tensor([3.0, 4.0]), "l2").tolist()
    [0.6, 0.8]
    """
    wide = scores.detach().to("cpu", torch.float64)
    size = {"none": 1.0, "mean": float(wide.abs().mean()), "l2": float(wide.norm())}[how]
    return wide / size if size > 0 else wide


def check_finite(name: str, scores: Tensor) -> Tensor:
    """The scores. Raises `NumericalError` that names the group for what cannot be ranked; +inf marks what must stay."""
    if not bool((scores > -torch.inf).all()):
        raise NumericalError(
            f"The importance of group {name} is NaN or minus infinity, which cannot be ranked: a weight, a gradient or an "
            "activation is not finite. Nothing was cut. Lower the learning rate, or look at the data."
        )
    return scores


def _rows(member: Member, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a member holds of each coupling, (size, numbers), in at least float32."""
    tensor = tensors[member.tensor].detach()
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).movedim(member.axis, 0)
    return wide.flatten(1)[positions_of(member, wide.device)].flatten(1) if wide.ndim > 1 else _flat(member, wide)


def _flat(member: Member, wide: Tensor) -> Tensor:
    return wide[positions_of(member, wide.device)]


def _summed(group: Group, tensors: Mapping[str, Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    total: Tensor | None = None
    for member in group.members:
        if member.role == "scale" or not tensors[member.tensor].is_floating_point():
            continue
        tensor = tensors[member.tensor].detach()
        values = of(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))
        own = per_position(values, member.axis)[positions_of(member, tensor.device)].sum(1)
        total = own if total is None else total + own.to(total.device)
    if total is None:
        raise OptionError(f"group {group.name} takes no weight of a layer along, so that magnitude cannot rank it.")
    return total
