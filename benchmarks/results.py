# SPDX-License-Identifier: Apache-2.0
"""Results as lines of JSON, one a run, written as it ends: an experiment that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """What has been measured so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def last(rows: Iterable[Row], *keys: str) -> list[Row]:
    """Of rows that are alike in these keys the last: what was measured again counts as it was then."""
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def add(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
