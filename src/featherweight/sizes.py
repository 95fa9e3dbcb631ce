# SPDX-License-Identifier: Apache-2.0
"""Bytes as people write them: 200000, "2 MB" (10^6), "2 MiB" (2^20)."""

from __future__ import annotations

import re

from featherweight.errors import OptionError

__all__ = ["parse_bytes", "split_unit"]

_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(size: str | int, name: str = "size") -> int:
    """A number of bytes, as a number or with its unit. Raises `OptionError` for anything else, naming the option.

    >>> parse_bytes("1.5 kB"), parse_bytes("2 MiB"), parse_bytes(7)
    (1500, 2097152, 7)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    number, unit = split_unit(size)
    if unit in _BYTES and number > 0:
        return int(number * _BYTES[unit])
    raise OptionError(f"{name} {size!r} is not a number of bytes: 200000, '2 MB' or '2 GiB' say.")


def split_unit(text: object) -> tuple[float, str]:
    """A number and the unit after it; (0, "") for what is neither."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)\s*", text) if isinstance(text, str) else None
    return (float(match[1]), match[2]) if match else (0.0, "")
