# SPDX-License-Identifier: Apache-2.0
"""The order in which layers run, seen by hooks in one eager forward: no tracing, so any model will do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["call_order"]


def call_order(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of the modules without children in the order of their first call, in one forward without gradients.

    The model is left as it was: mode, and buffers that a forward in training mode would move.

    >>> call_order(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.zeros(1, 2),))
    ('0', '1')
    """
    seen: dict[str, None] = {}

    def remember(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: seen.setdefault(name)

    training = {module: module.training for module in model.modules()}
    # MultiheadAttention has a child that it never calls, and is one layer to us.
    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children()) or isinstance(m, nn.MultiheadAttention)]
    hooks = [module.register_forward_pre_hook(remember(name)) for name, module in leaves]
    try:
        model.eval()
        with torch.no_grad():
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return tuple(seen)
