# SPDX-License-Identifier: Apache-2.0
"""Whether a model runs as its user runs it: in its own precision, and in training mode with a backward pass.

A proof in float64 and eval mode cannot see kernels that ask for aligned sizes (grouped products of experts want rows of
16 bytes) nor parameters that only training uses (SpecAugment's mask). So a cut model is also run plainly, on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from featherweight.edits.whereabouts import whereabouts
from featherweight.errors import VerifyError

__all__ = ["check_runs", "modes_that_run"]

MODES = ("evaluation", "training")


def modes_that_run(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> tuple[str, ...]:
    """Those of "evaluation" and "training" in which the model runs on these inputs. Changes nothing.

    >>> modes_that_run(nn.BatchNorm1d(3), (torch.zeros(1, 3),))
    ('evaluation',)
    """
    return tuple(mode for mode in MODES if _failure(model, inputs, mode) is None)


def check_runs(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any], modes: Collection[str]) -> None:
    """Raises `VerifyError`, with the line, where a cut model does not run in a mode in which it ran before."""
    for mode in modes:
        failure = _failure(model, inputs, mode)
        if failure is not None:
            raise VerifyError(
                f"the cut model answers rightly in float64 but does not run as it is, in {mode} mode: {failure}. Nothing was "
                "changed. A kernel may ask for sizes of a multiple, such as 8: cut by that; or a tensor that only training "
                "uses keeps its size: leave this group out."
            )


def _failure(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any], mode: str) -> str | None:
    try:
        twin = copy.deepcopy(model).train(mode == "training")
    except Exception:  # weights that a hook leaves with a history; the proof has its own way to copy them
        return None
    device = next((tensor.device for tensor in (*twin.parameters(), *twin.buffers())), torch.device("cpu"))
    inputs = tree_map_only(Tensor, lambda t: t.detach().clone().to(device), inputs)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(mode == "training"):
        torch.manual_seed(0)
        try:
            answer = twin(**inputs) if isinstance(inputs, Mapping) else twin(*inputs)
            leaves = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if leaves:
                torch.autograd.backward([leaf.float().mean() for leaf in leaves])
        except Exception as error:  # whatever a model raises, it does not run
            return whereabouts(error, twin)
    return None
