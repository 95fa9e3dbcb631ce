# SPDX-License-Identifier: Apache-2.0
"""What the processor is. Reads files; starts no process, imports no torch."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

__all__ = ["processor_flags", "processor_name"]


def processor_name() -> str:
    """As its maker calls it, where the system tells; its architecture otherwise.

    >>> processor_name() != ""
    True
    """
    return _facts().get("model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """Its instruction sets, as the system calls them; empty where it does not tell.

    >>> "avx2" in processor_flags() or platform.machine() != "x86_64"
    True
    """
    facts = _facts()
    return set((facts.get("flags") or facts.get("Features") or "").split())


def _facts() -> dict[str, str]:
    """Of the first processor; the rest repeat it."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
