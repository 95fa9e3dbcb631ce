# SPDX-License-Identifier: Apache-2.0
"""What the tests of corrections share: models that were compressed crudely, and a look at all that may not change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.layers import weights


def call(model: nn.Module, batch: Any) -> Any:
    """A batch is a tensor, a tuple of arguments or a dict of them."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def pruned(reference: nn.Module, share: float = 0.5) -> nn.Module:
    """A copy without the smallest weights of each layer."""
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in weights(model)[0]:
            values = weight.parameter
            values[values.abs() <= values.abs().flatten().quantile(share)] = 0.0
    return model


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() == 0 for name, parameter in model.named_parameters() if parameter.ndim > 1}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    own = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return own + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


class Stopped(BaseException):
    """Stands for Ctrl-C."""


def stopping(after: int, error: BaseException) -> Callable[[nn.Module, Any], Any]:
    """A forward that raises at the call after so many."""
    left = [after]

    def forward(model: nn.Module, batch: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return call(model, batch)

    return forward
