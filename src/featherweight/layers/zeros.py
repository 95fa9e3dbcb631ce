# SPDX-License-Identifier: Apache-2.0
"""Masks are zeros: entries of parameters that stay zero while any optimizer trains the rest.

No parametrization and no buffer: state-dict keys, ties, `deepcopy`, export, `torch.compile` and DDP work as before,
because a pruned weight *is* zero. A hook on the parameter masks its gradient as it is accumulated (before processes
share it and before it is clipped); after each optimizer step the zeros are put back, and the optimizer's momentum is
cleared where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.layers.weights import Weight, weights

__all__ = ["Zeros", "existing_zeros", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel and `torch.compile`, in any nesting."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What torch's optimizers divide by the root of. On a CPU it is one, not zero, where a weight is held: it moves nothing,
# but the vector library takes the root of a zero six times as slowly, and what only decays ends in denormals, slower
# still.
_SECOND_MOMENTS = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"))


class Zeros:
    """The entries that are held at zero, by parameter identity: a tied parameter is one.

    `optimizer` may be None (then nothing but weights and gradients is held). Cost of `enforce`: one pass over the held
    parameters and over each state tensor of their shape; no copy. A mask takes as much memory as its parameter.
    """

    # A mask is kept as all ones or all zeros in the bits of an integer as wide as the weight. `and` is exact where a
    # product is not (-1.5 * 0 is -0.0, NaN * 0 is NaN: neither is a zero to a codec), and on a CPU costs a fifteenth
    # of masked_fill_, which would be more than a tenth of a training step of a fully connected network.

    def __init__(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.optimizer = optimizer
        self._held: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._hooks: dict[int, Any] = {}

    def hold(self, parameter: nn.Parameter, pruned: Tensor) -> None:
        """Holds the entries where `pruned` (bool, the parameter's shape) is True at zero, instead of any before."""
        key = id(parameter)
        kept = torch.empty_like(parameter, dtype=_BITS[parameter.element_size()], requires_grad=False)
        kept.copy_(pruned).sub_(1)  # True is 0, False is -1, which is all ones
        self._held[key] = (parameter, kept)
        if key not in self._hooks and parameter.requires_grad:
            self._hooks[key] = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._mask_gradient
            )
        self._enforce(parameter, kept)

    def pruned(self, parameter: nn.Parameter) -> Tensor | None:
        """What is held of this parameter (bool, its shape), or None."""
        held = self._held.get(id(parameter))
        return None if held is None else held[1] == 0

    def __iter__(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((parameter, kept == 0) for parameter, kept in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def enforce(self, states: bool = True) -> None:
        """Puts zeros back into weights and, with `states`, into optimizer state. Call it after each optimizer step.

        Momentum of masked gradients stays zero by itself; `states` is for optimizers that make something else of them,
        and for second moments, which decay. Now and then is enough.
        """
        for key, (parameter, kept) in self._held.items():
            if kept.device != parameter.device:  # the model was moved after the mask was made
                kept = kept.to(parameter.device)
                self._held[key] = (parameter, kept)
            self._enforce(parameter, kept, states)

    def release(self) -> None:
        """Removes the gradient hooks. The zeros stay where they are, and nothing holds them from now on."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._held.clear()

    @torch.no_grad()
    def _enforce(self, parameter: nn.Parameter, kept: Tensor, states: bool = True) -> None:
        _clear(parameter, kept)
        if self.optimizer is None or not states:
            return
        for name, value in self.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                _clear(value, kept, to_one=value.is_cpu and name in _SECOND_MOMENTS)

    @torch.no_grad()
    def _mask_gradient(self, parameter: Tensor) -> None:
        """In place: what has been accumulated is the parameter's own. Where a graph was asked for, it is kept."""
        gradient = parameter.grad
        if gradient is None:
            return
        kept = self._held[id(parameter)][1].to(gradient.device)
        if gradient.is_sparse:  # an embedding with sparse=True
            gradient = gradient.coalesce()
            values = gradient.values().masked_fill(kept[tuple(gradient.indices())] == 0, 0.0)
            parameter.grad = torch.sparse_coo_tensor(
                gradient.indices(), values, gradient.shape, is_coalesced=True, check_invariants=False
            )
        elif gradient.requires_grad:
            with torch.enable_grad():
                parameter.grad = gradient.masked_fill(kept == 0, 0.0)
        else:
            _clear(gradient, kept)


def _clear(tensor: Tensor, kept: Tensor, to_one: bool = False) -> None:
    """Sets zeros (or ones) in place where `kept` has no bits; a state tensor may be wider than its parameter."""
    if tensor.element_size() != kept.element_size():
        tensor.masked_fill_(kept == 0, float(to_one))
        return
    bits = tensor.view(kept.dtype)
    bits.bitwise_and_(kept)
    if to_one:
        one = int(torch.ones((), dtype=tensor.dtype).view(kept.dtype))
        bits.add_(kept + 1, alpha=one)


def existing_zeros(model: nn.Module) -> list[tuple[Weight, Tensor]]:
    """The zeros that an earlier stage made: weights that have some, each with its mask (True where zero).

    A weight of nothing but zeros is one that starts at zero (an adapter, a zero-initialised branch), not a pruned one,
    and is left out; so is an embedding whose only zeros are its padding row, which torch keeps still by itself.

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data[0, 1] = 0.0
    >>> [(w.name, pruned.tolist()) for w, pruned in existing_zeros(layer)]
    [('weight', [[False, True], [False, False]])]
    """
    found = []
    for weight in weights(unwrap(model))[0]:
        pruned = weight.parameter.detach() == 0
        padding = getattr(weight.module, "padding_idx", None)
        count = int(pruned.sum())
        if padding is not None and count == int(pruned[padding].sum()):
            continue
        if 0 < count < pruned.numel():
            found.append((weight, pruned))
    return found
