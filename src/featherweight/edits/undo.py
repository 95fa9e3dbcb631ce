# SPDX-License-Identifier: Apache-2.0
"""A way back: a model and its optimizers as they were, in the same objects, without copying a tensor.

Edits never write into a tensor's memory; they give the tensor object other memory. So it is enough to hold on to the
old one until the change has proved good.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.edits.effective import reshape_in_place

__all__ = ["remember"]


def remember(models: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer] = ()) -> Callable[[], None]:
    """A function that puts structure, attributes, values, gradients and optimizer state back as they are now.

    >>> from featherweight import Slice, apply
    >>> model = nn.Linear(2, 4)
    >>> undo = remember([model])
    >>> apply(model, Slice("weight", 0, (0, 1)))
    >>> undo()
    >>> model
    Linear(in_features=2, out_features=4, bias=True)
    """
    attributes = [(module, _contents(vars(module))) for model in models for module in model.modules()]
    tensors = {
        id(value): (value, value.data, value.grad)
        for module, _ in attributes
        for held in (module._parameters, module._buffers)
        for value in held.values()
        if isinstance(value, Tensor) and not nn.parameter.is_lazy(value)
    }
    states = [(opt, {p: dict(s) for p, s in opt.state.items()}) for opt in optimizers]
    groups = [(group, list(group["params"])) for opt, _ in states for group in opt.param_groups]

    def undo() -> None:
        for module, contents in attributes:
            _restore(vars(module), contents)
        with torch.no_grad():
            for tensor, data, gradient in tensors.values():
                reshape_in_place(tensor, data)
                tensor.grad = gradient
        for opt, state in states:
            for parameter in [p for p in opt.state if p not in state]:
                del opt.state[parameter]
            for parameter, entries in state.items():
                opt.state[parameter].clear()
                opt.state[parameter].update(entries)
        for group, parameters in groups:
            group["params"][:] = parameters

    return undo


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each value with a shallow copy of it, if it can change in place. Weak references to hooks need the same dict."""
    return {
        name: (value, copy.copy(value) if isinstance(value, dict | list | set) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], contents: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in contents]:
        del attributes[name]
    for name, (value, inside) in contents.items():
        if isinstance(value, list):
            value[:] = inside
        elif inside is not None:
            value.clear()
            value.update(inside)
        attributes[name] = value
