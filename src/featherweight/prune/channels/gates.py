# SPDX-License-Identifier: Apache-2.0
"""One multiplier m = 1 for each coupling, and the gradient of the loss to it, from weights and their gradients alone.

The gate stands where the coupling is read: it multiplies what each of its consumers takes in, which is the same as to
multiply their columns of weights, so that dL/dm_c = Σ w dL/dw over the coupling's positions in `input` members. Where
no layer with a weight reads the group (the size of attention's queries and keys), the gate stands at the layers that
make it, `output` members, biases included.

Why not always at the layers that make it: a BatchNorm behind a convolution undoes every factor on it, and in training
Σ w dL/dw over such a filter is zero whatever the channel does (`where="outputs"` shows it).

Per sample the same sum is Σ a dL/da over the sample's positions, a being what the consumer reads: hooks see both in an
ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import OptionError
from featherweight.graph import Group, Member
from featherweight.layers.weights import CONV, TRANSPOSED, is_conv1d
from featherweight.task import tensors_in

__all__ = [
    "PLACES",
    "PerSample",
    "channels_of",
    "gate_gradient",
    "gate_members",
    "owners_of",
    "per_position",
    "positions_of",
    "seen_by_hooks",
]

PLACES = ("inputs", "outputs")
_HOOKED = (nn.Linear, *CONV, *TRANSPOSED)


def gate_members(group: Group, where: str = "inputs") -> tuple[Member, ...]:
    """The members at which the group's gates stand: its inputs (its outputs where it has none), or its outputs."""
    own = tuple(member for member in group.members if member.role == ("input" if where == "inputs" else "output"))
    return own or tuple(member for member in group.members if member.role == "output")


def gate_gradient(
    group: Group, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], where: str = "inputs"
) -> Tensor | None:
    """dL/dm (size,) from the model's tensors and their gradients by name; None where one of them has no gradient.

    >>> import numpy as np
    >>> member = Member("fc.weight", 1, "input", np.array([[0], [1]]))
    >>> w, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    >>> gate_gradient(Group("a", 2, (member,)), {"fc.weight": w}, {"fc.weight": g})
    tensor([1., 6.])
    """
    total: Tensor | None = None
    for member in gate_members(group, where):
        value, gradient = values.get(member.tensor), gradients.get(member.tensor)
        if value is None or gradient is None:
            return None
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        wide = torch.promote_types(value.dtype, torch.float32)
        product = value.detach().to(wide) * gradient.to(wide)
        own = per_position(product, member.axis)[positions_of(member, product.device)].sum(1)
        total = own if total is None else total + own.to(total.device)
    return total


def per_position(tensor: Tensor, axis: int) -> Tensor:
    """Sums over all axes but one: (positions of that axis,)."""
    return tensor.movedim(axis, 0).flatten(1).sum(1) if tensor.ndim > 1 else tensor


def positions_of(member: Member, device: torch.device) -> Tensor:
    """A member's positions (size, k) as an index."""
    return torch.from_numpy(member.positions).to(device)


def seen_by_hooks(model: nn.Module, group: Group, where: str = "inputs") -> str | None:
    """None where hooks can see all that the group's gates multiply, else what they cannot see and why."""
    owners = owners_of(model)
    for member in _layers_of(group, where):
        held = owners.get(member.tensor, [])
        if not held or not all(isinstance(module, _HOOKED) or is_conv1d(module) for module in held):
            kind = type(held[0]).__name__ if held else "a parametrization"
            return f"what {kind} makes of {member.tensor} is out of sight of hooks"
    return None


