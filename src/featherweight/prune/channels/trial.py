# SPDX-License-Identifier: Apache-2.0
"""Which groups can really be cut: tried on a copy before anything is trained or masked, a coupling of each.

A trace says what belongs together; whether a model's own code bears the smaller size (a number in a `view`, say) shows
when it is cut. Better now than after hours of training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from featherweight.edits import cut
from featherweight.errors import FeatherweightError
from featherweight.graph import Coupling, Group, Trace

__all__ = ["that_can_be_cut"]


def that_can_be_cut(
    model: nn.Module, trace: Trace, groups: Sequence[Group], inputs: Any, verify: bool
) -> tuple[list[Group], dict[str, str]]:
    """The groups of which a coupling can be cut, and the reasons of those of which none can.

    All are tried together on one copy; only where that fails, each by itself, and then those that could together again.
    """
    if _failure(model, trace, list(groups), inputs, verify) is None:
        return list(groups), {}
    chosen: list[Group] = []
    reasons: dict[str, str] = {}
    for group in groups:
        failure = _failure(model, trace, [group], inputs, verify)
        if failure is None:
            chosen.append(group)
        else:
            reasons[group.name] = f"it cannot be cut: {failure}"
    while chosen and (failure := _failure(model, trace, chosen, inputs, verify)) is not None:
        reasons[chosen.pop().name] = (
            f"it cannot be cut together with {chosen[0].name if chosen else 'others'}: {failure}"
        )
    return chosen, reasons


def _failure(model: nn.Module, trace: Trace, groups: list[Group], inputs: Any, verify: bool) -> str | None:
    couplings: list[Coupling] = [group[group.size - 1] for group in groups]
    if not couplings:
        return None
    try:
        cut(copy.deepcopy(model), couplings, trace=trace, inputs=inputs, verify=verify)
    except FeatherweightError as error:
        return str(error)
    return None
