# SPDX-License-Identifier: Apache-2.0
"""How much of a coupling its consumers take in: Σ ||x_c|| Σ |w_c|, Wanda's score (arXiv 2306.11695) per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.graph import Group
from featherweight.layers.weights import CONV, TRANSPOSED, is_conv1d
from featherweight.prune.channels.gates import channels_of, owners_of

__all__ = ["InputNorms"]


class InputNorms:
    """Sums of squares of what consumers read, channel by channel, for as long as it is open (use it in a `with`).

    `reasons` are the groups that it cannot see. Costs one pass over what consumers read.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        owners = owners_of(model)
        self.reasons: dict[str, str] = {}
        self._parts: dict[str, list[tuple[nn.Module, Tensor]]] = {}
        for group in groups:
            inputs = [member for member in group.members if member.role == "input"]
            unseen = next((m for m in inputs if not all(map(_known, owners.get(m.tensor, [None])))), None)
            if not inputs:
                self.reasons[group.name] = "no layer reads it, so that it has no activation to go by"
            elif unseen is not None:
                self.reasons[group.name] = f"what reads it with {unseen.tensor} is out of sight of hooks"
            else:
                self._parts[group.name] = [
                    (m, channels_of(m, member)) for member in inputs for m in owners[member.tensor]
                ]
        self._squares: dict[nn.Module, Tensor] = {}
        watched = {module for parts in self._parts.values() for module, _ in parts}
        self._names: dict[Any, str] = {module: name for name, module in model.named_modules() if module in watched}
        self._hooks: list[Any] = [module.register_forward_pre_hook(self._read) for module in watched]

    def scores(self) -> dict[str, Tensor]:
        """Σ over consumers of ||x_c|| Σ |w_c| (size,) by group, from all read since it was opened or `reset`."""
        found = {}
        for name, parts in self._parts.items():
            if not all(module in self._squares for module, _ in parts):
                continue
            each = [
                (self._squares[m].sqrt() * _columns(m).to(self._squares[m]))[channels].sum(1) for m, channels in parts
            ]
            found[name] = torch.stack([one.cpu() for one in each]).sum(0)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What was read so far, by the name of the layer that read it."""
        return {self._names[module]: squares.cpu().clone() for module, squares in self._squares.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        modules = {name: module for module, name in self._names.items()}
        self._squares = {
            modules[name]: squares.to(modules[name].weight.device, copy=True) for name, squares in state.items()
        }

    def reset(self) -> None:
        """Forgets what was read."""
        self._squares = {}

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> InputNorms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.no_grad()
    def _read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().movedim(1 if isinstance(module, (*CONV, *TRANSPOSED)) else -1, 0).flatten(1)
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(1).double()
        self._squares[module] = self._squares[module] + squares if module in self._squares else squares


def _known(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, *CONV, *TRANSPOSED)) or (module is not None and is_conv1d(module))


def _columns(module: Any) -> Tensor:
    """Σ |w| over all that reads each input channel: (channels,)."""
    weight: Tensor = module.weight.detach().abs()
    if isinstance(module, CONV):
        by_group = weight.view(module.groups, -1, *weight.shape[1:])
        return by_group.transpose(1, 2).flatten(2).sum(2).flatten()
    if isinstance(module, TRANSPOSED) or is_conv1d(module):
        return weight.flatten(1).sum(1)
    return weight.sum(0)
