# SPDX-License-Identifier: Apache-2.0
"""A copy of a model to run and take apart, so that the user's own is never touched.

The copy shares the parameters (no memory, and what is measured is what will be shipped) and owns everything else:
modules, training flags, buffers and Python attributes. A forward that counts its calls or moves a buffer moves the
copy's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from featherweight.errors import DataError, OptionError
from featherweight.task import describe

__all__ = ["eval_copy", "higher_order", "run_once"]


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode that shares its parameters and nothing else.

    Do not write to its parameters, and do not move it to another device: both would reach the original.
    Raises `OptionError` for a lazy module that has not run yet, and for a model that Python cannot copy.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    >>> twin = eval_copy(model)
    >>> twin[0].weight is model[0].weight, twin[1].running_mean is model[1].running_mean, model.training
    (True, False, True)
    """
    shared: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise OptionError(f"{name} belongs to a lazy module that has not run yet; call the model once first.")
        shared[id(parameter)] = parameter
    for module in model.modules():
        for value in vars(module).values():
            # What weight_norm leaves in `weight` has a history, which deepcopy refuses; it is computed anew at each
            # call.
            if isinstance(value, Tensor) and value.grad_fn is not None:
                shared[id(value)] = value
    try:
        return copy.deepcopy(model, shared).eval()
    except Exception as error:
        raise OptionError(
            f"The model ({type(model).__name__}) cannot be copied, and measuring never runs the model itself: "
            f"{type(error).__name__}: {error}. Keep what cannot be copied (files, locks, generators) out of its attributes."
        ) from error


def run_once(model: nn.Module, example_inputs: tuple[Any, ...]) -> Any:
    """One forward without gradients on copies of the inputs, with torch's random state put back afterwards.

    Raises `DataError` that shows the inputs if the model does not take them.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        inputs = tree_map_only(Tensor, torch.clone, example_inputs)
        try:
            return model(*inputs)
        except Exception as error:
            raise DataError(
                f"{type(model).__name__} could not be called with example_inputs {describe(example_inputs)}: "
                f"{type(error).__name__}: {error}. example_inputs is the tuple of positional arguments of one forward call."
            ) from error


def higher_order(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """For a mode that watches ops: of `torch.cond` the branch that is taken, watched; another op of ops, unwatched."""
    if func is not torch.ops.higher_order.cond:
        return func(*args, **kwargs)
    predicate, yes, no, operands = args
    with mode:
        return (yes if predicate else no)(*operands)
