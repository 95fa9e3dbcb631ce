# SPDX-License-Identifier: Apache-2.0
"""What went wrong, in one message and one exit code: the user's input, the user's own code, or a bug of ours.

Which of the last two it was is read from the traceback: whose code was running innermost, ours or the user's.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

import typer
from typer.exceptions import TyperException

import featherweight
from featherweight.cli import console
from featherweight.errors import FeatherweightError

__all__ = ["explained", "frames", "is_ours"]

_OURS = Path(featherweight.__file__).parent
_INSTALLED = tuple(
    {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


@contextlib.contextmanager
def explained(*, debug: bool, answer: TextIO | None) -> Iterator[None]:
    """Turns an exception into one message on stderr, an `error` object on `answer` if given, and an exit code."""
    try:
        yield
    except (TyperException, typer.Exit, typer.Abort, BrokenPipeError):  # typer's to answer
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        kind, message, code = _explain(error)
        message = "\n".join([message, *getattr(error, "__notes__", ())])
        if not debug:
            console.fail(kind, message)
        if answer is not None:
            entry = {"type": type(error).__name__, "message": message}
            console.answer({"error": entry, "exit_code": code}, answer)
        raise typer.Exit(code) from error


def _explain(error: BaseException) -> tuple[str, str, int]:
    """The kind of error ("" for an interruption), what to tell the user, and the exit code."""
    kind = type(error).__name__
    if isinstance(error, FeatherweightError):
        return kind, str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "", "Interrupted.", 130
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return kind, f"The disk is full: {error}. Free some space; what was finished is kept.", 2
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return kind, f"Out of memory: {error}. Use smaller batches or a smaller model.", 2
    running = frames(error.__traceback__)
    if running and not is_ours(running[-1]):
        frame = running[-1]
        return (
            kind,
            f"{error}\nraised by your code: {frame.filename}:{frame.lineno}, in {frame.name}. --debug shows more.",
            2,
        )
    report = (
        "This is a bug of featherweight, not of your input. Please report it with what the same command prints with "
        "--debug, and with the output of: featherweight doctor"
    )
    return f"Internal error, {kind}", f"{error}\n{report}", 1


def frames(trace: TracebackType | None) -> list[traceback.FrameSummary]:
    """The frames that are ours or the user's own, innermost last: not the standard library's, nor a package's."""
    return [
        frame
        for frame in traceback.extract_tb(trace)
        if is_ours(frame)
        or not (frame.filename.startswith("<") or any(_is_in(frame.filename, place) for place in _INSTALLED))
    ]


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether featherweight's own code was running in this frame."""
    return _is_in(frame.filename, _OURS)


def _is_in(file: str, folder: Path) -> bool:
    return folder in Path(file).resolve().parents
