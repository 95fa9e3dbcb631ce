# SPDX-License-Identifier: Apache-2.0
"""Clusters read from values: which tensors take few different ones, and which of their entries are one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from featherweight.errors import OptionError
from featherweight.layers import Selected, matches, select, unwrap, weights

__all__ = ["Codebook", "codebooks_of", "look"]

_PEEK = 1 << 14  # so many values show that a tensor is not clustered
_FEW = 64  # of so few floats, two that are equal did not come by chance


def look(
    model: nn.Module, layers: Sequence[str], keep: Sequence[str], most: int, trained: Collection[int] | None = None
) -> tuple[dict[str, nn.Parameter], tuple[Selected, ...]]:
    """The clustered tensors by name, and a line for each weight and each clustered vector: tuned or kept, and why.

    A tensor is clustered if it has at most `most` different values besides zero and a quarter of its entries at least
    repeat one. `trained` are the identities of parameters that an optimizer moves; None takes all.

    >>> layer = nn.Linear(4, 4)
    >>> layer.weight.data = torch.tensor([0.5, -0.5, 0.0, 0.5]).repeat(4, 1)
    >>> list(look(layer, ["*"], (), 16)[0])
    ['weight']
    """
    model = unwrap(model)
    found, left = weights(model)
    kinds = {weight.name: weight.kind for weight in found}
    aliases = {weight.name: weight.aliases for weight in found}
    everything = dict(model.named_parameters())
    for option, globs in (("layers", layers), ("keep", keep)):
        if everything:
            select([*everything, *(other for names in aliases.values() for other in names)], globs, option=option)
    chosen: dict[str, nn.Parameter] = {}
    lines = []
    for name, parameter in everything.items():
        names = (name, *aliases.get(name, ()))
        reason = left.get(name) or _unwanted(names, parameter, layers, keep, trained)
        count = 0
        if reason is None:
            count = _count(parameter.detach(), most)
            reason = (
                None if count else f"it is not clustered: more than {most} different values, or too few that repeat"
            )
        if reason is None:
            chosen[name] = parameter
        if name in kinds or reason is None:
            zeros = 1 - int(parameter.count_nonzero()) / max(1, parameter.numel())
            action, why = ("tuned", f"{count} different values besides zero") if reason is None else ("kept", reason)
            shape = tuple(parameter.shape)
            lines.append(Selected(name, kinds.get(name, "vector"), shape, parameter.numel(), action, zeros, why))
    return chosen, tuple(lines)


def _unwanted(
    names: Sequence[str],
    parameter: nn.Parameter,
    layers: Sequence[str],
    keep: Sequence[str],
    trained: Collection[int] | None,
) -> str | None:
    if not any(matches(name, layers) for name in names):
        return "no glob of layers names it"
    if any(matches(name, keep) for name in names):
        return "a glob of keep names it"
    if isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.is_floating_point():
        return "it has no real values"
    if trained is not None and id(parameter) not in trained:
        return "it is not trained: it has requires_grad=False or is not the optimizer's"
    return None


def _count(values: Tensor, most: int) -> int:
    """How many different values besides zero a clustered tensor has; 0 for one that is not."""
    flat = values.reshape(-1)
    if len(_unique(flat[:_PEEK])) > most + 1:
        return 0
    flat = flat[flat != 0]
    count, size = len(_unique(flat)), len(flat)
    if count > most or size - count < (1 if size <= _FEW else size // 4):
        return 0
    # Of nothing but one value is a norm that was just made.
    return 0 if count == 1 and size == values.numel() else count


@dataclasses.dataclass(eq=False)
class _Member:
    """The entries of one tensor that are not zero: at `where` of its flat form (None: all), of cluster `which`."""

    name: str
    parameter: nn.Parameter
    where: Tensor | None
    which: Tensor

    # `index_select` and `scatter_` cost a quarter of what indexing by brackets costs here, and this runs at every step.

    def take(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        return flat if self.where is None else flat.index_select(0, self.where)

    def put(self, tensor: Tensor, numbers: Tensor) -> None:
        """Fills a tensor of the parameter's shape with each cluster's number, and zeros elsewhere."""
        own = numbers.to(tensor.device, tensor.dtype).index_select(0, self.which)
        if self.where is None:
            tensor.copy_(own.view(tensor.shape))
        elif tensor.is_contiguous():
            tensor.zero_().view(-1).scatter_(0, self.where, own)
        else:
            tensor.copy_(own.new_zeros(tensor.numel()).scatter_(0, self.where, own).view(tensor.shape))

    def drop_zeros(self) -> bool:
        """Entries that are zero by now belong to no cluster any more."""
        values = self.take(self.parameter)
        if int(values.count_nonzero()) == len(values):
            return False
        kept = values != 0
        where = torch.arange(self.parameter.numel(), device=kept.device) if self.where is None else self.where
        self.where, self.which = where[kept], self.which[kept]
        return True


class Codebook:
    """One codebook: the tensors that share it, and which of their entries have which of its numbers."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        values = [parameter.detach().reshape(-1) for parameter in parameters.values()]
        nonzero = [None if bool(flat.all()) else flat.nonzero().reshape(-1) for flat in values]
        kept = [flat if at is None else flat[at] for flat, at in zip(values, nonzero, strict=True)]
        together = torch.cat([part.to(values[0].device) for part in kept])
        numbers, which = together.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        parts = torch.split(which, [len(part) for part in kept])
        self.clusters = len(numbers)
        self._members = [
            _Member(name, parameter, at, part.to(parameter.device))
            for (name, parameter), at, part in zip(parameters.items(), nonzero, parts, strict=True)
        ]
        self._recount()

    @property
    def name(self) -> str:
        """The first of its tensors."""
        return self._members[0].name

    def parameters(self) -> dict[str, nn.Parameter]:
        return {member.name: member.parameter for member in self._members}

    def index(self) -> dict[str, Tensor]:
        """For each tensor, in its shape: 0 where it is zero, else one more than the cluster."""
        indices = {}
        for member in self._members:
            indices[member.name] = torch.zeros_like(member.parameter, dtype=torch.int16, requires_grad=False)
            member.put(indices[member.name], torch.arange(1, self.clusters + 1))
        return indices

    def load(self, indices: Mapping[str, Tensor]) -> None:
        """Takes what `index` gave."""
        for member in self._members:
            flat = indices[member.name].reshape(-1).to(member.parameter.device, torch.int64)
            member.where = None if bool(flat.all()) else flat.nonzero().reshape(-1)
            member.which = member.take(flat) - 1
        self.clusters = max(int(indices[member.name].max()) for member in self._members)
        self._recount()

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Gives every member the sum over its cluster; a tensor of the codebook that has no gradient gets one too."""
        gradients = [member.parameter.grad for member in self._members]
        if all(gradient is None for gradient in gradients):
            return
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            raise OptionError(
                f"{self.name} has a sparse gradient (an Embedding with sparse=True), but its clusters reach into rows that "
                "the batch did not read. Build it with sparse=False."
            )
        total = self._total(gradients)
        for member, gradient in zip(self._members, gradients, strict=True):
            if gradient is None:
                gradient = member.parameter.grad = torch.empty_like(member.parameter)
            member.put(gradient, total)

    @torch.no_grad()
    def means(self) -> Tensor:
        """Each cluster's number (clusters,), in float64: the mean of its members, exact where they are equal."""
        dropped = [member.drop_zeros() for member in self._members]
        if any(dropped):
            self._recount()
        return self._total([member.parameter for member in self._members]) / self._counts

    @torch.no_grad()
    def write(self, numbers: Tensor) -> None:
        """Puts numbers (clusters,) into all tensors, and zeros elsewhere."""
        for member in self._members:
            member.put(member.parameter, numbers)

    def even_out(self, optimizer: torch.optim.Optimizer) -> None:
        """What an optimizer remembers of each entry becomes the mean over its cluster, and 0 where a weight is zero."""
        states = [optimizer.state.get(member.parameter, {}) for member in self._members]
        for key in states[0]:
            tensors = [state.get(key) for state in states]
            if all(_is_of(tensor, member) for tensor, member in zip(tensors, self._members, strict=True)):
                numbers = self._total(tensors) / self._counts
                for member, tensor in zip(self._members, tensors, strict=True):
                    member.put(tensor, numbers)

    def _total(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Sums over each cluster (clusters,) of tensors of the members' shapes; None adds nothing."""
        total = torch.zeros(self.clusters, dtype=torch.float64, device=self._members[0].which.device)
        for member, tensor in zip(self._members, tensors, strict=True):
            if tensor is not None:
                own = torch.zeros(self.clusters, dtype=torch.float64, device=tensor.device)
                own.index_add_(0, member.which, member.take(tensor).double())
                total += own.to(total.device)
        return total

    def _recount(self) -> None:
        counts = [member.which.bincount(minlength=self.clusters).cpu() for member in self._members]
        # A number that nobody has any more is 0 / 1.
        self._counts = torch.stack(counts).sum(0).clamp_min(1).to(self._members[0].which.device)


def codebooks_of(parameters: Mapping[str, nn.Parameter], together: bool) -> list[Codebook]:
    """One codebook a tensor, or one for all of a dtype."""
    groups: dict[Any, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(parameter.dtype if together else name, {})[name] = parameter
    return [Codebook(group) for group in groups.values()]


def _is_of(tensor: object, member: _Member) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.shape == member.parameter.shape and tensor.is_floating_point()


def _unique(tensor: Tensor) -> Tensor:
    values: Tensor = tensor.unique()  # type: ignore[no-untyped-call]
    return values
