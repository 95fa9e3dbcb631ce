# SPDX-License-Identifier: Apache-2.0
"""A limit in time for what cannot look at the clock itself, such as torch.export. Only where signals reach: in the main
thread, on systems that have an interval timer; elsewhere the limit is kept by whoever asks `deadline` now and then."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from featherweight.errors import GraphError

__all__ = ["limited"]


class _TimeIsUp(BaseException):
    """Goes through `except Exception` on its way out."""


@contextlib.contextmanager
def limited(seconds: float, what: str) -> Iterator[float]:
    """Stops work inside after `seconds`, with a `GraphError` naming `what`; gives the deadline on the monotonic clock.

    >>> with limited(60.0, "waiting") as deadline:
    ...     round(deadline - time.monotonic())
    60
    """
    deadline = time.monotonic() + seconds
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0]:  # somebody else's timer is running
        yield deadline
        return

    def ring(number: int, frame: FrameType | None) -> None:
        if _importing(frame):  # a module that is half imported would stay so for the whole process
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield deadline
    except _TimeIsUp:
        raise GraphError(
            f"{what} took longer than the {seconds:g} seconds that it was given, and was stopped. Give more seconds, or smaller "
            "example inputs."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
