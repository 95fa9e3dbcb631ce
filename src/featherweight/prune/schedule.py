# SPDX-License-Identifier: Apache-2.0
"""How sparse a layer is to be at each training step, and at which steps masks are chosen anew.

Zhu & Gupta 2017 (arXiv 1710.01878), equation 1: s_t = s_f + (s_i - s_f) (1 - p)³ with p the progress from `begin` to
`end`: fast at first, where there is much that nobody misses, slow near the end. The other schedules change the cube.
"""

from __future__ import annotations

from collections.abc import Callable

from featherweight.errors import OptionError, check_whole, check_word

__all__ = ["SCHEDULES", "check_schedule", "sparsity_at", "updates_at"]

# What is left to do at progress p, as a share of s_f - s_i.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda p: (1.0 - p) ** 3,
    "linear": lambda p: 1.0 - p,
    "constant": lambda p: 0.0,
    "one_shot": lambda p: 0.0,
}


def check_schedule(me: str, schedule: str, begin: int, end: int, every: int) -> int:
    """Raises `OptionError` for what is no schedule; gives its end, which is its beginning where there is one update."""
    check_word(me, "schedule", schedule, SCHEDULES)
    check_whole(me, "begin", begin)
    check_whole(me, "end", end)
    check_whole(me, "every", every, least=1)
    if schedule == "one_shot":
        return begin
    if end < begin:
        raise OptionError(
            f"{me}: end={end} is before begin={begin}; both count optimizer steps, and end is when the target is reached."
        )
    return end


def sparsity_at(step: int, begin: int, end: int, initial: float, final: float, schedule: str = "cubic") -> float:
    """The sparsity that the schedule asks for at `step`: `initial` before `begin`, `final` from `end` on.

    >>> [round(sparsity_at(step, 0, 100, 0.0, 0.9), 4) for step in (0, 50, 100, 500)]
    [0.0, 0.7875, 0.9, 0.9]
    """
    if step < begin:
        return initial
    progress = 1.0 if step >= end else (step - begin) / (end - begin)
    left = SCHEDULES[schedule](progress)
    return initial * left + final * (1.0 - left)  # exact at both ends, as the shorter form is not


def updates_at(step: int, begin: int, end: int, every: int, schedule: str = "cubic") -> bool:
    """Whether masks are chosen anew at `step`: every `every` steps from `begin`, and at `end` itself.

    `one_shot` has one update, at `begin`.

    >>> [step for step in range(30) if updates_at(step, begin=5, end=17, every=5)]
    [5, 10, 15, 17]
    """
    if schedule == "one_shot":
        return step == begin
    return begin <= step <= end and ((step - begin) % every == 0 or step == end)
