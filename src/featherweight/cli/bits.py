# SPDX-License-Identifier: Apache-2.0
"""What `inspect --bits` says: how much the model loses with each single weight rounded, at each number of bits.

By the task's metric where it has one, else by the model's answers on its data. Nothing is trained, nothing is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featherweight.cli import console
from featherweight.cli.console import say, table
from featherweight.progress import watch
from featherweight.report import words

if TYPE_CHECKING:
    from featherweight.task import Task

__all__ = ["measured", "show"]


def measured(task: Task) -> dict[str, Any]:
    """The scan as JSON-able data. One pass over the data for each weight and each of 8, 6, 4, 3 and 2 bits.

    Raises `DataError` for a task that has neither a metric nor data, and `NothingToCompress` for a model without
    weights.
    """
    from featherweight.quantize import mixed_bits, sensitivity

    with watch(console.progress(), sys.stderr) as tell:
        tell({"kind": "stage", "name": "round each weight alone"})
        found = sensitivity(task.model, task, report=tell)
    return {**found.to_dict(), "at_4_bits": mixed_bits(found, 4)}


def show(found: Mapping[str, Any]) -> None:
    """One row a weight, one column a number of bits; last the bits that an average of 4 would give it."""
    of, bits = found["of"], [str(b) for b in found["bits"]]
    if found["whole"] is None:
        say(f"{of.capitalize()} with one weight rounded (the squared change of all answers over their square)", "bold")
    else:
        say(f"How far {of} falls from {words.metric(found['whole'])} with one weight rounded", "bold")
    rows = [
        (
            line["name"],
            line["kind"],
            words.count(line["parameters"]),
            *(_loss(line["losses"][b]) for b in bits),
            str(found["at_4_bits"][line["name"]]),
        )
        for line in found["lines"]
    ]
    columns = range(2, 4 + len(bits))
    table(("weight", "kind", "parameters", *(f"{b} bits" for b in bits), "for 4 on average"), rows, right=columns)


def _loss(value: float) -> str:
    """
    >>> _loss(0.0), _loss(0.01234), _loss(-1e-5)
    ('0', '0.0123', '-1e-05')
    """
    return f"{value:.3g}"
