# SPDX-License-Identifier: Apache-2.0
"""What `inspect --heads` says: the metric without each single attention head, and with the best head of a layer alone.

These are the tables of Michel et al. (2019, arXiv 1905.10650), measured on the model as it is: nothing is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from featherweight.cli import console
from featherweight.cli.console import say, table
from featherweight.errors import OptionError
from featherweight.progress import watch
from featherweight.report import words

if TYPE_CHECKING:
    from torch import nn

    from featherweight.graph import Trace
    from featherweight.task import Task

__all__ = ["measured", "show"]


def measured(task: Task, trace: Trace) -> dict[str, Any]:
    """Both tables as JSON-able data, with the metric's name and direction. One evaluation for the model and two a head.

    Raises `OptionError` for a task that has no metric, and `NothingToCompress` for a model without heads.
    """
    if task.evaluate is None:
        raise OptionError("--heads measures a metric, and the task has none: give Task(..., evaluate=, metric=).")
    from featherweight.prune.channels.heads import head_groups, head_tables

    total = 1 + 2 * sum(group.size for group in head_groups(trace))
    with watch(console.progress(), sys.stderr) as tell:
        tell({"kind": "stage", "name": f"{total} evaluations"})
        evaluate = _counted(task.evaluate, total, tell)
        found = head_tables(task.model, trace, evaluate, higher_is_better=task.higher_is_better)
    return {"name": task.metric, "higher_is_better": task.higher_is_better, "samples": task.samples, **found.to_dict()}


def _counted(
    evaluate: Callable[[Any], float], total: int, tell: Callable[[dict[str, Any]], None]
) -> Callable[[nn.Module], float]:
    done = 0

    def counted(model: nn.Module) -> float:
        nonlocal done
        value = evaluate(model)
        done += 1
        tell({"kind": "step", "step": done, "total": total})
        return value

    return counted


def show(found: Mapping[str, Any]) -> None:
    """Table 1 of the paper as differences to the whole model, one row a layer; table 2 with the metric itself."""
    name, metric = found["name"], found["metric"]
    say(f"{name} of the whole model: {words.metric(metric)}")
    say()
    say(f"{name} without a single head, as the difference to that", "bold")
    most = max(len(values) for values in found["without"].values())
    rows = [
        (layer, *(_difference(value - metric) for value in values), *[""] * (most - len(values)))
        for layer, values in found["without"].items()
    ]
    table(("layer", *(f"head {i}" for i in range(most))), rows, right=range(1, most + 1))
    say()
    say(f"{name} with only the best head of a layer, all other layers whole", "bold")
    best = [
        (layer, f"head {head} of {len(found['without'][layer])}", words.metric(value), _difference(value - metric))
        for layer, (head, value) in found["best"].items()
    ]
    table(("layer", "kept", name, "difference"), best, right=(2, 3))


def _difference(value: float) -> str:
    """
    >>> _difference(-0.01234), _difference(0.0), _difference(float("nan"))
    ('-0.0123', '0', 'NaN')
    """
    if value != value:
        return "NaN"
    return f"{value:+.3g}" if value else "0"
