# SPDX-License-Identifier: Apache-2.0
"""Centroids at work on one model: gradients are summed before each optimizer step, and members are made equal after it.

Only which weight belongs to which cluster is remembered; the numbers are the weights themselves. Elementwise optimizers
keep members equal by themselves, since all that they read of two members is equal; where one does not (Muon, say),
members take the mean of their cluster. The mean of equal floats is that float: sums are in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherweight.errors import NothingToCompress, NumericalError, OptionError
from featherweight.layers import Selected
from featherweight.plan import Plan
from featherweight.quantize.members import codebooks_of, look
from featherweight.task import describe

if TYPE_CHECKING:
    from featherweight.quantize.centroids import TuneCentroids

__all__ = ["Tuner"]

_VERSION = 1


class Tuner:
    """What `TuneCentroids.attach` gives. Call `step()` after each optimizer step, and `finalize()` at the end.

    `selection` lists every weight of the model, and the vectors that are clustered: tuned or kept, and why.
    """

    selection: tuple[Selected, ...]

    def __init__(self, options: TuneCentroids, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.options = options
        self._optimizer = _innermost(optimizer)
        found, self.selection = look(model, options.layers, options.keep, options.most, self._trained())
        if not found:
            raise NothingToCompress(_nothing(self.selection))
        self._group = getattr(model, "process_group", None)  # DistributedDataParallel's own, if it was given one
        self._codebooks = codebooks_of(found, together=options.share == "model")
        self._finalized = False
        # From here on nothing raises, so that what cannot be attached leaves no hook behind.
        for codebook in self._codebooks:
            codebook.even_out(self._optimizer)
        self._hook = self._optimizer.register_step_pre_hook(self._sum)

    def step(self) -> dict[str, Any]:
        """To be called after each `optimizer.step()`: members of a cluster are equal and zeros are zero afterwards.

        Members that somebody set to zero (a pruner beside this one) are zeros from now on. Returns `clusters`, how many
        numbers are trained. Raises `NumericalError` where one is no longer finite.
        """
        self._refuse_finalized()
        means = [codebook.means() for codebook in self._codebooks]
        _agree(means, self._group)
        for codebook, mean in zip(self._codebooks, means, strict=True):
            if not bool(mean.isfinite().all()):
                raise NumericalError(
                    f"A centroid of {codebook.name} became NaN or infinite. Its gradient is the sum of its members': lower the "
                    "learning rate, or take Adam."
                )
            codebook.write(mean)
        return {"clusters": sum(codebook.clusters for codebook in self._codebooks)}

    def finalize(self) -> Plan:
        """Lets go of the model, whose weights stay where they are. The plan is empty: hints are those of `Cluster`."""
        if not self._finalized:
            self._hook.remove()
            self._finalized = True
        return Plan()

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs besides model and optimizer: which weight belongs to which cluster."""
        return {
            "version": _VERSION,
            "index": {name: index for book in self._codebooks for name, index in book.index().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, to the last bit; the model and the optimizer are restored by you.

        Raises `OptionError` where the state is of other tensors or shapes; nothing is changed then.
        """
        self._refuse_finalized()
        if state.get("version") != _VERSION:
            raise OptionError(
                f"The tuner's saved state has version {state.get('version')!r}; this one reads {_VERSION}."
            )
        own = {name: parameter for codebook in self._codebooks for name, parameter in codebook.parameters().items()}
        different = sorted(set(state["index"]) ^ set(own)) or [
            name for name, index in state["index"].items() if index.shape != own[name].shape
        ]
        if different:
            raise OptionError(
                f"The tuner's saved state is of other clustered tensors (different: {', '.join(different[:5])}). Attach to "
                "the model that was clustered, with the options of the run that saved it."
            )
        for codebook in self._codebooks:
            codebook.load(state["index"])

    def _refuse_finalized(self) -> None:
        if self._finalized:
            raise OptionError("This tuner has been finalized and holds nothing any more; attach again to go on.")

    def _trained(self) -> set[int]:
        every = (p for group in self._optimizer.param_groups for p in group["params"])
        return {id(parameter) for parameter in every if parameter.requires_grad}

    @torch.no_grad()
    def _sum(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before an optimizer step: gradients are final, accumulated, clipped, unscaled and reduced over processes."""
        for codebook in self._codebooks:
            codebook.sum_gradients()


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer inside wrappers that keep it as `.optimizer`, as accelerate's and Lightning's do."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            "Centroids are trained by the optimizer's own steps: attach(model, optimizer) with a torch.optim.Optimizer; "
            f"got {describe(optimizer)}."
        )
    return optimizer


def _nothing(selection: tuple[Selected, ...]) -> str:
    if not selection:
        return "No centroid to tune: the model has no weights (parameters of two axes or more)."
    shown = "; ".join(f"{line.name}: {line.reason}" for line in selection[:5])
    more = f"; and {len(selection) - 5} more" if len(selection) > 5 else ""
    return f"No centroid to tune: none of {len(selection)} weights is clustered. Run Cluster first. {shown}{more}."


def _agree(means: list[Tensor], group: Any) -> None:
    """Takes the first rank's numbers on every rank of a distributed run, so that they cannot part by a rounding."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        return
    joined = torch.cat([mean.to(means[0].device) for mean in means])
    dist.broadcast(joined, group=group, group_src=0)
    for mean, part in zip(means, torch.split(joined, [len(mean) for mean in means]), strict=True):
        mean.copy_(part)
