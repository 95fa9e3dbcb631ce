# SPDX-License-Identifier: Apache-2.0
"""What a report is told of a cut: a line a group, what was frozen and why, what was reached, what was not met."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featherweight.graph import Trace
from featherweight.prune.channels.decide import TOLERANCE, Decision
from featherweight.prune.channels.selection import lines
from featherweight.prune.channels.targets import words

__all__ = ["events_of"]


def events_of(
    trace: Trace,
    gone: Mapping[str, np.ndarray],
    reasons: Mapping[str, str],
    decision: Decision | None,
    notes: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Events for `stage.report`: selection, message and unmet."""
    for line in lines(trace, {name: ~flags for name, flags in gone.items()}, reasons):
        yield {"kind": "selection", "weight": dataclasses.asdict(line)}
    for note in trace.notes:
        yield {"kind": "message", "text": note}
    for group in trace.groups:
        if group.statistics and group.name in gone and gone[group.name].any():
            more = f" and {len(group.statistics) - 1} more" if len(group.statistics) > 1 else ""
            text = f"group {group.name}: the statistics of {group.statistics[0]}{more} change with the cut: train on, or exact=True"
            yield {"kind": "message", "text": text}
    for note in notes:
        yield {"kind": "message", "text": note}
    if decision is None:
        return
    cut = sum(int(flags.sum()) for flags in gone.values())
    total = sum(trace.sizes.values())
    yield {"kind": "message", "text": f"{cut} of {total} couplings cut: {decision.words}"}
    for goal, value in decision.reached:
        if value > goal.limit * (1 + TOLERANCE):
            yield {"kind": "unmet", "text": _unmet(goal.kind, goal.limit, value)}
        elif value < goal.limit * (1 - TOLERANCE) and cut:
            text = f"{words(goal.kind, value)} is below the {words(goal.kind, goal.limit)} asked for: the last coupling is large"
            yield {"kind": "message", "text": text}


def _unmet(kind: str, limit: float, value: float) -> str:
    return (
        f"cutting reached {words(kind, value)}, not the {words(kind, limit)} asked for: nothing more may be cut. Lower "
        "least or multiple, or keep and freeze less; the reasons are in the table of layers."
    )
