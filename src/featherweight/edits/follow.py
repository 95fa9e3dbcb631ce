# SPDX-License-Identifier: Apache-2.0
"""What goes along with a cut: an optimizer's moments of the parameters that were sliced, and averaged copies (EMA).

Parameters keep their identity, so that an optimizer goes on working; only its moments are cut as the parameter was. A
swap makes new parameters of an old one, which take its place, its options and their part of its moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.edits.apply import apply
from featherweight.edits.effective import behind, find_effective
from featherweight.edits.find import find_module
from featherweight.edits.swap import Attention
from featherweight.errors import EditError, OptionError
from featherweight.plan import Edit, Slice, Swap

__all__ = ["Followers", "apply_followed", "followers"]


@dataclass(frozen=True, eq=False)
class Followers:
    """Optimizers whose state is cut along, and copies of the model that get the same edits."""

    optimizers: tuple[torch.optim.Optimizer, ...]
    copies: tuple[nn.Module, ...]


def followers(model: nn.Module, follow: Iterable[Any]) -> Followers:
    """Sorts what follows. Raises `OptionError` for what is neither an optimizer nor a copy of the model.

    Wrapped ones (accelerate's optimizers, `torch.optim.swa_utils.AveragedModel`) are looked into.
    """
    optimizers, copies = [], []
    names = set(model.state_dict())
    for one in follow:
        inner = getattr(one, "optimizer", None)
        if isinstance(one, torch.optim.Optimizer) and not isinstance(inner, torch.optim.Optimizer):
            optimizers.append(one)
        elif isinstance(inner, torch.optim.Optimizer):
            optimizers.append(inner)
        elif isinstance(one, nn.Module) and (copy := _copy_in(one, names)) is not None:
            copies.append(copy)
        else:
            raise OptionError(
                f"follow: a {type(one).__name__} is neither an optimizer nor a copy of the model with the same tensors."
            )
    return Followers(tuple(optimizers), tuple(copies))


def _copy_in(module: nn.Module, names: set[str]) -> nn.Module | None:
    inner = getattr(module, "module", None)
    candidates = [module, *([inner] if isinstance(inner, nn.Module) else [])]
    return next((candidate for candidate in candidates if set(candidate.state_dict()) == names), None)


def apply_followed(model: nn.Module, edits: Iterable[Edit], following: Followers) -> None:
    """Applies edits in order to your model, its copies and the state of its optimizers, in place.

    Raises `EditError`; what was done by then stays done.
    """
    for edit in edits:
        for copy in following.copies:
            apply(copy, edit)
        if isinstance(edit, Slice):
            module, leaf, _ = find_effective(model, edit.tensor)
            sliced = [(tensor, tensor.shape) for tensor in behind(module, leaf)]
            apply(model, edit)
            for tensor, shape in sliced:
                if tensor.shape != shape:
                    _cut_state(following.optimizers, tensor, shape, edit)
        elif isinstance(edit, Swap):
            old = find_module(model, edit.layer)
            apply(model, edit)
            _follow_swap(following.optimizers, old, find_module(model, edit.layer))
        else:
            apply(model, edit)


def _cut_state(
    optimizers: Iterable[torch.optim.Optimizer], parameter: Tensor, shape: Sequence[int], edit: Slice
) -> None:
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape and value.ndim:
                state[key] = value.index_select(edit.axis, torch.tensor(edit.keep, device=value.device))
            elif not _is_scalar(value):
                raise EditError(
                    f"{edit.tensor}: {type(optimizer).__name__} keeps {key!r} of it in a form that cannot be cut; leave "
                    "it out of `follow` and make a new one afterwards. SGD, Adam and AdamW can be cut."
                )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _follow_swap(optimizers: Iterable[torch.optim.Optimizer], old: nn.Module, new: nn.Module) -> None:
    """torch's attention fuses what ours holds as three parameters; all others are the same objects in both."""
    if not (isinstance(old, nn.MultiheadAttention) and isinstance(new, Attention)):
        return
    parts: Any = (new.q, new.k, new.v)
    for fused, leaf in ((old.in_proj_weight, "weight"), (old.in_proj_bias, "bias")):
        if fused is None:
            continue
        made = [getattr(part, leaf) for part in parts]
        for optimizer in optimizers:
            _split_state(optimizer, fused, made)


def _split_state(optimizer: torch.optim.Optimizer, fused: Tensor, made: Sequence[Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [p for one in group["params"] for p in (made if one is fused else (one,))]
    state = optimizer.state.pop(fused, None)
    for key, value in (state or {}).items():
        whole = isinstance(value, Tensor) and value.shape == fused.shape
        if not whole and not _is_scalar(value):
            raise EditError(
                f"{type(optimizer).__name__} keeps {key!r} in a form that cannot be split with its parameter."
            )
        for i, parameter in enumerate(made):
            # A step count must not be shared: fused optimizers count in place.
            part = value.chunk(len(made))[i] if whole else value
            optimizer.state[parameter][key] = part.clone() if isinstance(part, Tensor) else part
