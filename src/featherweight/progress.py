# SPDX-License-Identifier: Apache-2.0
"""Events as a progress bar on a terminal, and as nothing elsewhere. The only place that draws while work goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["watch"]

_SHOWN = ("loss", "lr", "sparsity", "metric")


@contextlib.contextmanager
def watch(progress: bool | None, stream: TextIO) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that takes events; shows them if `progress`, or if it is None and the stream is a terminal.

    Where the stream is no terminal, as in the log of a CI job, what is shown is one plain line a stage and a message.

    >>> import sys
    >>> with watch(False, sys.stderr) as tell:
    ...     tell({"kind": "step", "step": 1, "total": 2})
    """
    console = Console(file=stream)
    if progress is False or (progress is None and not console.is_terminal):
        yield lambda event: None
        return
    if not console.is_terminal:
        yield lambda event: _plain(event, stream)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", style="dim"),
    )
    with Progress(*columns, console=console) as bars:
        shown = _Bars(bars)
        yield shown.tell
        shown.finish()


def _plain(event: dict[str, Any], stream: TextIO) -> None:
    text = layer_line(event["layer"]) if event["kind"] == "layer" else event.get("text")
    text = event.get("name") if event["kind"] == "stage" else text
    if text is not None:
        stream.write(f"{text}\n")
        stream.flush()


def layer_line(layer: Mapping[str, Any]) -> str:
    """One line of a walk's running table: how a layer was solved, how well, from how much, and at what cost."""
    return (
        f"{layer['name']}  {layer['rows']} x {layer['d']}  {layer['solver']}  error {layer['error']:.3g} "
        f"(simple {layer['simple']:.3g})  {layer['samples']} samples, {layer['tokens']} tokens  "
        f"damping {layer['damping']:.1g}  {layer['seconds']:.1f} s  {layer['peak_bytes'] / 1e9:.1f} GB"
    )


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.current: TaskID | None = None

    def tell(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "stage":
            self.finish()
            self.current = self.bars.add_task(event["name"], total=None, facts="")
        elif self.current is None:
            return
        elif kind in ("step", "resumed"):
            self.bars.update(self.current, completed=event["step"], total=event["total"])
        elif kind == "record":
            facts = "  ".join(f"{key} {event[key]:.4g}" for key in _SHOWN if isinstance(event.get(key), float))
            self.bars.update(self.current, facts=facts)
        elif kind == "layer":
            self.bars.console.print(layer_line(event["layer"]), style="dim", markup=False, highlight=False)
        elif kind in ("message", "unmet"):
            self.bars.console.print(event["text"], style="dim", markup=False, highlight=False)

    def finish(self) -> None:
        """A stage without steps has no length: its bar stands full once it is over."""
        if self.current is not None:
            task = next(task for task in self.bars.tasks if task.id == self.current)
            total = task.total or 1
            self.bars.update(self.current, total=total, completed=total)
