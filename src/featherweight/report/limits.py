# SPDX-License-Identifier: Apache-2.0
"""How much of a long run a page shows, so that it stays small. What is cut says so, and `report.json` has all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LIMITS", "MAX_BYTES", "Limits"]

MAX_BYTES = 500_000


@dataclass(frozen=True)
class Limits:
    """How much of each long thing a page shows."""

    rows: int  # of a table that has one row a layer
    points: int  # of a curve
    samples: int  # of a strip of timings
    entries: int  # of any other list or dict
    characters: int  # of one text

    def shorten(self, value: Any, long: bool = False) -> Any:
        """The same data with texts and lists cut, and text that UTF-8 cannot hold replaced."""
        if isinstance(value, str):
            value = value.encode("utf-8", "replace").decode()
            room = self.characters * 10 if long else self.characters
            return value if len(value) <= room else value[:room] + " … (cut; report.json has all)"
        if isinstance(value, Mapping):
            pairs = list(value.items())[: self.entries]
            return {self.shorten(str(key)): self._entry(str(key), item) for key, item in pairs}
        if isinstance(value, list | tuple):
            cut: list[Any] = [self.shorten(item) for item in value[: self.entries]]
            if len(value) > self.entries and isinstance(value[0], str):
                cut.append(f"… and {len(value) - self.entries:,} more in report.json")
            return cut
        return value

    def _entry(self, key: str, value: Any) -> Any:
        if key in ("channels", "layers", "selection", "solved") and isinstance(value, list | tuple):
            return [self.shorten(row) for row in value]
        if key in ("history", "samples_ms"):
            return value
        return self.shorten(value, long=key in ("command", "recipe"))


# Tried in this order until the page fits; the last one fits whatever the report holds.
LIMITS = (
    Limits(rows=400, points=500, samples=300, entries=200, characters=4000),
    Limits(rows=150, points=300, samples=150, entries=60, characters=800),
    Limits(rows=40, points=150, samples=60, entries=20, characters=200),
    Limits(rows=12, points=60, samples=20, entries=8, characters=60),
)