class PerSample:
    """Watches a model while it trains: after each backward pass, Σ a dL/da of each gate for each sample.

    Used in a `with`, or `close()` it. `take()` gives what came since the last call: (samples, size) for each group,
    times the number of samples, since a loss is a mean over them. Samples lie along the first axis of what layers read,
    as batch-first models have them. Costs the memory of a reference to what layers read, which autograd holds anyway.

    Raises `OptionError` for a model whose layers do not read the samples along their first axis.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], where: str = "inputs") -> None:
        self.groups = {group.name: group for group in groups}
        self._sums: dict[str, list[Tensor]] = {}  # of the forward under way, one for each call of a layer
        self._done: dict[str, list[Tensor]] = {}  # of those before it
        self._samples = 0
        names = {id(module): name for name, module in model.named_modules()}
        owners = owners_of(model)
        self._watched: dict[nn.Module, list[tuple[str, bool, Tensor]]] = {}
        for group in groups:
            for member in _layers_of(group, where):
                for module in owners.get(member.tensor, []):
                    own = (group.name, member.role == "input", channels_of(module, member))
                    self._watched.setdefault(module, []).append(own)
        self._names = {module: names[id(module)] for module in self._watched}
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for module in self._watched:
            self._hooks.append(module.register_forward_pre_hook(self._before))
            self._hooks.append(module.register_forward_hook(self._after))

    def take(self) -> dict[str, Tensor]:
        """The gates' gradients (samples, size) by group since last time; groups that no backward reached are absent."""
        self._flush()
        found = {name: torch.cat(parts) for name, parts in self._done.items()}
        self._done = {}
        return found

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sums, self._done = [], {}, {}

    def __enter__(self) -> PerSample:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._flush()
        self._samples = next((len(tensor) for tensor in tensors_in((args, kwargs)) if tensor.ndim), 1)

    def _flush(self) -> None:
        for name, parts in self._sums.items():
            self._done.setdefault(name, []).append(torch.stack(parts).sum(0) * self._samples)
        self._sums = {}

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inward = [(name, channels) for name, inputs, channels in self._watched[module] if inputs]
        if not inward or not args or not torch.is_grad_enabled() or not args[0].is_floating_point():
            return None
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        # A view of its own: what flows back into it is this layer's share alone, though others may read the same
        # tensor.
        alias = x.view_as(x)
        self._watch(module, alias, inward)
        return (alias, *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outward = [(name, channels) for name, inputs, channels in self._watched[module] if not inputs]
        if outward and output.requires_grad:
            self._watch(module, output, outward)

    def _watch(self, module: nn.Module, tensor: Tensor, gates: list[tuple[str, Tensor]]) -> None:
        values, version = tensor.detach(), tensor._version
        axis = 1 if isinstance(module, (*CONV, *TRANSPOSED)) else -1

        def read(gradient: Tensor) -> None:
            if values._version != version:
                raise OptionError(
                    f"{self._names[module]}: what it works on is changed in place before the backward pass, so that its "
                    "gates cannot be told sample by sample. Use importance='cpd', or inplace=False there."
                )
            if len(values) % self._samples:
                raise OptionError(
                    f"{self._names[module]} reads {tuple(values.shape)} of {self._samples} samples: they do not lie along "
                    "the first axis, so that its gates cannot be told sample by sample. Use importance='cpd'."
                )
            wide = torch.promote_types(values.dtype, torch.float32)
            product = (values.to(wide) * gradient.to(wide)).movedim(axis, -1)
            sums = product.reshape(self._samples, -1, product.shape[-1]).sum(1)
            for name, channels in gates:
                own = sums[:, channels.to(sums.device)].sum(2)
                self._sums.setdefault(name, []).append(own)

        tensor.register_hook(read)  # type: ignore[no-untyped-call]


def channels_of(module: nn.Module, member: Member) -> Tensor:
    """The channels (size, k) of what a layer reads or makes that a member's positions are, conv groups spelt out."""
    positions = torch.from_numpy(member.positions)
    within = CONV if member.role == "input" else TRANSPOSED  # whose axis 1 runs within each conv group
    if isinstance(module, (*CONV, *TRANSPOSED)) and isinstance(module, within):
        run = module.weight.shape[1]
        return torch.cat([positions + run * group for group in range(module.groups)], dim=1)
    return positions


def _layers_of(group: Group, where: str) -> list[Member]:
    """The gates' members but for biases: a layer's output is seen with its weight, bias and all."""
    return [member for member in gate_members(group, where) if not member.tensor.endswith("bias")]


def owners_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Modules that read each parameter, by each of its names. An attention never calls its `out_proj`, and owns it."""
    never = {module.out_proj: module for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held = holders.setdefault(id(parameter), [])
            owner = never.get(module, module)  # type: ignore[call-overload]
            if owner not in held:
                held.append(owner)
    named = model.named_parameters(remove_duplicate=False)
    return {name: holders[id(parameter)] for name, parameter in named}
