# SPDX-License-Identifier: Apache-2.0
"""What the commands print: tables and lines for people on stdout, one JSON document with --json, errors on stderr.

Colour and width follow the terminal; where there is none (a pipe, CI), text is plain and lines are as long as they
need.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TextIO

import rich.table
import typer
from rich.console import Console
from rich.text import Text

from featherweight.report.tables import Table

__all__ = ["Json", "answer", "fail", "progress", "say", "show", "table"]

# What a pipe or a log gets: wide enough that no cell is folded.
_PLAIN_WIDTH = 240

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=stream, highlight=False, markup=False, emoji=False, width=_PLAIN_WIDTH)
    return console


def say(line: str = "", style: str = "") -> None:
    """One line for people."""
    _console(sys.stdout).print(line, style=style or None, soft_wrap=True)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """A table for people; columns whose index is in `right` hold numbers."""
    shown = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console = _console(sys.stdout)
    if console.is_terminal:
        console.print(shown)
        return
    with console.capture() as text:
        console.print(shown)
    for line in text.get().splitlines():
        say(line.rstrip())


def answer(data: Mapping[str, Any], stream: TextIO) -> None:
    """The one JSON document of a command with --json. Numbers that JSON does not know (NaN, infinity) are null."""
    print(json.dumps(_finite(data), indent=1, default=str), file=stream)


def show(found: Table) -> None:
    """A table of the report."""
    table(found.head, found.rows, right=[i for i in range(len(found.head)) if i not in found.left])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def fail(kind: str, message: str) -> None:
    """An error, on stderr: its kind, then what happened and what to type next, never folded."""
    text = Text(f"{kind}: " if kind else "", style="bold red").append(message, style="not bold default")
    _console(sys.stderr).print(text, soft_wrap=True)


def progress() -> bool:
    """Always: a bar on a terminal, one plain line a stage on stderr elsewhere, so that a log shows where a run is."""
    return True
