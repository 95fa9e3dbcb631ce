# SPDX-License-Identifier: Apache-2.0
"""Budgets as people write them: "2 MB" or the share kept, "30 %"; a drop in the metric's units or "1 %"."""

from __future__ import annotations

import contextlib

from featherweight.errors import OptionError, is_number
from featherweight.sizes import parse_bytes, split_unit

__all__ = ["allowed_drop", "limit_bytes"]


def limit_bytes(budget: str | int, whole: int) -> int:
    """A size budget in bytes: a number of bytes, "2 MB" (10^6), "2 MiB" (2^20), or the share kept of `whole`, "30 %".

    Raises `OptionError` for anything else, and for a share outside 0 to 100 %.

    >>> limit_bytes("30 %", whole=1000), limit_bytes("1.5 kB", whole=9), limit_bytes(7, whole=9)
    (300, 1500, 7)
    """
    number, unit = split_unit(budget)
    if unit == "%" and 0 < number <= 100:
        return int(whole * number / 100)
    with contextlib.suppress(OptionError):
        return parse_bytes(budget)
    raise OptionError(f"size {budget!r} is neither bytes (200000, '2 MB', '2 MiB') nor the share kept ('30 %').")


def allowed_drop(budget: str | float, reference: float) -> float:
    """How far a metric may fall: a number in the metric's own units, or "1 %" of `reference`.

    >>> allowed_drop("1 %", reference=0.9), allowed_drop(0.02, reference=0.9)
    (0.009000000000000001, 0.02)
    """
    if is_number(budget) and budget >= 0:
        return float(budget)
    number, unit = split_unit(budget)
    if unit == "%" and 0 <= number <= 100:
        return abs(reference) * number / 100
    raise OptionError(f"drop {budget!r} is neither in the metric's units (0.01) nor a share of the reference ('1 %').")
